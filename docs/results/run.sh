#!/bin/sh
# Every result of docs/results.md. Stopped and started again, it goes on where it was.
#   sh docs/results/run.sh MODELS TEXT NAME...
# MODELS is the folder of the checkpoints NAME (s, demo), TEXT JSON lines of held-out documents.
# SIMBA is the command (default: simba), OUT the folder for the results (default: docs/results).
set -e
models=$1
text=$2
shift 2
simba=${SIMBA:-simba}
out=${OUT:-docs/results}

run() { # NAME EXPERIMENT OPTIONS...
    name=$1
    shift
    echo "== simba $*"
    $simba "$@" --json "$out/$name.json" --plot "$out/$name.png"
}

for m in "$@"; do
    run "$m-flow" flow --model "$models/$m" --text "$text"
    run "$m-redundancy" redundancy --model "$models/$m" --text "$text"
    run "$m-ppl" ppl --model "$models/$m" --text "$text" --contexts 256,1024,4096 --room 8192 \
        --criteria influence,recency
    run "$m-recall" recall --model "$models/$m" --text "$text" --distances 64,256 --keep 0.5,0.1 \
        --passages 2
    run "$m-flow-exact" flow --model "$models/$m" --text "$text" --dt-bias
    run "$m-ablate" ablate --model "$models/$m" --text "$text" --keep 0.5,0.1
    run "$m-speed" speed --model "$models/$m" --lengths 512,2048 --keep 0.3,0.1 \
        --criteria influence,recency --repeats 3
    tasks=$(mktemp -d)/tasks
    run "$m-eval" eval --model "$models/$m" --include-path "$tasks" --shots 3 \
        --tasks "$(${PYTHON:-python} examples/write_tasks.py "$tasks")" \
        --criteria influence,recency --batch-size 4
done
