#!/bin/sh
# Fine-tuned on rows in which passages return, and measured: the table "Teaching it to look back" of the guide.
#   sh docs/results/finetune_passages.sh MODEL TEXT HELDOUT OUT
# MODEL is a checkpoint, TEXT what is trained on, HELDOUT JSON lines of documents that are measured on. One after
# another; the guide's ran all at once on one GPU, which gives each fewer steps in its SECONDS_EACH. Leaves OUT/NAME and
# OUT/passages-NAME-{ppl,recall}.json. MORE: further options of finetune_passages.py (default: --bf16). The other
# variables are options.
set -e
model=$1
text=$2
heldout=$3
out=$4
python=${PYTHON:-python3}
far=window:0.5+delta@write:0.79@0:7
rules=$far,recency@write:0.79@0:7,recency@write:0.83@0:6
mkdir -p "$out"

measure() { # NAME MODEL RULES
    given="--model $2 --text $heldout --criteria $3 --keep 0.1 --cut --batch-size ${EVAL_BATCH_SIZE:-26}"
    $python -m simba ppl $given --contexts "${CONTEXTS:-256,1024}" --snippets "${SNIPPETS:-4}" \
        --json "$out/passages-$1-ppl.json"
    $python -m simba recall $given --distances "${DISTANCES:-64,256,1024}" --passages "${PASSAGES:-4}" \
        --json "$out/passages-$1-recall.json"
}

measure untrained "$model" "$rules"
while read -r name rule options; do
    $python "$(dirname "$0")/finetune_passages.py" --model "$model" --text "$text" --out "$out/$name" --rule "$rule" \
        --keep 0.08 0.15 --steps "${STEPS:-100000}" --max-seconds "${SECONDS_EACH:-280}" ${MORE---bf16} $options < /dev/null
    if [ "$name" = control ]; then rule=$rules; fi
    measure "$name" "$out/$name" "$rule" < /dev/null
done << END
control recency@write:0.79@0:7 --recipe dense --lr 3e-4
r83 recency@write:0.83@0:6 --dense 0 --lr 3e-4
r79 recency@write:0.79@0:7 --dense 0 --lr 3e-4
d79 $far --dense 0 --lr 3e-4
d79hid $far --dense 0 --hidden 1 --lr 3e-4
d79hi $far --dense 0 --lr 1e-3
d79both $far --dense 1 --pruned 1 --teacher now --lr 3e-4
END
