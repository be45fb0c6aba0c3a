#!/usr/bin/env bash
# The paper's comparison at equal time: every model MINUTES on one core, three to ten objects.
# One of ten run yet (idspn-0). Unfinished runs go on, finished ones are skipped, also those of
# which the repository has the record (RECORDS=FOLDER keeps records elsewhere): stop and start it at
# will.
#
#   experiments/clevr/comparison.sh [NAME ...]     # default: all, 7 hours on one core
#
# 64 x 64 pixels, 70,000 procedural scenes (rendered once), encoder of width 32, batch 128. How many
# steps fit into the time is measured first, as the processor time of 60 steps less that of 20: the
# learning rate falls to zero at the end. Pin a call to its core (taskset), and run no more than
# there are cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/clevr-comparison}
RECORDS=${RECORDS:-experiments/clevr/runs}
MINUTES=${MINUTES:-45}
HALF=$($PYTHON -c "print($MINUTES / 2)")

images=(--size 64 --encoder-width 32 --batch-size 128 --test-size 2000 --no-tensorboard)
images+=(${IMAGES:---train-size 70000 --val-size 1000})
muon=(--outer.optimizer muon --outer.schedule linear --outer.warmup-steps 100 --learning-rate 0.01)
inner=(--inner.num-steps 20 --inner.late-num-steps 20 --inner.eval-num-steps 40)
slots=(--model slot-attention)

seconds() { # steps, flags: processor seconds of so many steps, with the start and the end
  rm -rf "$RUNS/pace"
  $PYTHON -c 'import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)' \
    $MSDSPN train clevr "${@:2}" --steps "$1" --evaluate-every "$1" --run-dir "$RUNS/pace"
}

train() { # name, minutes, flags
  local name=$1 minutes=$2 flags=("${images[@]}" "${@:3}")
  if [[ -e $RECORDS/$name/metrics.jsonl ]]; then return; fi
  local steps_file=$RUNS/$name.steps
  if [[ ! -e $steps_file ]]; then
    mkdir -p "$RUNS"
    local short long
    short=$(seconds 20 "${flags[@]}")  # renders and compiles; both are kept for the next
    short=$(seconds 20 "${flags[@]}")
    long=$(seconds 60 "${flags[@]}")
    $PYTHON -c "print(round(60 * $minutes * 40 / ($long - $short), -2) or 100)" > "$steps_file.new"
    mv "$steps_file.new" "$steps_file"
  fi
  local steps
  steps=$(printf '%.0f' "$(cat "$steps_file")")
  $MSDSPN train clevr "${flags[@]}" --steps "$steps" --evaluate-every $((steps / 10)) \
    --checkpoint-every 200 --resume auto --run-dir "$RUNS/$name"
  $MSDSPN evaluate "$RUNS/$name"
  $PYTHON experiments/keep_run.py "$RUNS/$name" "$RECORDS"
}

all=(idspn-0 dspn-0 slot-attention slot-attention-muon slot-mlp idspn-1 dspn-1 relation sum mean)
for name in "${@:-${all[@]}}"; do
  case $name in
    idspn-[01] | dspn-[01])
      train "$name" "$MINUTES" --model "${name%-?}" --seed "${name##*-}" "${inner[@]}" "${muon[@]}" ;;
    slot-attention) train "$name" "$MINUTES" "${slots[@]}" ;;  # its own schedule
    slot-attention-muon) train "$name" "$MINUTES" "${slots[@]}" "${muon[@]}" ;;
    slot-mlp) train "$name" "$MINUTES" --model slot-mlp "${muon[@]}" ;;
    relation | sum | mean)
      train "idspn-$name" "$HALF" --model idspn --inner.pool "$name" "${inner[@]}" "${muon[@]}" ;;
    *) echo "comparison.sh: expected some of ${all[*]}, got $name" >&2; exit 2 ;;
  esac
done
$MSDSPN report clevr --runs "$RECORDS" --out "${OUT:-experiments/clevr}"
