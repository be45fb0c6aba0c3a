#!/usr/bin/env bash
# Measure everything that the README says, half an hour in all; nothing else may run meanwhile.
#
#   experiments/benchmarks/run.sh PATH/TO/OTHER/python
#
# That interpreter has torch and torchdeq, and for Optimistix also optimistix, jax, flax and optax.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
HERE=experiments/benchmarks

$PYTHON $HERE/compare.py --torch-python "$1"
$PYTHON $HERE/compare.py --torch-python "$1" --solvers
$PYTHON $HERE/compare.py --products
$PYTHON -m msdspn_command bench matching --json | grep -v tiny |
  $PYTHON -c 'import json, sys; print(json.dumps([json.loads(x) for x in sys.stdin], indent=1))' \
  > $HERE/results/matching.json
$PYTHON $HERE/scaling.py
$PYTHON $HERE/startup.py
$PYTHON $HERE/report.py
