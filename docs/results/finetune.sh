#!/bin/sh
# The paper's table 2 and more: models fine-tuned by every recipe, and what they have lost and forgotten.
# Stopped and started again, it goes on where it was.
#   sh docs/results/finetune.sh MODELS TEXT HELDOUT NAME...
# MODELS is the folder of the checkpoints NAME (s, m, demo), TEXT what is trained on, HELDOUT JSON lines of
# documents that are measured on. The dense recipe is the control: pruned models are compared with it, and with
# its prompt cut to the same FLOPs (--cut). SIMBA is the command (default: simba), OUT the folder for models and
# results (default: out/finetune), RECIPES what is measured (default: untrained dense paper distil), CRITERIA the
# rules that are trained and measured (such as recency@write@0:0.6), MORE further options of `simba finetune` (such as
# --bf16 or --answer 256).
set -e
models=$1
text=$2
heldout=$3
shift 3
simba=${SIMBA:-simba}
out=${OUT:-out/finetune}
recipes=${RECIPES:-untrained dense paper distil}
criteria=${CRITERIA:-influence uniform}
keeps=${KEEPS:-0.1,0.05}
train="--steps ${STEPS:-400} --batch-size ${BATCH_SIZE:-16} --seq-len ${SEQ_LEN:-1024} --keep ${KEEP:-0.05,1} ${MORE:-}"
ppl="--contexts ${CONTEXTS:-256,1024,3072} --snippets ${SNIPPETS:-2} --batch-size ${EVAL_BATCH_SIZE:-8}"
recall="--distances ${DISTANCES:-64,256,1024} --passages ${PASSAGES:-2} --batch-size ${EVAL_BATCH_SIZE:-8}"

tune() { # FOLDER OPTIONS...
    folder=$1
    shift
    grep -qs '"finished": true' "$folder/finetune.json" && return
    resume=
    [ -f "$folder/finetune.json" ] && resume=--resume
    echo "== simba finetune $* --out $folder $resume"
    $simba finetune "$@" --out "$folder" $resume
}

measure() { # MODEL RESULT CRITERIA
    given="--model $1 --text $heldout --criteria $3 --keep $keeps --cut"
    for experiment in ppl recall; do
        eval "options=\$$experiment"
        echo "== simba $experiment $given $options"
        $simba $experiment $given $options --json "$out/$2-$experiment.json" --plot "$out/$2-$experiment.png"
    done
}

mkdir -p "$out"
all=$(echo $criteria | tr ' ' ,)
for m in "$@"; do
    for recipe in $recipes; do
        if [ "$recipe" = untrained ]; then
            measure "$models/$m" "$m-untrained" "$all"
            continue
        fi
        trained="--model $models/$m --text $text --recipe $recipe $train"
        if [ "$recipe" = dense ]; then
            tune "$out/$m-dense" $trained
            measure "$out/$m-dense" "$m-dense" "$all"
            continue
        fi
        for criterion in $criteria; do
            tune "$out/$m-$recipe-$criterion" $trained --criterion "$criterion"
            measure "$out/$m-$recipe-$criterion" "$m-$recipe-$criterion" "$criterion"
        done
    done
done
