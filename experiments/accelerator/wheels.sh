#!/usr/bin/env bash
# Fetch, where there is a network, what a machine with jax, flax, optax, orbax, chex, hypothesis,
# scipy, pillow, rich and safetensors still lacks. Pure Python all; run.sh finds them in wheels/.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
"${PYTHON:-python3}" -m pip download --no-deps --only-binary=:all: --dest "$here/wheels" \
    jaxtyping wadler-lindig tyro docstring-parser typeguard flatbuffers
