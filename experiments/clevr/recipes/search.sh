#!/usr/bin/env bash
# One change of the recipe at a time, at equal time: every run has the processor time of STEPS
# steps of the base. Unfinished runs go on, finished ones are skipped, also those of which the
# repository has the record (RECORDS=FOLDER keeps records elsewhere): stop and start it at will.
#
#   experiments/clevr/recipes/search.sh [NAME ...]    # default: all; some 12 minutes each (AVX2)
#
# A NAME is that of a change below and a seed, as in rate-0.02-s0. Base: three to ten objects at
# 64 x 64, 70,000 procedural scenes (rendered once), ResNet-18 of width 32, batch 128, 20 inner
# steps (40 when decoding), Muon at 0.04 that falls to zero. Where a change has a price, what a
# step takes is measured first (pace.py). Pin a call to its core (taskset), and run no more than
# there are cores.
set -euo pipefail
cd "$(dirname "$0")/../../.."
RUNS=${RUNS:-runs/clevr-search}
RECORDS=${RECORDS:-experiments/clevr/recipes/runs}
source experiments/clevr/equal_time.sh
STEPS=${STEPS:-400}

images=(--batch-size 128 --val-size 1000 --test-size 2000 --data-seed 4 --no-tensorboard)
fixed=(${IMAGES:---train-size 70000})
base=(--model idspn --encoder-width 32 --outer.optimizer muon --outer.schedule linear
  --outer.warmup-steps 40 --learning-rate 0.04
  --inner.num-steps 20 --inner.late-num-steps 20 --inner.eval-num-steps 40)
reference=(--size 64 "${images[@]}" "${fixed[@]}" "${base[@]}")

declare -A free=( # changes that do not change what a step costs
  [base]=""
  [rate-0.01]="--learning-rate 0.01"
  [rate-0.02]="--learning-rate 0.02"
  [rate-0.08]="--learning-rate 0.08"
  [momentum-0.9]="--outer.momentum 0.9"
  [momentum-0.98]="--outer.momentum 0.98"
  [decay-0.1]="--outer.weight-decay 0.1"
  [cosine]="--outer.schedule cosine"
  [average-0.99]="--outer.average 0.99"
  [clip-1]="--outer.max-grad-norm 1"
  [position-2]="--position-weight 2"
  [position-4]="--position-weight 4"
  [no-end-norm]="--no-encoder-end-norm"
  [proximity-0]="--inner.proximity 0"
)
declare -A paid=(
  [adam-0.001]="--outer.optimizer adam --learning-rate 0.001"
  [adam-0.003]="--outer.optimizer adam --learning-rate 0.003"
  [width-16]="--encoder-width 16"
  [width-64]="--encoder-width 64"
  [latent-256]="--latent-dim 256"
  [latent-1024]="--latent-dim 1024"
  [hidden-256]="--hidden-dim 256"
  [hidden-1024]="--hidden-dim 1024"
  [inner-5]="--inner.num-steps 5 --inner.late-num-steps 5"
  [inner-10]="--inner.num-steps 10 --inner.late-num-steps 10"
  [inner-40]="--inner.num-steps 40 --inner.late-num-steps 40"
  [neumann-1]="--inner.adjoint neumann:1"
  [neumann-3]="--inner.adjoint neumann:3"
  [cg-3]="--inner.adjoint conjugate_gradient:3:0.1"
  [batch-64]="--batch-size 64"
  [batch-256]="--batch-size 256"
  [fresh]="--fresh"
  [size-128]="--size 128"
  [size-128-stride-2]="--size 128 --encoder-stride 2"
)

run() { # name
  local change=${1%-s[0-9]} seed=${1##*-s} cost=1 scenes=("${fixed[@]}") flags steps
  if [[ -e $RECORDS/$1/metrics.jsonl ]]; then return; fi
  if [[ ! -v free[$change] && ! -v paid[$change] ]]; then
    echo "search.sh: expected one of ${!free[*]} ${!paid[*]}, and -s0, got $1" >&2
    exit 2
  fi
  case $change in
    fresh) scenes=() ;;
    size-128*) if [[ -z ${IMAGES:-} ]]; then scenes=(--train-size 40000); fi ;;  # Enough for them.
  esac
  flags=(--size 64 "${images[@]}" "${scenes[@]}" "${base[@]}" ${free[$change]-} ${paid[$change]-})
  if [[ -v paid[$change] ]]; then
    pace "$RUNS/$change.pace" 60 "${flags[@]}"
    cost=$(cat "$RUNS/$change.pace")
  fi
  steps=$($PYTHON -c "print(int(round($STEPS / $cost, -1)) or 10)")
  train "$1" "$steps" "${flags[@]}" --outer.warmup-steps $((steps / 10)) --seed "$seed" \
    --evaluate-every "$steps" --checkpoint-every 100
}

for name in "$@"; do run "$name"; done
if (($# == 0)); then
  for change in $(printf '%s\n' "${!free[@]}" "${!paid[@]}" | sort); do run "$change-s0"; done
  run base-s1
fi
$PYTHON experiments/clevr/recipes/search.py "$RECORDS"
