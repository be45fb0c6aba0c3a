"""From the features of a set to one vector: FSPool, sum and mean.

FSPool (featurewise sort pooling; Zhang, Hare and Prügel-Bennett, ICLR 2020, arXiv 1906.02795) sorts
every feature column and takes a dot product with learned weights, one per position:

    pooled[c] = Σ_k sorted(h[:, c])[k] · w[k, c]  =  Σ_i h[i, c] · w[rank(i, c), c].

The right-hand side is what this module computes. It never builds the sorted array: the ranks are
found by comparing, the weights are selected by rank, and since ranks are piecewise constant in h
the rest is *linear* in h and in w. Ordinary automatic differentiation is therefore exact, to every
order and in both modes: ∂pooled[c]/∂h[i, c] = w[rank(i, c), c], the exclusively
multiset-equivariant gradient on which DSPN rests (two equal elements have distinct ranks, hence
distinct gradients).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax import _check
from msdspn_jax.ranks import computed_once

RANK_METHODS = ("auto", "compare", "sort")

# Up to this many elements, counting by comparison beats sorting. On CPU that is measured, and 1024
# the largest size tried (experiments/benchmarks); elsewhere it is a guess.
_COMPARE_UP_TO = {"cpu": 1024}
_COMPARE_UP_TO_ELSEWHERE = 256
# Up to this many, the comparisons are unrolled into one kernel.
_UNROLL_UP_TO = 64
# Up to this many, a column fits the cache as it is, and selecting beats gathering.
_SELECT_UP_TO = 16
_CACHE_LINE_BYTES = 64


def stable_ranks(
    features: Float[Array, "*batch n c"], *, method: str = "auto"
) -> Int[Array, "*batch n c"]:
    """Rank of every entry within its feature column: 0 for the smallest, ties in order of index.

    Distinct entries of one column always get distinct ranks, equal ones too; without that, tied
    elements would share a weight and FSPool would lose mass. Ranks carry no gradient.

    Args:
        features: any floating dtype; axis -2 is the set.
        method: "compare" counts smaller entries, n² cheap comparisons that vectorise over all other
            axes; "sort" applies argsort twice, n log n; "auto" chooses by n and backend.
    """
    _check.require_choice("method", method, RANK_METHODS)
    if jnp.ndim(features) < 2:
        raise ValueError(
            f"features: expected at least 2 axes [*batch n c], got shape {jnp.shape(features)}"
        )
    features = lax.stop_gradient(features)
    n = features.shape[-2]
    limit = _COMPARE_UP_TO.get(jax.default_backend(), _COMPARE_UP_TO_ELSEWHERE)
    if method == "sort" or (method == "auto" and n > limit):
        order = jnp.argsort(features, axis=-2, stable=True)
        return jnp.argsort(order, axis=-2).astype(jnp.int32)

    if n > _UNROLL_UP_TO:
        return lax.fori_loop(
            0,
            n,
            lambda j, ranks: ranks + _precedes(features, j),
            jnp.zeros(features.shape, jnp.int32),
        )
    if n > _SELECT_UP_TO and jax.default_backend() == "cpu" and features.dtype != jnp.float64:
        return _ranks_of_keys(features)
    ranks = jnp.zeros(features.shape, jnp.int32)
    for j in range(n):
        ranks = ranks + _precedes(features, j)
    return ranks


def _precedes(features: Float[Array, "*batch n c"], j: int | Array) -> Int[Array, "*batch n c"]:
    """1 where x_j comes before x_i in its column: where it is smaller, or equal and earlier."""
    index = lax.broadcasted_iota(jnp.int32, (features.shape[-2], 1), 0)
    other = lax.dynamic_slice_in_dim(features, j, 1, axis=-2)
    return jnp.where(j < index, other <= features, other < features).astype(jnp.int32)


def _ranks_of_keys(features: Float[Array, "*batch n c"]) -> Int[Array, "*batch n c"]:
    """Ranks as counted by `_precedes`, arranged for a CPU (experiments/benchmarks).

    Entries become integers of the same order. Then "smaller, or equal and earlier" is one
    comparison, key_j < key_i + [j < i], where floats need two and a choice between them. And
    entries of one column lie a power of two of bytes apart and so fall into a few sets of the
    first-level cache; one cache line more per row spreads them.
    """
    n, c = features.shape[-2:]
    values = features.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    padding = [(0, 0)] * (features.ndim - 1) + [(0, _CACHE_LINE_BYTES // keys.dtype.itemsize)]
    padded = lax.optimization_barrier(jnp.pad(keys, padding))
    keys = padded[..., :c]
    index = lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    ranks = jnp.zeros(keys.shape, jnp.int32)
    for j in range(n):
        earlier = (j < index).astype(jnp.int32)
        ranks = ranks + (padded[..., j : j + 1, :c] < keys + earlier).astype(jnp.int32)
    return computed_once(ranks, lambda rank: rank < 0)


def select_by_rank(
    weight: Float[Array, "*#batch n c"], ranks: Int[Array, "*batch n c"]
) -> Float[Array, "*batch n c"]:
    """`weight[..., ranks[..., i, c], c]`: for every entry the weight of its rank; linear in it.

    For small n the weight is found by comparing the rank with every position, which vectorises
    where a gather runs entry by entry; for larger n the gather is faster, and its transpose, a
    scatter, far more so.
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


