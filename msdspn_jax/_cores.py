"""All cores for what XLA's CPU backend runs on one: sorts, and convolutions."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

# More pieces than that were never measured.
_MOST = 16


def num_cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split_over_cores(function: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """``function(rows)``, row by row independent, in one piece a core.

    XLA spreads products and elementwise kernels over all cores, but runs a sort or a loop on one.
    It does run independent operations side by side, and pieces of a sort are that.
    """
    pieces = min(num_cores(), _MOST)
    # A batch of unknown size, as in `jax.export`, has no pieces of known size.
    if not isinstance(rows.shape[0], int) or pieces == 1:
        return function(rows)
    return jnp.concatenate([function(x) for x in jnp.array_split(rows, pieces) if x.shape[0]])


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """Options of `jax.jit` for programs with convolutions; None where there are none.

    On a CPU, XLA gives convolutions to YNNPACK, which runs those of 32 or 64 channels on one core,
    and wider ones at three quarters of what Eigen reaches on two. Products and sums stay with it,
    products one by one: merged with what is around them, those of bfloat16 take three times as
    long, and the others no less than now.
    """
    if jax.default_backend() != "cpu":
        return None
    kept = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options = {"xla_cpu_experimental_ynn_fusion_type": kept}
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # Another version of XLA, which knows no such option.
        return None
    return options
