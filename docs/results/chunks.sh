#!/bin/sh
# Chunked pruning beside pruning at once and beside the prompt cut to the same FLOPs: the numbers of
# "In chunks, or at once?" in docs/choosing.md. Stopped and started again, it goes on where it was.
#   sh docs/results/chunks.sh MODELS TEXT NAME...
# MODELS is the folder of the checkpoints NAME (m, s, demo), TEXT JSON lines of held-out documents.
# Leaves OUT/chunks-NAME-ppl.json and -recall.json, and OUT/chunks-TASK.json of models that it trains
# on prompts of LENGTH tokens (in out/chunks; those that are there are not trained again). ONLY: what
# to run. SNIPPETS: snippets and passages per document. SECONDS_EACH: training time per task. The other
# variables below are options of the commands.
set -e
models=$1
text=$2
shift 2
python=${PYTHON:-python}
simba=${SIMBA:-simba}
out=${OUT:-docs/results}
only=${ONLY:-train ppl recall task}
context=${CONTEXT:-8192}
sizes=${SIZES:-256 512 1024 2048 4096}
distances=${DISTANCES:-256 1024 2048}
snippets=${SNIPPETS:-5}
batch=${BATCH:-13}
criteria=${CRITERIA:-influence,recency,uniform}
keep=${KEEP:-0.1,0.3}
length=${LENGTH:-8192}
examples=${EXAMPLES:-300}
tasks=${TASKS:-passkey copying}
device=${DEVICE:-auto}
trained=out/chunks

wanted() { case " $only " in *" $1 "*) return 0 ;; *) return 1 ;; esac }

smaller() { # TOKENS: the chunk sizes below it, with commas
    list=
    for size in $sizes; do
        if [ "$size" -lt "$1" ]; then list="${list:+$list,}$size"; fi
    done
    echo "$list"
}

room=0 # the passages are the same at every distance
for distance in $distances; do
    if [ "$distance" -gt "$room" ]; then room=$distance; fi
done

pids=
if wanted train; then
    mkdir -p "$trained"
    for task in $tasks; do
        test -e "$trained/$task/config.json" && continue
        $python examples/train_recall.py "$task" --out "$trained/$task" --length "$length" \
            --items "${ITEMS:-5}" --batch-size "${TRAIN_BATCH:-16}" --log-every 20 \
            --max-seconds "${SECONDS_EACH:-120}" ${DEVICE:+--device $DEVICE} \
            > "$trained/$task.log" 2>&1 &
        pids="$pids $!"
    done
fi
for m in "$@"; do
    given="--model $models/$m --text $text --device $device --batch-size $batch --cut --keep $keep"
    file=$out/chunks-$m
    if wanted ppl; then
        $simba ppl $given --contexts "$context" --criteria "$criteria" --snippets "$snippets" \
            --chunk-sizes "$(smaller "$context")" --json "$file-ppl.json" --plot "$file-ppl.png"
    fi
    if wanted recall; then
        for distance in $distances; do # a prompt is the passage of 100, these, and the cue of 10
            $simba recall $given --distances "$distance" --room "$room" --criteria "$criteria" \
                --passages "$snippets" --chunk-sizes "$(smaller $((distance + 110)))" \
                --json "$file-recall.json" --plot "$file-recall.png"
        done
    fi
done
for pid in $pids; do wait "$pid" || { tail -n 5 "$trained"/*.log; exit 1; }; done
if wanted task; then
    for task in $tasks; do
        tail -n 2 "$trained/$task.log"
        $simba recall --task "$task" --model "$trained/$task" --device "$device" --cut \
            --lengths "$length" --examples "$examples" --batch-size "${TASK_BATCH:-50}" \
            --criteria "$criteria" --keep "$keep" --chunk-sizes "$(smaller "$length")" \
            --json "$out/chunks-$task.json" --plot "$out/chunks-$task.png"
    done
fi
