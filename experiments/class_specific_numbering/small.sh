#!/usr/bin/env bash
# The small-scale comparison of this folder's README: 7 models, iDSPN also with the projection left
# out of its derivative (idspn-straight), 2 training set sizes, 6 seeds.
# Finished runs are skipped, also those of which the repository has the record (RECORDS=again makes
# all of them again), so it can be stopped and started again. PREFIX: put before each command.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
RUNS=${RUNS:-runs/numbering-small}
RECORDS=${RECORDS:-experiments/class_specific_numbering/runs}
SETTINGS=(--set-size 8 --num-classes 4 --hidden-dim 64 --latent-dim 64 --width 32
          --inner.num-steps 10 --batch-size 64 --learning-rate 3e-3 --steps 1000
          --evaluate-every 250 --checkpoint-every 1000 --val-size 1280 --test-size 6400)
all="idspn idspn-straight bilstm transformer-pe dspn transformer-random-pe transformer deep-sets"
for model in ${MODELS:-$all}; do
  for size in ${SIZES:-64 640}; do
    for seed in ${SEEDS:-0 1 2 3 4 5}; do
      run=$RUNS/$model-$size-$seed
      if [[ -f $run/done || -e $RECORDS/${run##*/}/metrics.jsonl ]]; then continue; fi
      rm -rf "$run"
      flags=(--model "${model%-straight}")
      if [[ $model == *-straight ]]; then flags+=(--inner.adjoint identity:straight-through); fi
      ${PREFIX:-} $MSDSPN train numbering "${flags[@]}" --train-size "$size" --seed "$seed" \
        "${SETTINGS[@]}" --no-tensorboard --run-dir "$run" "$@"
      touch "$run/done"
    done
  done
done
