#!/bin/sh
# Every result of docs/results.md. Stopped and started again, it goes on where it was.
#   sh docs/results/run.sh MODELS TEXT     MODELS holds the folders s and demo; TEXT is JSON lines
# SIMBA is the command (default: simba), OUT the folder (default: docs/results).
set -e
models=$1
text=$2
simba=${SIMBA:-simba}
out=${OUT:-docs/results}

run() { # NAME EXPERIMENT OPTIONS...
    name=$1
    shift
    echo "== simba $*"
    $simba "$@" --json "$out/$name.json" --plot "$out/$name.png"
}

for m in s demo; do
    run $m-flow flow --model "$models/$m" --text "$text"
    run $m-flow-exact flow --model "$models/$m" --text "$text" --dt-bias
    run $m-redundancy redundancy --model "$models/$m" --text "$text"
    run $m-recall recall --model "$models/$m" --text "$text" --distances 64,256 --keep 0.5,0.1 \
        --passages 2 --batch-size 2
    run $m-ablate ablate --model "$models/$m" --text "$text" --keep 0.5,0.3,0.1 --snippets 2
done
for m in demo s; do
    run $m-ppl ppl --model "$models/$m" --text "$text" --contexts 256,1024,4096 --room 8192 \
        --criteria influence,recency
done
run demo-ppl ppl --model "$models/demo" --text "$text" --contexts 256,1024,4096,8192 --room 8192 \
    --criteria influence,recency
for m in demo s; do
    run $m-speed speed --model "$models/$m" --lengths 512,2048 --keep 0.3,0.1 \
        --criteria influence,recency --repeats 3
done
