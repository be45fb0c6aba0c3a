"""Ranks within a column, and weights selected by rank: what FSPool needs, made fast.

`pooling` says what is computed. How it is computed fast on each platform is said here alone: this
module holds every trick that serves the hardware rather than the mathematics. The choice is made
when a program is *lowered* for a platform, not when it is traced (`lax.platform_dependent`). So a
program exported on a CPU for a GPU takes the GPU's path.

The tricks and what each gains on two AMD cores without AVX-512 (JAX 0.10.2; measurements in
experiments/benchmarks/NOTES.md). ``tests/test_ranks.py`` checks that they still work.

==========================  ======================================================  ==============
trick                       gain                                                    platforms
==========================  ======================================================  ==============
ranks by comparison         no sort, and vectorised over all other axes             n ≤ 256
`_ranks_by_packed_sort`     a sort without a comparator: 4 to 8x that of pairs      cpu, n > 256
`split_over_cores`          a sort on all cores, not on one                         cpu, n > 256
`_sortable` integer keys    one comparison for a pair where floats need two         cpu
padded rows                 columns a power of two apart no longer share cache sets cpu
`computed_once` (fence)     the ranks are not computed again for every use          cpu
flat unsigned gather        no arithmetic for negative indices; 2x                  all, n > 16
`by_columns`                sums along rows that vectorise                          cpu
==========================  ======================================================  ==============
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._cores import split_over_cores
from msdspn_jax._varying import vary_like

RANK_METHODS = ("auto", "compare", "sort")

# Up to this many elements, counting by comparison beats sorting. On CPU this was measured;
# elsewhere it is a guess.
_COMPARE_UP_TO = 256
# Up to this many, the comparisons are unrolled into one kernel.
_UNROLL_UP_TO = 64
# Up to this many, a column fits the cache as it is, and selecting beats gathering.
_SELECT_UP_TO = 16
# Up to this many rows, a reduction is written out as one elementwise kernel.
_WRITE_OUT_UP_TO = 128
_CACHE_LINE_BYTES = 64


def stable_ranks(
    features: Float[AnyArray, "*batch n c"], *, method: str = "auto"
) -> Int[Array, "*batch n c"]:
    """Rank of every entry within its feature column: 0 for the smallest, ties in order of index.

    All entries of a column get distinct ranks, equal ones too. Otherwise tied elements would share
    one weight, and another weight would not be used. −0 and 0 are equal. In a column that holds a
    NaN, ranks lie in 0 … n − 1 but may repeat. Ranks carry no gradient.

    Args:
        features: any floating dtype; axis -2 is the set.
        method: "compare" counts smaller entries, n² cheap comparisons that vectorise over all other
            axes; "sort" sorts, n log n; "auto" chooses by n.

    Example:
        >>> stable_ranks(jnp.array([[3.0], [1.0], [3.0]])).ravel().tolist()
        [1, 0, 2]
    """
    _check.require_choice("method", method, RANK_METHODS)
    if jnp.ndim(features) < 2:
        raise ValueError(
            f"features: expected at least 2 axes [*batch n c], got shape {jnp.shape(features)}"
        )
    _check.require_floating("features", features)
    features = lax.stop_gradient(jnp.asarray(features))
    if 0 in features.shape:
        return jnp.zeros(features.shape, jnp.int32)
    if method == "auto":
        method = "compare" if features.shape[-2] <= _COMPARE_UP_TO else "sort"
    if method == "compare":
        on_cpu, elsewhere = _ranks_by_keys, _ranks_by_comparison
    else:
        on_cpu, elsewhere = _ranks_by_packed_sort, _ranks_by_sorting
    return _ranks(features, on_cpu, elsewhere)


# Compiled as one piece outside of `jax.jit` too, where the ways below are functions of a moment.
@functools.partial(jax.jit, static_argnames=("on_cpu", "elsewhere"), inline=True)
def _ranks(features, on_cpu, elsewhere):
    return lax.platform_dependent(features, cpu=on_cpu, default=elsewhere)


def select_by_rank(
    weight: Float[AnyArray, "*#batch n c"], ranks: Int[AnyArray, "*batch n c"]
) -> Float[Array, "*batch n c"]:
    """`weight[..., ranks[..., i, c], c]`: for every entry the weight of its rank.

    Linear in the weight. For small n the rank is compared with every position, which vectorises; a
    gather would run entry by entry. For larger n a gather is faster, and in the backward pass its
    transpose, a scatter, is faster by far.
    """
    n, c = weight.shape[-2:]
    if n <= _SELECT_UP_TO:
        selected = jnp.zeros(ranks.shape, weight.dtype)
        for k in range(n):
            selected = jnp.where(ranks == k, weight[..., k : k + 1, :], selected)
        return selected
    if weight.ndim == 2:
        # One flat index: the form of gather and scatter that XLA compiles best. Unsigned, so that
        # no negative index is provided for, which about doubles the speed.
        index = ranks * c + lax.broadcasted_iota(jnp.int32, ranks.shape, ranks.ndim - 1)
        return jnp.ravel(weight).at[index.astype(jnp.uint32)].get(mode="promise_in_bounds")
    batch = jnp.broadcast_shapes(weight.shape[:-2], ranks.shape[:-2])
    weight = jnp.broadcast_to(weight, (*batch, *weight.shape[-2:]))
    return jnp.take_along_axis(weight, ranks, axis=-2)


def _ranks_by_sorting(features: Float[Array, "*batch n c"]) -> Int[Array, "*batch n c"]:
    order = jnp.argsort(features, axis=-2, stable=True)
    return vary_like(jnp.argsort(order, axis=-2).astype(jnp.int32), features)


def _ranks_by_comparison(features: Float[Array, "*batch n c"]) -> Int[Array, "*batch n c"]:
    """For every entry, the number of entries of its column that come before it."""

    def count(j, ranks):
        return ranks + _precedes(features, j)

    return lax.fori_loop(
        0, features.shape[-2], count, _zeros(features), unroll=features.shape[-2] <= _UNROLL_UP_TO
    )


def _precedes(features: Float[Array, "*batch n c"], j: int | Array) -> Int[Array, "*batch n c"]:
    """1 where x_j comes before x_i in its column: where it is smaller, or equal and earlier."""
    index = lax.broadcasted_iota(jnp.int32, (features.shape[-2], 1), 0)
    other = lax.dynamic_slice_in_dim(features, j, 1, axis=-2)
    return jnp.where(j < index, other <= features, other < features).astype(jnp.int32)


# --- CPU ---


def _ranks_by_keys(features: Float[Array, "*batch n c"]) -> Int[Array, "*batch n c"]:
    """What `_ranks_by_comparison` counts, arranged for a CPU.

    Entries become integers of the same order. For integers "smaller, or equal and earlier" is one
    comparison, key_j < key_i + [j < i]. The entries of a column are often a power of two of bytes
    apart and then fall into a few sets of the first-level cache. Padding each row by one cache line
    spreads them.
    """
    n, c = features.shape[-2:]
    if not _SELECT_UP_TO < n <= _UNROLL_UP_TO or features.dtype == jnp.float64:
        return _ranks_by_comparison(features)
    keys = _sortable(features.astype(jnp.float32))
    padding = [(0, 0)] * (features.ndim - 1) + [(0, _CACHE_LINE_BYTES // keys.dtype.itemsize)]
    padded = lax.optimization_barrier(jnp.pad(keys, padding))
    keys = padded[..., :c]
    index = lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    ranks = _zeros(features)
    for j in range(n):
        earlier = (j < index).astype(jnp.int32)
        ranks = ranks + (padded[..., j : j + 1, :c] < keys + earlier).astype(jnp.int32)
    return computed_once(ranks, lambda rank: rank < 0)


def _ranks_by_packed_sort(features: Float[Array, "*batch n c"]) -> Int[Array, "*batch n c"]:
    """What `_ranks_by_sorting` finds, for a CPU.

    XLA sorts pairs, and floats, by calling a comparator for every comparison. Plain integers it
    hands to the standard library. So entry and index are packed into one 64-bit integer, which
    also settles ties in order of index.
    """
    *batch, n, c = features.shape
    if features.dtype == jnp.float64 or features.size >= 2**32:
        return _ranks_by_sorting(features)
    keys = _sortable(features.astype(jnp.float32)).swapaxes(-1, -2).reshape(-1, n)
    return split_over_cores(_ranks_of_rows, keys).reshape(*batch, c, n).swapaxes(-1, -2)


def _ranks_of_rows(keys: Int[Array, "rows n"]) -> Int[Array, "rows n"]:
    n = keys.shape[1]
    index = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    with jax.enable_x64(True):
        high = lax.shift_left(keys.astype(jnp.int64), jnp.full(keys.shape, 32, jnp.int64))
        order = lax.sort(high | index.astype(jnp.int64), is_stable=False).astype(jnp.uint32)
    row = lax.broadcasted_iota(jnp.uint32, keys.shape, 0)
    where = jnp.ravel(row * jnp.uint32(n) + order)
    ranks = jnp.ravel(jnp.zeros_like(keys))
    ranks = ranks.at[where].set(index.ravel(), mode="promise_in_bounds", unique_indices=True)
    return ranks.reshape(keys.shape)


def _sortable(values: Float[Array, "*any"]) -> Int[Array, "*any"]:
    """Integers in the order of the floats: of negative ones, all bits but the sign are flipped."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def computed_once(values: jax.Array, impossible: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The same values, computed in full before anything that uses them. For a CPU.

    XLA merges chains of elementwise operations into their consumers. Where a chain is long and its
    result is read by a gather, or once for every entry of a row, the merged kernel does not
    vectorise or repeats the chain (up to 25 times slower). `lax.optimization_barrier` does not stop
    XLA from this. A loop does, which would run only if something impossible were true of the first
    value.

    Not for values that a reverse derivative passes through: a `while_loop` has none.

    Args:
        values: what to compute once.
        impossible: a condition that no value meets, NaN included. XLA must not be able to tell.
    """
    if values.size == 0:
        return values
    return lax.while_loop(lambda v: impossible(jnp.ravel(v)[0]), jnp.zeros_like, values)


def by_columns(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    columns: Float[Array, "d rows"],
    function: Callable[[jax.Array], jax.Array] = lambda column: column,
) -> Float[Array, " rows"]:
    """`combine` (``jnp.add``, ``jnp.maximum``) of ``function`` of all columns, rows side by side.

    Sums and maxima along the last axis do not vectorise on a CPU. They do where the columns are
    combined by elementwise operations on all rows at once, in one kernel.
    """
    if columns.shape[0] <= _WRITE_OUT_UP_TO:
        # By index: iterating over a concrete array would slice it in chunks, and trace the slices.
        each = [function(columns[i]) for i in range(columns.shape[0])]
        return functools.reduce(combine, each)
    if combine is jnp.add:
        return jnp.sum(function(columns), axis=0)
    return jnp.max(function(columns), axis=0)


def _zeros(features: jax.Array) -> jax.Array:
    # Made from the features, so that under shard_map it varies over the same mesh axes.
    return jnp.zeros_like(features, dtype=jnp.int32)
