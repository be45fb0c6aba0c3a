#!/usr/bin/env bash
# The published size: n = 64, 4 classes. Not run yet.
# Unfinished runs go on, finished ones are skipped, also those of which the repository has the
# record (RECORDS=FOLDER keeps records elsewhere, and so makes all runs again): stop and start it at
# will.
#
#   experiments/class_specific_numbering/run.sh [PART ...]     # default: muon published others more
#
# The steps of the baselines are a guess at equal processor time, to be set by the first runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/numbering}
RECORDS=${RECORDS:-experiments/class_specific_numbering/runs}

train() { # name, flags
  if [[ -e $RECORDS/$1/metrics.jsonl ]]; then return; fi
  $MSDSPN train numbering --test-size 6400 --val-size 1280 --no-tensorboard --resume auto \
    --run-dir "$RUNS/$1" "${@:2}"
  # Scores of the test split are kept beside the run, then with its record.
  $MSDSPN report numbering --runs "$RUNS/$1" --out "$RUNS/$1/report" > /dev/null
  $PYTHON experiments/keep_run.py "$RUNS/$1" "$RECORDS"
}
muon=(--outer.optimizer muon --outer.schedule linear --learning-rate 0.02 --outer.average 0.999)
tenth=(--steps 5000 --evaluate-every 500 --checkpoint-every 250)

for part in "${@:-muon published others more}"; do
  for word in $part; do
    case $word in
      muon) # a tenth of the published steps, two seeds
        for seed in 0 1; do train "idspn-muon-s$seed" --seed "$seed" "${muon[@]}" "${tenth[@]}"; done ;;
      published) # as published, as far as it gets
        train idspn-s0 --checkpoint-every 250 ;;
      others) # one seed each
        train dspn-muon-s0 --model dspn "${muon[@]}" --steps 2000 --evaluate-every 500 \
          --checkpoint-every 250
        train bilstm-s0 --model bilstm --augment --steps 25000 --evaluate-every 2500
        train transformer-pe-s0 --model transformer-pe --augment --steps 15000 --evaluate-every 2500
        train transformer-random-pe-s0 --model transformer-random-pe --steps 15000 \
          --evaluate-every 2500 ;;
      more) # ten times the samples
        train idspn-muon-6400-s0 --train-size 6400 "${muon[@]}" "${tenth[@]}" ;;
      *) echo "run.sh: expected muon, published, others or more, got $word" >&2; exit 2 ;;
    esac
  done
done
