"""From the features of a set to one vector: FSPool, sum and mean.

FSPool (featurewise sort pooling; Zhang, Hare and Prügel-Bennett, ICLR 2020, arXiv 1906.02795) sorts
every feature column and takes a dot product with learned weights, one per position:

    pooled[c] = Σ_k sorted(h[:, c])[k] · w[k, c]  =  Σ_i h[i, c] · w[rank(i, c), c].

The right-hand side is what this module computes: ranks and weights come from `msdspn_jax.ranks`,
and the sorted array is never built. Ranks are piecewise constant in h, and the rest is *linear* in
h and in w. So ordinary automatic differentiation is exact, to every order and in both modes:
∂pooled[c]/∂h[i, c] = w[rank(i, c), c]. On this gradient DSPN rests. It is multiset-equivariant, and
not set-equivariant: two equal elements have distinct ranks and so get distinct gradients.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.ranks import select_by_rank, stable_ranks


def fspool(
    features: Float[AnyArray, "*batch n c"],
    weight: Float[AnyArray, "*#batch n c"],
    *,
    mask: Bool[AnyArray, "*batch n"] | None = None,
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

    Example:
        >>> fspool(jnp.array([[3.0], [1.0]]), jnp.array([[10.0], [1.0]])).tolist()
        [13.0]
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
    knots: Float[AnyArray, "k c"], mask: Bool[AnyArray, "*batch n"]
) -> Float[Array, "*batch n c"]:
    """FSPool weights for sets of any size: a piecewise-linear function of the relative position.

    Position r of a set of m elements lies at r / (m − 1) ∈ [0, 1] (at 0 for m = 1), where the
    function through k equally spaced knots is read off (FSPool paper, section 2.2).

    Returns:
        A weight table for every set, to be passed to `fspool` together with the same mask.

    Example:
        >>> mask = jnp.array([True, True, True, False])
        >>> continuous_weight(jnp.array([[0.0], [1.0]]), mask).ravel()[:3].tolist()
        [0.0, 0.5, 1.0]
    """
    _check.require_rank("knots", knots, 2, "k c")
    _check.require_nonempty("knots", knots, "k c")
    _check.require_floating("knots", knots)
    _check.require_mask("mask", mask, jnp.shape(mask), "*batch n")
    k, n = knots.shape[0], mask.shape[-1]
    size = jnp.sum(mask, -1, keepdims=True)
    # Positions of 16 bits would run together in large sets.
    wide = jnp.promote_types(knots.dtype, jnp.float32)
    position = jnp.arange(n) / jnp.maximum(size - 1, 1).astype(wide)
    distance = position[..., None] * (k - 1) - jnp.arange(k)
    hat = jnp.maximum(1 - jnp.abs(distance), 0).astype(knots.dtype)
    return hat @ knots


def sum_pool(
    features: Float[AnyArray, "*batch n c"], *, mask: Bool[AnyArray, "*batch n"] | None = None
) -> Float[Array, "*batch c"]:
    """Sum over the (present) elements of the set. Its gradient cannot tell elements apart.

    Example:
        >>> sum_pool(jnp.ones((3, 2)), mask=jnp.array([True, True, False])).tolist()
        [2.0, 2.0]
    """
    _check_features(features, mask)
    if mask is not None:
        features = jnp.where(mask[..., None], features, 0)
    return jnp.sum(features, -2)


def mean_pool(
    features: Float[AnyArray, "*batch n c"], *, mask: Bool[AnyArray, "*batch n"] | None = None
) -> Float[Array, "*batch c"]:
    """Mean over the (present) elements of the set; zero for a set with none.

    Example:
        >>> mean_pool(jnp.ones((3, 2)), mask=jnp.array([True, True, False])).tolist()
        [1.0, 1.0]
    """
    _check_features(features, mask)
    if mask is None:
        return jnp.mean(features, -2)
    # The sum of many numbers of 16 bits may be too large for their type, where the mean is not.
    wide = jnp.promote_types(features.dtype, jnp.float32)
    total = jnp.sum(jnp.where(mask[..., None], features, 0), -2, dtype=wide)
    size = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return (total / size.astype(wide)).astype(features.dtype)


def _check_features(features: AnyArray, mask: AnyArray | None) -> None:
    shape = jnp.shape(features)
    if len(shape) < 2:
        raise ValueError(f"features: expected at least 2 axes [*batch n c], got shape {shape}")
    _check.require_nonempty("features", features, "*batch n c")
    _check.require_floating("features", features)
    if mask is not None:
        _check.require_mask("mask", mask, shape[:-1], "*batch n")
