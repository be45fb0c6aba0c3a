#!/usr/bin/env bash
# The runs of README.md: two models, two outer optimisers. Three to ten minutes of one core in all.
# Finished runs are skipped, unfinished ones go on.
set -euo pipefail
cd "$(dirname "$0")/../.."
MSDSPN=${MSDSPN:-msdspn}
RUNS=${RUNS:-runs/digits}

train() { # name, flags
  $MSDSPN train digits --batch-size 32 --hidden-dim 128 --latent-dim 128 --min-intensity 9 \
    --inner.num-steps 12 --inner.step-size 3 --inner.momentum 0.9 --steps 800 \
    --evaluate-every 400 --no-tensorboard --resume auto --run-dir "$RUNS/$1" "${@:2}"
}
for model in idspn dspn; do
  train "$model-adam" --model "$model" --learning-rate 3e-3 --outer.schedule cosine
  train "$model-muon" --model "$model" --learning-rate 0.03 --outer.optimizer muon \
    --outer.schedule linear
done
