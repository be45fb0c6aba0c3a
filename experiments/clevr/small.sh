#!/usr/bin/env bash
# The reduced comparison of this folder's README, on a CPU: 64 x 64 images of one to three objects.
# Safe to interrupt and to run again. RUNS: where the run folders go. STEPS: of every model.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs/clevr-small}
MSDSPN=${MSDSPN:-msdspn}
for model in ${MODELS:-idspn dspn slot-mlp}; do
  $MSDSPN train clevr --model "$model" --steps "${STEPS:-4000}" --size 64 --encoder-width 16 \
    --latent-dim 128 --hidden-dim 128 --slot-dim 16 --set-size 3 --min-objects 1 --max-objects 3 \
    --train-size 20000 --val-size 1000 --test-size 2000 --batch-size 64 --inner-steps 10 \
    --late-inner-steps 20 --evaluate-every 500 --checkpoint-every 500 --resume \
    --run-dir "$RUNS/$model"
  $MSDSPN evaluate "$RUNS/$model"
done
$MSDSPN report clevr --runs "$RUNS"
