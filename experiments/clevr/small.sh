#!/usr/bin/env bash
# The reduced comparison of this folder's README, on a CPU: 64 x 64 images of one to three objects.
# Safe to interrupt and to run again. RUNS: where the run folders go. STEPS: of every model.
# About 3.5 hours in all on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs/clevr-small}
MSDSPN=${MSDSPN:-msdspn}
for run in ${RUN_NAMES:-idspn dspn slot-mlp idspn-1 dspn-1}; do
  model=${run%-1} seed=0
  [[ $run == *-1 ]] && seed=1
  $MSDSPN train clevr --model "$model" --seed "$seed" --steps "${STEPS:-5000}" --batch-size 64 \
    --rate-drop 0.8 --inner.num-steps 20 --inner.late-num-steps 40 --size 64 --encoder-width 16 \
    --latent-dim 256 --hidden-dim 256 --slot-dim 16 --set-size 3 --min-objects 1 --max-objects 3 \
    --train-size 20000 --val-size 1000 --test-size 2000 --evaluate-every 500 \
    --checkpoint-every 1000 --resume auto --run-dir "$RUNS/$run"
  $MSDSPN evaluate "$RUNS/$run"
done
$MSDSPN report clevr --runs "$RUNS"
