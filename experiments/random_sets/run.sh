#!/usr/bin/env bash
# Everything in README.md, on a CPU. Safe to interrupt and to run again: finished runs are skipped.
set -euo pipefail
runs=${1:-runs/random-sets}

# The authors' setting: fresh sets at every step, batch 128, 1,280 validation sets, three seeds.
compare() { # name, flags
  msdspn train random-sets --fresh --val-size 1280 --inner.num-steps 10 --evaluate-every 250 \
    --checkpoint-every 100 --resume auto --run-dir "$runs/$1" "${@:2}"
}
for seed in 0 1 2; do
  compare "idspn-4-4-s$seed" --seed "$seed" --set-size 4 --set-dim 4 --steps 1000
  compare "idspn-8-8-s$seed" --seed "$seed" --set-size 8 --set-dim 8 --steps 1000
  compare "dspn-8-8-s$seed" --seed "$seed" --set-size 8 --set-dim 8 --steps 500 \
    --model dspn --inner.momentum 0.9
done

# The shortened grid: n by d by inner steps by variant, 54 cells.
grid() {
  msdspn grid random-sets --grid-dir "$runs/grid" --fresh --val-size 640 --steps 200 \
    --batch-size 32 --hidden-dim 128 --latent-dim 128 --replicates 3 --evaluate-every 200 \
    --checkpoint-every 200 --variant idspn-momentum,idspn,dspn "$@"
}
grid --set-size 2,4,8 --set-dim 2,4,8 --inner.num-steps 10,20
msdspn report random-sets --grid-dir "$runs/grid"
