#!/bin/sh
# Every result of docs/results.md. Stopped and started again, it goes on where it was.
#   sh docs/results/run.sh MODELS TEXT NAME...
# MODELS is the folder of the checkpoints NAME (m, s, demo), TEXT JSON lines of held-out documents.
# SIMBA is the command (default: simba), OUT the folder for the results (default: docs/results), ONLY
# the experiments to run (default: all, the cheap ones first). The models m and s were trained on contexts
# of 1024 tokens: 8192 is eight times that. `demo` is assets/demo-model, which also saw rows of 4096.
set -e
models=$1
text=$2
shift 2
simba=${SIMBA:-simba}
out=${OUT:-docs/results}
only=${ONLY:-flow flow-exact redundancy ppl ablate recall fact passkey speed eval}

run() { # EXPERIMENT COMMAND OPTIONS...
    name=$1
    shift
    case " $only " in *" $name "*) ;; *) return ;; esac
    echo "== simba $*"
    $simba "$@" --json "$out/$m-$name.json" --plot "$out/$m-$name.png"
}

for m in "$@"; do
    given="--model $models/$m --text $text"
    run flow flow $given --keep 0.1,0.02
    run flow-exact flow $given --keep 0.1,0.02 --dt-bias
    run redundancy redundancy $given
    run ppl ppl $given --contexts 256,1024,4096,8192 --criteria influence,recency --keep 0.1,0.02
    run ablate ablate $given --keep 0.5,0.1,0.02
    run recall recall $given --distances 64,256 --passages 2
    run fact recall $given --task fact --lengths 1024 --prompts 2 --batch-size 4 \
        --criteria influence,recency,recency@write@0:0.6,recency@write@0:0.4 --keep 0.1
    run passkey recall $given --task passkey --lengths 256,1024 --passkeys 2
    run speed speed --model "$models/$m" --lengths 512,2048 --keep 0.3,0.1 \
        --criteria influence,recency --repeats 3
    tasks=$(mktemp -d)/tasks
    run eval eval --model "$models/$m" --include-path "$tasks" --shots 3 \
        --tasks "$(${PYTHON:-python} examples/write_tasks.py "$tasks")" \
        --criteria influence,recency --batch-size 4
done
