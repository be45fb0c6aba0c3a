#!/usr/bin/env bash
# The reduced comparison of this folder's README, on a CPU: 64 x 64 images of one to three objects.
# Safe to interrupt and to run again. RUNS: where the run folders go. STEPS: of every model.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs/clevr-small}
MSDSPN=${MSDSPN:-msdspn}
# Name of the run folder, and what it differs in. "dspn-plain": DSPN as first published (Zhang et
# al. 2019), plain gradient descent of ten steps.
while read -r name options; do
  # shellcheck disable=SC2086  # the options are words
  $MSDSPN train clevr $options --steps "${STEPS:-5000}" --batch-size 64 --rate-drop 0.8 --size 64 \
    --encoder-width 16 --latent-dim 256 --hidden-dim 256 --slot-dim 16 --set-size 3 \
    --min-objects 1 --max-objects 3 --train-size 20000 --val-size 1000 --test-size 2000 \
    --evaluate-every 500 --checkpoint-every 1000 --resume --run-dir "$RUNS/$name" </dev/null
  $MSDSPN evaluate "$RUNS/$name" </dev/null
done <<'MODELS'
idspn      --model idspn --inner-steps 20 --late-inner-steps 40
dspn       --model dspn --inner-steps 20 --late-inner-steps 40
dspn-9     --model dspn --inner-steps 20 --late-inner-steps 40 --momentum 0.9
dspn-plain --model dspn --inner-steps 10 --late-inner-steps 10 --momentum 0
slot-mlp   --model slot-mlp
MODELS
$MSDSPN report clevr --runs "$RUNS"
