#!/bin/sh
# What a prompt cut can't do: the numbers of docs/beyond.md. Stopped and started again, it goes on where it was.
#   sh docs/results/beyond.sh MODELS HELDOUT NAME...
# MODELS is the folder of the checkpoints NAME, HELDOUT JSON lines of documents that were not trained on.
# Leaves OUT/NAME-WHAT.json, where WHAT is one of ONLY: ppl; passages; fact, pairs, fewshot, passkey
# (told in the first 40 % of the prompt); fact-anywhere and pairs-anywhere (told at any place). PROMPTS: of each
# document. LONG: a further length, measured with LONG_PROMPTS; empty: none. The other variables are options.
set -e
models=$1
heldout=$2
shift 2
simba=${SIMBA:-simba}
out=${OUT:-docs/results/beyond}
only=${ONLY:-ppl passages fact pairs fewshot passkey fact-anywhere pairs-anywhere}
rules=${RULES:-influence,recency@write:0.67@0:0.42,recency@write:0.67@0:0.34,recency@write:0.6@0:0.25,recency@write@0:0.42,recency@write@0:0.59,recency@write:left=0.5@0:0.3,recency@write:left=0.3@0:0.3,recency@drop@0:0.59,window:0.5+delta@write}
keep=${KEEP:-0.1,0.2}
lengths=${LENGTHS:-512,2048}
long=${LONG-8192}
batch=${BATCH:-26}

run() { # EXPERIMENT MODEL WHAT OPTIONS...
    experiment=$1
    model=$2
    file=$out/$2-$3
    shift 3
    given="--model $models/$model --text $heldout --device ${DEVICE:-auto} --batch-size $batch"
    $simba "$experiment" $given "$@" --criteria "$rules" --keep "$keep" --json "$file.json"
    $simba "$experiment" $given "$@" --criteria influence --keep 0.5 --json "$file.json"
}

mkdir -p "$out"
for m in "$@"; do
    for what in $only; do
        name=prompts
        if [ "${what%%-*}" = passkey ]; then name=passkeys; fi
        case $what in
        ppl) run ppl "$m" ppl --contexts "${CONTEXTS:-256,1024,4096}" --snippets "${SNIPPETS:-16}" ;;
        passages) run recall "$m" passages --distances "${DISTANCES:-64,256,1024}" --passages "${PASSAGES:-16}" ;;
        *-anywhere)
            run recall "$m" "$what" --task "${what%%-*}" --lengths 2048 --$name "${PROMPTS:-16}"
            ;;
        *)
            run recall "$m" "$what" --task "$what" --lengths "$lengths" --$name "${PROMPTS:-16}" --places 0,0.4
            if [ -n "$long" ]; then
                run recall "$m" "$what-long" --task "$what" --lengths "$long" --$name "${LONG_PROMPTS:-16}" \
                    --places 0,0.4
            fi
            ;;
        esac
    done
done
