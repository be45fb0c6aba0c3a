#!/usr/bin/env bash
# How iDSPN is trained: by the paper's rule or straight through, with few or many inner steps.
# n = 16, 640 samples, two seeds, 16 runs of some three minutes on one core (AVX2).
# Finished runs are skipped, also those of which the repository has the record (RECORDS=FOLDER keeps
# records elsewhere): stop and start it at will.
#
#   experiments/class_specific_numbering/inner.sh [NAME ...]   # such as n16-straight-10-s0
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/numbering-inner}
RECORDS=${RECORDS:-experiments/class_specific_numbering/runs}

train() { # name
  local way steps seed
  IFS=- read -r _ way steps seed <<< "$1"
  if [[ -e $RECORDS/$1/metrics.jsonl ]]; then return; fi
  $MSDSPN train numbering --set-size 16 --hidden-dim 128 --latent-dim 128 --train-size 640 \
    --val-size 1280 --test-size 6400 --steps 1000 --outer.schedule linear --learning-rate 0.003 \
    --evaluate-every 250 --seed "${seed#s}" --inner.num-steps "$steps" \
    --inner.adjoint "identity$([[ $way == straight ]] && echo :straight-through)" \
    --no-tensorboard --resume auto --run-dir "$RUNS/$1"
  $MSDSPN report numbering --runs "$RUNS/$1" --out "$RUNS/$1/report" > /dev/null
  for decoding in 20 40 80; do
    $MSDSPN evaluate "$RUNS/$1" --checkpoint latest --split val --inner.num-steps $decoding
  done
  $PYTHON experiments/keep_run.py "$RUNS/$1" "$RECORDS"
}

for name in "${@:-$(echo n16-{identity,straight}-{5,10,20,40}-s{0,1})}"; do
  for each in $name; do train "$each"; done
done
