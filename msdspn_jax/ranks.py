"""Keeping XLA from computing the same thing more than once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def computed_once(values: jax.Array, impossible: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The same values, computed in full before anything that uses them.

    XLA merges chains of elementwise operations into their consumers. Where a chain is long and its
    result is read by a gather, or once for every entry of a row, the merged kernel does not
    vectorise or repeats the chain (up to 25 times slower: experiments/benchmarks). It sees through
    `lax.optimization_barrier`, but not through a loop that would run only if something impossible
    were true of the first value.

    Not for values that a reverse derivative passes through, which no `while_loop` has.

    Args:
        values: what to compute once.
        impossible: a condition that no value meets, NaN included; XLA must not know that.
    """
    return lax.while_loop(lambda v: impossible(jnp.ravel(v)[0]), jnp.zeros_like, values)
