#!/usr/bin/env bash
# Everything to be run where there is an accelerator; the same command again goes on.
#   experiments/accelerator/run.sh --minutes 30
#   experiments/accelerator/run.sh --rehearse        tiny, on the CPU
# PYTHON=... picks the interpreter. Packages that it lacks may lie as wheels in wheels/ (wheels.sh).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}"
if compgen -G "$here/wheels/*.whl" > /dev/null; then
    # Pure Python all of them: unpacked, they can be imported.
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    for wheel in "$here"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$here/day.py" "$@"