def fspool(
    features: Float[Array, "*batch n c"],
    weight: Float[Array, "*#batch n c"],
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    method: str = "auto",
) -> Float[Array, "*batch c"]:
    """Featurewise sort pooling: Σ_i h[i, c] · w[rank(i, c), c].

    Args:
        features: h, the features of the elements.
        weight: w, one weight per position and feature, positions ascending; leading axes, if any,
            give every set its own weights (see `continuous_weight`).
        mask: True for the elements that are there. The m present elements take positions 0 … m − 1;
            the absent ones contribute nothing and get no gradient.
        method: how ranks are found, see `stable_ranks`.

    Raises:
        ValueError: shapes that do not fit, an empty axis, an unknown method.
    """
    _check_features(features, mask)
    if jnp.ndim(weight) < 2 or weight.shape[-2:] != features.shape[-2:]:
        raise ValueError(
            f"weight: expected [n, c] = {features.shape[-2:]} as in features, "
            f"got shape {jnp.shape(weight)}"
        )
    return _fspool(features, weight, mask, method)


# Compiled as one piece outside of `jax.jit` too, where n small comparisons would each be a call.
@functools.partial(jax.jit, static_argnames="method", inline=True)
def _fspool(features, weight, mask, method):
    if mask is None:
        return jnp.sum(features * select_by_rank(weight, stable_ranks(features, method=method)), -2)
    present = mask[..., None]
    # Absent elements rank behind all finite ones, so that the present take positions 0 … m − 1.
    ranks = stable_ranks(jnp.where(present, features, jnp.inf), method=method)
    return jnp.sum(jnp.where(present, features, 0) * select_by_rank(weight, ranks), -2)


def continuous_weight(
    knots: Float[Array, "k c"], mask: Bool[Array, "*batch n"]
) -> Float[Array, "*batch n c"]:
    """FSPool weights for sets of any size: a piecewise-linear function of the relative position.

    Position r of a set of m elements lies at r / (m − 1) ∈ [0, 1] (at 0 for m = 1), where the
    function through k equally spaced knots is read off (FSPool paper, section 2.2).

    Returns:
        A weight table for every set, to be passed to `fspool` together with the same mask.
    """
    _check.require_rank("knots", knots, 2, "k c")
    _check.require_nonempty("knots", knots, "k c")
    k, n = knots.shape[0], mask.shape[-1]
    size = jnp.sum(mask, -1, keepdims=True)
    position = jnp.arange(n) / jnp.maximum(size - 1, 1).astype(knots.dtype)
    distance = position[..., None] * (k - 1) - jnp.arange(k)
    hat = jnp.maximum(1 - jnp.abs(distance), 0).astype(knots.dtype)
    return hat @ knots


def sum_pool(
    features: Float[Array, "*batch n c"], *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch c"]:
    """Sum over the (present) elements of the set. Its gradient cannot tell elements apart."""
    _check_features(features, mask)
    if mask is not None:
        features = jnp.where(mask[..., None], features, 0)
    return jnp.sum(features, -2)


def mean_pool(
    features: Float[Array, "*batch n c"], *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch c"]:
    """Mean over the (present) elements of the set; zero for a set with none."""
    total = sum_pool(features, mask=mask)
    if mask is None:
        return total / features.shape[-2]
    return total / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1).astype(total.dtype)


def _check_features(features: jax.Array, mask: jax.Array | None) -> None:
    shape = jnp.shape(features)
    if len(shape) < 2:
        raise ValueError(f"features: expected at least 2 axes [*batch n c], got shape {shape}")
    _check.require_nonempty("features", features, "*batch n c")
    _check.require_floating("features", features)
    if mask is not None:
        _check.require_shape("mask", mask, shape[:-1], "*batch n")
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"mask: expected booleans, got dtype {jnp.result_type(mask)}")
