#!/usr/bin/env bash
# The paper's comparison at equal time, three to ten objects on one core. Every model has the
# processor time of STEPS steps of iDSPN on the machine at hand: 20 to 50 minutes with AVX-512, 80
# with AVX2.
# Unfinished runs go on, finished ones are skipped, also those of which the repository has the record
# (RECORDS=FOLDER keeps records elsewhere): stop and start it at will.
#
#   experiments/clevr/comparison.sh [NAME ...]     # default: all, 7 hours on one core (AVX-512)
#
# 64 x 64 pixels, 70,000 procedural scenes (rendered once), encoder of width 32, batch 128. What a
# step takes is measured first, for iDSPN and for the model at hand, as the processor time of 120
# steps less that of 40 (Slot Attention: 18 less 6), while nothing else runs: cores slow each
# other. So runs of different machines can stand in one table. The learning rate
# falls to zero at the end. Pin a call to its core (taskset), and run no more than there are cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/clevr-comparison}
RECORDS=${RECORDS:-experiments/clevr/comparison_runs}
STEPS=${STEPS:-2300}

images=(--size 64 --encoder-width 32 --batch-size 128 --test-size 2000 --no-tensorboard)
images+=(${IMAGES:---train-size 70000 --val-size 1000 --data-seed 4})
muon=(--outer.optimizer muon --outer.schedule linear --outer.warmup-steps 100 --learning-rate 0.01)
inner=(--inner.num-steps 20 --inner.late-num-steps 20)
slots=(--model slot-attention)
# A minimum gains by more inner steps than training had, a learned path of 20 does not.
idspn=(--model idspn "${inner[@]}" --inner.eval-num-steps 40 "${muon[@]}")
dspn=(--model dspn "${inner[@]}" --inner.eval-num-steps 20 "${muon[@]}")

spent() { # folder, steps, flags: processor seconds of so many steps, with the start and the end
  rm -rf "$1"
  $PYTHON -c 'import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)' \
    $MSDSPN train clevr "${@:3}" --steps "$2" --evaluate-every 1000 --run-dir "$1"
}

pace() { # file, steps, flags: puts the processor seconds of a step into the file, once a machine
  local file=$1 steps=$2
  if [[ -e $file ]]; then return; fi
  mkdir -p "$RUNS"
  local short long
  short=$(spent "$file.run" "$steps" "${@:3}")  # renders, compiles; both are kept for the next
  short=$(spent "$file.run" "$steps" "${@:3}")
  long=$(spent "$file.run" $((3 * steps)) "${@:3}")
  rm -rf "$file.run"
  $PYTHON -c "print(($long - $short) / (2 * $steps))" > "$file.new"
  mv "$file.new" "$file"
}

train() { # name, share of the time, flags
  local name=$1 share=$2 flags=("${images[@]}" "${@:3}")
  if [[ -e $RECORDS/$name/metrics.jsonl ]]; then return; fi
  local sample=40
  if [[ $name == slot-attention* ]]; then sample=6; fi  # Convolutions of 5 x 5 at full size.
  pace "$RUNS/reference.pace" 40 "${images[@]}" "${idspn[@]}"
  local steps reference own
  reference=$(cat "$RUNS/reference.pace") own=$reference
  if [[ $name != idspn-[01] ]]; then
    pace "$RUNS/$name.pace" "$sample" "${flags[@]}"
    own=$(cat "$RUNS/$name.pace")
  fi
  steps=$($PYTHON -c "print(int(round($STEPS * $share * $reference / $own, -1)) or 10)")
  if [[ $name == slot-attention* ]]; then flags+=(--outer.warmup-steps $((steps / 20))); fi
  $MSDSPN train clevr "${flags[@]}" --steps "$steps" --evaluate-every $((steps / 10)) \
    --checkpoint-every $((steps < 1000 ? 20 : 200)) --resume auto --run-dir "$RUNS/$name"
  $MSDSPN evaluate "$RUNS/$name"
  $PYTHON experiments/keep_run.py "$RUNS/$name" "$RECORDS"
}

all=(idspn-0 dspn-0 slot-attention slot-attention-muon slot-mlp idspn-1 dspn-1 relation sum mean)
for name in "${@:-${all[@]}}"; do
  case $name in
    idspn-[01]) train "$name" 1 "${idspn[@]}" --seed "${name##*-}" ;;
    dspn-[01]) train "$name" 1 "${dspn[@]}" --seed "${name##*-}" ;;
    slot-attention) train "$name" 1 "${slots[@]}" ;;  # its own schedule, warm-up apart
    slot-attention-muon) train "$name" 1 "${slots[@]}" "${muon[@]}" ;;
    slot-mlp) train "$name" 1 --model slot-mlp "${muon[@]}" ;;
    relation | sum | mean) train "idspn-$name" 0.5 "${idspn[@]}" --inner.pool "$name" ;;
    *) echo "comparison.sh: expected some of ${all[*]}, got $name" >&2; exit 2 ;;
  esac
done
$PYTHON experiments/clevr/comparison.py "$RECORDS"
