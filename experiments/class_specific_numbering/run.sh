#!/usr/bin/env bash
# The published size: n = 64, 4 classes, in a tenth of the published steps. Unfinished runs go on,
# finished ones are skipped, also those of which the repository has the record (RECORDS=FOLDER
# keeps records elsewhere, and so makes all runs again): stop and start it at will.
#
#   experiments/class_specific_numbering/run.sh [PART or RUN ...]
#
# Default: straight few growing long tenth averaged published others more. RUN: one of their runs,
# such as idspn-averaged-s0.
#
# 5,000 steps took 0.9 to 2.2 hours on one core, with 5 inner steps 1; to score a run then takes
# half an hour. 50,000 take ten times that. All of it is some three days of one core. The steps of
# the baselines are a guess at equal processor time, to be set by the first runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/numbering}
RECORDS=${RECORDS:-experiments/class_specific_numbering/runs}

train() { # name, flags
  if [[ -n $only && $1 != "$only" || -e $RECORDS/$1/metrics.jsonl ]]; then return; fi
  $MSDSPN train numbering --test-size 6400 --val-size 1280 --no-tensorboard --resume auto \
    --run-dir "$RUNS/$1" "${@:2}"
  # Scores of the test split are kept beside the run, then with its record.
  $MSDSPN report numbering --runs "$RUNS/$1" --out "$RUNS/$1/report" > /dev/null
  if [[ $1 == *dspn* ]]; then
    for steps in 10 20 40 80; do
      $MSDSPN evaluate "$RUNS/$1" --checkpoint latest --split val --inner.num-steps $steps
    done
    # The best of the ways that the page lists; ten minutes.
    $MSDSPN evaluate "$RUNS/$1" --checkpoint latest --inner.num-steps 80 --inner.momentum 0.85 \
      --inner.num-starts 4
  fi
  $PYTHON experiments/keep_run.py "$RUNS/$1" "$RECORDS"
}
# Adam, its rate from three times the published one to zero along a line.
linear=(--outer.schedule linear --learning-rate 0.003)
tenth=(--steps 5000 --evaluate-every 500 --checkpoint-every 250)

parts="straight few growing long tenth averaged published others more" only=
for part in "${@:-$parts}"; do
  # The name of a run ends in that of its seed; of all parts, that run alone.
  if [[ $part == *-s[0-9] ]]; then only=$part part=$parts; else only=; fi
  for word in $part; do
    case $word in
      straight) # a tenth of the published steps, the derivative without the projection
        for seed in 0 1; do
          train "idspn-straight-s$seed" --seed "$seed" "${linear[@]}" "${tenth[@]}" \
            --inner.adjoint identity:straight-through
        done ;;
      few) # the same with 5 inner steps in training, not 20: twice as fast
        for seed in 0 1; do
          train "idspn-straight-5-s$seed" --seed "$seed" "${linear[@]}" "${tenth[@]}" \
            --inner.adjoint identity:straight-through --inner.num-steps 5 --inner.eval-num-steps 20
        done ;;
      growing) # 5 in the first half of training, 20 in the second
        train idspn-straight-5-20-s0 "${linear[@]}" "${tenth[@]}" \
          --inner.adjoint identity:straight-through --inner.num-steps 5 --inner.late-num-steps 20 ;;
      long) # with 5, for the published number of steps
        train idspn-straight-5-long-s0 "${linear[@]}" --steps 50000 --evaluate-every 2500 \
          --checkpoint-every 250 --inner.adjoint identity:straight-through --inner.num-steps 5 \
          --inner.eval-num-steps 20 ;;
      tenth) # the same by the paper's rule
        for seed in 0 1; do
          train "idspn-tenth-s$seed" --seed "$seed" "${linear[@]}" "${tenth[@]}"
        done ;;
      averaged) # the same with averaged weights; as well with more inner steps in its second half,
        # or with less inner momentum and larger steps
        train idspn-averaged-s0 "${linear[@]}" "${tenth[@]}" --outer.average 0.999
        train idspn-late40-s1 --seed 1 "${linear[@]}" "${tenth[@]}" --outer.average 0.999 \
          --inner.late-num-steps 40
        train idspn-mom06-s0 "${linear[@]}" "${tenth[@]}" --outer.average 0.999 \
          --inner.momentum 0.6 --inner.step-size 2 ;;
      published) # as published, as far as it gets
        train idspn-s0 --checkpoint-every 250 ;;
      others) # one seed each
        train dspn-s0 --model dspn "${linear[@]}" --steps 2000 --evaluate-every 500 \
          --checkpoint-every 250
        train bilstm-s0 --model bilstm --augment --steps 25000 --evaluate-every 2500
        train transformer-pe-s0 --model transformer-pe --augment --steps 15000 --evaluate-every 2500
        train transformer-random-pe-s0 --model transformer-random-pe --augment --steps 15000 \
          --evaluate-every 2500 ;;
      more) # ten times the samples
        train idspn-tenth-6400-s0 --train-size 6400 "${linear[@]}" "${tenth[@]}" ;;
      *) echo "run.sh: expected $parts, got $word" >&2; exit 2 ;;
    esac
  done
done
