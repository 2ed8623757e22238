#!/bin/sh
# Do hybrids forget less? Trains a hybrid of attention and Mamba-2, and a Mamba-2 of the same size, on the same
# text, side by side on one device, then teaches both to remember, and measures what pruning costs them.
# Stopped and started again, it goes on where it was: a training that has ended and a cell that is measured are
# not run again.
#   sh docs/results/hybrids.sh TEXT HELDOUT OUT
# TEXT is what is trained on, HELDOUT JSON lines of documents that are measured on; either may end in .xz.
# Leaves OUT/models, and in OUT/results a file NAME-WHAT.json for each model (bamba, mamba2) and WHAT (ppl,
# passages, fact, pairs), and the logs. TEXT_STEPS, MEMORY_STEPS: of TOKENS each. TEXT_SECONDS, MEMORY_SECONDS: the
# training schedules end by then, if the steps are not done (the first counts from its first step, which compiles
# kernels). MEASURE_SECONDS: no measurement takes longer. The other variables are options. Needs accelerate, and on
# a GPU mamba-ssm and causal-conv1d.
set -e
text=$1
heldout=$2
out=$3
python=${PYTHON:-python3}
simba=${SIMBA:-$python -m simba}
here=$(dirname "$0")/../..
models="bamba mamba2"
bamba_size=${BAMBA_SIZE:---d-model 384 --layers 11}
mamba2_size=${MAMBA2_SIZE:---d-model 384 --layers 20}
tokens=${TOKENS:-32768}
context=${CONTEXT:-1024}
length=${LENGTH:-4096}
text_seconds=${TEXT_SECONDS:-50}
memory_seconds=${MEMORY_SECONDS:-90}
measure_seconds=${MEASURE_SECONDS:-90}
keep=${KEEP:-0.1}
rules=${RULES:-influence,influence@drop@0:0.25,influence@drop@0:0.6,influence@drop@1@4,influence@drop@0:0.25@4,uniform}
bamba_rules=${BAMBA_RULES:-attention,attention@drop@0:0.25}
mamba2_rules=${MAMBA2_RULES:-recency@write@0:0.6}
measures=${MEASURES:-ppl passages fact pairs}
prompts=${PROMPTS:-8}
device=${DEVICE:-auto}
results=$out/results
mkdir -p "$out/models" "$results"
export TRITON_CACHE_AUTOTUNING=1 # mamba-ssm's kernels are tuned once, not by every process
if [ "$device" != cpu ]; then
    $python -c "from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined; import causal_conv1d"
fi

each() { # WHAT: the function WHAT of both models, at once
    pids=
    for m in $models; do
        "$1" "$m" >> "$results/$m-$1.log" 2>&1 &
        pids="$pids $!"
    done
    failed=
    for pid in $pids; do wait "$pid" || failed=$pid; done
    echo "== $1, $(($(date +%s) - started)) s"
    tail -n "${TAIL:-5}" "$results"/*-"$1".log
    test -z "$failed"
}

text() { # MODEL
    test -e "$out/models/$1-text/tokenizer.json" && return
    eval "size=\$$1_size"
    timeout $((text_seconds + 240)) $python "$here/examples/train_mamba.py" --family "$1" --data "$text" \
        --out "$out/models/$1-text" --tokenizer "${TOKENIZER:-$here/assets/demo-model}" $size --context "$context" \
        --batch-size $((tokens / context)) --steps "${TEXT_STEPS:-360}" --max-seconds "$text_seconds" \
        --learning-rate "${LEARNING_RATE:-2e-3}" --log-every "${LOG_EVERY:-50}"
}

memory() { # MODEL
    test -e "$out/models/$1/ended" && return
    timeout $((memory_seconds + 60)) $python "$here/examples/train_memory.py" --model "$out/models/$1-text" \
        --data "$text" --out "$out/models/$1" --native --length "$length" --tokens "$tokens" \
        --steps "${MEMORY_STEPS:-700}" --max-seconds "$memory_seconds" --items "${ITEMS:-24}" \
        --learning-rate "${MEMORY_RATE:-1.5e-3}" --check-every "${LOG_EVERY:-50}" --workers "${WORKERS:-6}" \
        $([ "$device" = cpu ] || echo --bf16) $([ "$device" = auto ] || echo "--device $device")
    touch "$out/models/$1/ended"
}

measure() { # MODEL
    eval "own=\$$1_rules"
    given="--model $out/models/$1 --text $heldout --device $device --keep $keep --criteria $rules,$own"
    pids=
    failed=
    for what in $measures; do
        case $what in
        ppl) task="ppl --contexts ${CONTEXTS:-256,1024,4096} --snippets ${SNIPPETS:-4}" ;;
        passages) task="recall --distances ${DISTANCES:-64,256,1024} --passages ${PASSAGES:-4}" ;;
        *) task="recall --task $what --lengths ${LENGTHS:-512,2048} --prompts $prompts --places 0,0.4" ;;
        esac
        # shellcheck disable=SC2086
        timeout "$measure_seconds" $simba $task $given --batch-size "${BATCH:-26}" \
            --json "$results/$1-$what.json" &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || failed=$pid; done
    test -z "$failed"
}

started=$(date +%s)
each text
each memory
each measure
