#!/bin/sh
# Train a small model on each task that needs a far token, then measure what pruning forgets.
#   sh examples/recall_table.sh OUT
# leaves OUT/TASK.json and OUT/TASK.png for passkey, mqar and copying, and OUT/report.md; the models are
# in OUT/models, the trainings' logs beside them. Models that are there are not trained again, cells that
# are there are not measured again.
# MINUTES=4: longest training, all three at once; the first on a GPU begins with compiling kernels.
# PYTHON, SIMBA: the commands. DEVICE: cuda or cpu.
# TRAIN, MEASURE: more options of examples/train_recall.py and of simba recall.
set -e
out=${1:?usage: sh examples/recall_table.sh OUT}
here=$(dirname "$0")
python=${PYTHON:-python3}
simba=${SIMBA:-$python -m simba}
seconds=$(awk "BEGIN { print 60 * ${MINUTES:-4} }")
device=${DEVICE:+--device $DEVICE}
mkdir -p "$out/models"

pids=
for task in passkey mqar copying; do
    test -e "$out/models/$task/config.json" && continue
    $python "$here/train_recall.py" $task --out "$out/models/$task" --max-seconds "$seconds" \
        $device $TRAIN > "$out/models/$task.log" 2>&1 &
    pids="$pids $!"
done
for pid in $pids; do wait "$pid" || { tail -n 5 "$out"/models/*.log; exit 1; }; done
tail -n 2 "$out"/models/*.log

pids=
for task in passkey mqar copying; do
    $simba recall --task $task --model "$out/models/$task" --batch-size 250 $device \
        --json "$out/$task.json" --plot "$out/$task.png" $MEASURE > "$out/models/$task.table" &
    pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
$simba report "$out"
