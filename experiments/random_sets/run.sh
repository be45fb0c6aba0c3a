#!/usr/bin/env bash
# Autoencoding n vectors of n numbers, trained as published and with a rate that falls.
# Unfinished runs go on, finished ones are skipped, also those of which the repository has the
# record (RECORDS=FOLDER keeps records elsewhere, and so makes all runs again): stop and start it at
# will.
#
#   experiments/random_sets/run.sh [PART ...]     # default: all parts, the cheapest first
#
# n = 8 with 10 inner steps takes 1.3 hours a run on one core with AVX-512 (measured), 20 inner
# steps or n = 16 about twice that, DSPN three times. Parts may run side by side.
# PRODUCTS=bfloat16 in front takes two thirds of the time where the processor multiplies so
# (avx512_bf16 or amx_bf16 in /proc/cpuinfo); those are runs with names of their own.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/random-sets}
RECORDS=${RECORDS:-experiments/random_sets/runs}
PRODUCTS=${PRODUCTS:-float32}

train() { # n, inner steps, variant, seed, further flags
  local how=""
  if [[ $PRODUCTS != float32 ]]; then how="-$PRODUCTS"; fi
  local name="n$1-steps$2-$3$how-seed$4" model=(--model idspn --inner.momentum 0.9)
  if [[ -e $RECORDS/$name/metrics.jsonl ]]; then return; fi
  case $3 in
    # With momentum, as in the authors' chart; their training script has it at 0.
    dspn*) model=(--model dspn --inner.momentum 0.9) ;;
    idspn-plain*) model=(--model idspn --inner.momentum 0) ;;
  esac
  $MSDSPN train random-sets --set-size "$1" --set-dim "$1" --inner.num-steps "$2" --seed "$4" \
    "${model[@]}" --inner.products "$PRODUCTS" --no-tensorboard --resume auto \
    --run-dir "$RUNS/$name" "${@:5}"
  for decoding in 10 20 40 80; do
    $MSDSPN evaluate "$RUNS/$name" --checkpoint latest --split val --inner.num-steps $decoding
  done
  $PYTHON experiments/keep_run.py "$RUNS/$name" "$RECORDS"
}
# Adam at three times the published rate, which falls to zero along a line.
falling=(--learning-rate 3e-3 --outer.schedule linear --outer.warmup-steps 200)

published() { # sizes: 10 and 20 inner steps, three variants, one seed; two at n = 8
  local n steps variant
  for n in "$@"; do
    for steps in 10 20; do
      for variant in idspn idspn-plain dspn; do
        train "$n" "$steps" "$variant" 0
        if [[ $n == 8 ]]; then train "$n" "$steps" "$variant" 1; fi
      done
    done
  done
}

for part in "${@:-ten small falling published large}"; do
  for word in $part; do
    case $word in
      small) published 2 4 ;;
      ten) # n = 8 with 10 inner steps: what the page shows
        train 8 10 idspn 0
        train 8 10 idspn-plain 0
        train 8 10 idspn-falling 0 "${falling[@]}" ;;
      falling) # n = 8, in the same steps
        for variant in idspn idspn-plain dspn; do
          for steps in 10 20; do
            for seed in 0 1; do
              train 8 "$steps" "$variant-falling" "$seed" "${falling[@]}"
            done
          done
        done ;;
      published) published 8 ;;
      large) published 16 ;;
      *) echo "run.sh: expected ten, small, falling, published or large, got $word" >&2; exit 2 ;;
    esac
  done
done
