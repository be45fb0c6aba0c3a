#!/usr/bin/env bash
# The paper's comparison at equal time, three to ten objects on one core. Every model has the
# processor time of STEPS steps of iDSPN on the machine at hand: 20 to 50 minutes with AVX-512, 45
# to 85 with AVX2; twelve such units in all. Unfinished runs go on, finished ones are skipped, also
# those of which the repository has the record (RECORDS=FOLDER keeps records elsewhere): stop and
# start it at will.
#
#   experiments/clevr/comparison.sh [NAME ...]     # default: all
#
# 64 x 64 pixels, 70,000 procedural scenes (rendered once), encoder of width 32 without the norm
# before its end, batch 128. What a step takes is measured first (pace.py), in turn: iDSPN, the
# model at hand, iDSPN. Their ratio decides how many steps there are, so runs of different
# machines can stand in one table; RUNS/NAME.pace keeps it. The learning rate falls to zero at the
# end. Pin a call to its core (taskset), and run no more than there are cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs/clevr-comparison}
RECORDS=${RECORDS:-experiments/clevr/comparison_runs}
source experiments/clevr/equal_time.sh
STEPS=${STEPS:-2300}

images=(--size 64 --batch-size 128 --test-size 2000 --no-tensorboard)
images+=(${IMAGES:---train-size 70000 --val-size 1000 --data-seed 4})
muon=(--outer.optimizer muon --outer.schedule linear --outer.warmup-steps 100 --learning-rate 0.01)
adam=(--outer.schedule linear --outer.warmup-steps 100 --learning-rate 0.001)  # the published rate
inner=(--inner.num-steps 20 --inner.late-num-steps 20)
encoder=(--encoder-width 32 --no-encoder-end-norm)
slots=(--model slot-attention)
# A minimum gains by more inner steps than training had, a learned path of 20 does not.
idspn=(--model idspn "${encoder[@]}" "${inner[@]}" --inner.eval-num-steps 40)
dspn=(--model dspn "${encoder[@]}" "${inner[@]}" --inner.eval-num-steps 20)

reference=("${images[@]}" "${idspn[@]}" "${muon[@]}")

compare() { # name, share of the time, flags
  local name=$1 share=$2 flags=("${images[@]}" "${@:3}") steps cost=1
  if [[ -e $RECORDS/$name/metrics.jsonl ]]; then return; fi
  if [[ $name != idspn-[01] && $name != idspn-fspool ]]; then
    # Seeds have the same; a step of Slot Attention, with 5 x 5 convolutions at full size, is long.
    local file=$RUNS/${name%-[01]}.pace
    pace "$file" "$([[ $name == slot-attention* ]] && echo 24 || echo 60)" "${flags[@]}"
    cost=$(cat "$file")
  fi
  steps=$($PYTHON -c "print(int(round($STEPS * $share / $cost, -1)) or 10)")
  if [[ $name == slot-attention-muon ]]; then flags+=(--outer.warmup-steps $((steps / 20))); fi
  # To score a relation network takes as long as dozens of its training steps.
  local looks=$([[ $name == idspn-relation ]] && echo 4 || echo 10)
  train "$name" "$steps" "${flags[@]}" --evaluate-every $((steps / looks)) \
    --checkpoint-every $((steps < 1000 ? 20 : 200))
}

all=(idspn-0 dspn-0 slot-attention slot-attention-muon slot-mlp idspn-1 dspn-1
  fspool relation sum mean idspn-adam dspn-adam slot-mlp-adam)
for name in "${@:-${all[@]}}"; do
  case $name in
    idspn-[01]) compare "$name" 1 "${idspn[@]}" "${muon[@]}" --seed "${name##*-}" ;;
    idspn-adam) compare "$name" 1 "${idspn[@]}" "${adam[@]}" ;;
    dspn-[01]) compare "$name" 1 "${dspn[@]}" "${muon[@]}" --seed "${name##*-}" ;;
    dspn-adam) compare "$name" 1 "${dspn[@]}" "${adam[@]}" ;;
    slot-attention) compare "$name" 1 "${slots[@]}" ;;  # its own schedule, warm-up apart
    slot-attention-muon) compare "$name" 1 "${slots[@]}" "${muon[@]}" ;;
    slot-mlp) compare "$name" 1 --model slot-mlp "${muon[@]}" ;;
    slot-mlp-adam) compare "$name" 1 --model slot-mlp ;;  # as Slot Attention's
    fspool | relation | sum | mean)
      compare "idspn-$name" 0.5 "${idspn[@]}" "${muon[@]}" --inner.pool "$name" ;;
    *) echo "comparison.sh: expected some of ${all[*]}, got $name" >&2; exit 2 ;;
  esac
done
$PYTHON experiments/clevr/comparison.py "$RECORDS"
