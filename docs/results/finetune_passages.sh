#!/bin/sh
# Fine-tuned on rows in which passages return, and measured: the table "Teaching it to look back" of the guide.
#   sh docs/results/finetune_passages.sh MODEL TEXT HELDOUT OUT
# MODEL is a checkpoint, TEXT what is trained on, HELDOUT JSON lines of documents that are measured on. One after
# another, for SECONDS seconds each; the guide's ran seven and five at once on one GPU, which gives each fewer steps.
# Leaves OUT/NAME and OUT/passages-NAME-{ppl,recall}.json. MORE: further options of finetune_passages.py (default:
# --bf16). SECONDS_EACH: for all. The other variables are options.
set -e
model=$1
text=$2
heldout=$3
out=$4
python=${PYTHON:-python3}
half=window:0.5+delta
far=$half@write:0.79@0:7
rules=$far,recency@write:0.79@0:7,recency@write:0.83@0:6
mkdir -p "$out"

measure() { # NAME MODEL RULES
    given="--model $2 --text $heldout --criteria $3 --keep 0.1 --cut --batch-size ${EVAL_BATCH_SIZE:-26}"
    $python -m simba ppl $given --contexts "${CONTEXTS:-256,1024}" --snippets "${SNIPPETS:-4}" \
        --json "$out/passages-$1-ppl.json"
    $python -m simba recall $given --distances "${DISTANCES:-64,256,1024}" --passages "${PASSAGES:-4}" \
        --json "$out/passages-$1-recall.json"
}

measure untrained "$model" "$rules,$half@write:0.88@0:6,$half@write:0.75@0:8"
while read -r name seconds rule options; do
    $python "$(dirname "$0")/finetune_passages.py" --model "$model" --text "$text" --out "$out/$name" --rule "$rule" \
        --keep 0.08 0.15 --steps "${STEPS:-100000}" --max-seconds "${SECONDS_EACH:-$seconds}" ${MORE---bf16} $options < /dev/null
    if [ "$name" = control ]; then rule=$rules; fi
    measure "$name" "$out/$name" "$rule" < /dev/null
done << END
control 280 recency@write:0.79@0:7 --recipe dense --lr 3e-4
r83 280 recency@write:0.83@0:6 --dense 0 --lr 3e-4
r79 280 recency@write:0.79@0:7 --dense 0 --lr 3e-4
d79 280 $far --dense 0 --lr 3e-4
d79hid 280 $far --dense 0 --hidden 1 --lr 3e-4
d79hi 280 $far --dense 0 --lr 1e-3
d79both 280 $far --dense 1 --pruned 1 --teacher now --lr 3e-4
hi75 560 $half@write:0.75@0:8 --dense 0 --lr 1e-3
mid88 560 $half@write:0.88@0:6 --dense 0 --lr 5e-4
hi88 560 $half@write:0.88@0:6 --dense 0 --lr 1e-3
hi79 560 $far --dense 0 --lr 1e-3
hid79 560 $far --dense 0 --hidden 1 --lr 1e-3
END
