"""The set encoder g: an MLP on every element, then a pool over the set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Bool, Float

from msdspn_jax import _check, pooling
from msdspn_jax._check import AnyArray

DotGeneral = Callable[..., jax.Array]
POOLS = ("fspool", "continuous_fspool", "sum", "mean")


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
    """Initialiser uniform(±fan_in^(−1/2)), for the kernel and the bias of a linear layer."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, fan_in: int, **kwargs) -> nn.Dense:
    """A linear layer initialised as in the authors' implementation."""
    init = uniform_fan_in(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init, **kwargs)


class _Linear(nn.Module):
    """The product and the bias of a linear layer, with the parameters of `dense`, not yet added."""

    features: int
    fan_in: int
    dtype: jnp.dtype | None = None
    dot_general: DotGeneral | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = uniform_fan_in(self.fan_in)
        kernel = self.param("kernel", init, (self.fan_in, self.features))
        bias = self.param("bias", init, (self.features,))
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        dot_general, last = self.dot_general or lax.dot_general, inputs.ndim - 1
        return dot_general(inputs, kernel, (((last,), (0,)), ((), ()))), bias


class SetEncoder(nn.Module):
    """g(Y): Linear, ReLU, Linear on every element, then a pool over the elements.

    With ``pool="fspool"`` its gradient is exclusively multiset-equivariant (paper, section 3.1);
    with "sum" and "mean" merely set-equivariant. With ``relational=True`` the MLP sees all n²
    ordered pairs [y_i, y_j] and the pool runs over the n² pair features (the relation-network
    variant of the paper, section 4.3).

    Attributes:
        hidden_dim: width of the hidden layer.
        latent_dim: width of the output.
        set_size: n; the number of positions in FSPool's weight table (n² if relational).
        pool: "fspool" (one weight per position, for sets of n or, with a mask, fewer elements),
            "continuous_fspool" (weights piecewise linear in the relative position, for sets of
            varying size), "sum" or "mean".
        relational: encode all ordered pairs in place of the elements.
        num_knots: knots of the piecewise-linear weights of "continuous_fspool".
        rank_method: how FSPool finds ranks, see `stable_ranks`.
        dtype: dtype of the computation; parameters stay as they are.
        dot_general: how linear layers multiply, by default `jax.lax.dot_general`; for example
            `bfloat16_dot_general`.

    Shapes: sets [batch, n, d] and mask [batch, n] → [batch, latent_dim].

    Example:
        >>> encoder, sets = SetEncoder(hidden_dim=8, latent_dim=6, set_size=5), jnp.ones((1, 5, 4))
        >>> encoder.apply(encoder.init(jax.random.key(0), sets), sets).shape
        (1, 6)
    """

    hidden_dim: int
    latent_dim: int
    set_size: int
    pool: str = "fspool"
    relational: bool = False
    num_knots: int = 20
    rank_method: str = "auto"
    dtype: jnp.dtype | None = None
    dot_general: DotGeneral | None = None

    @nn.compact
    def __call__(
        self, sets: Float[AnyArray, "batch n d"], mask: Bool[AnyArray, "batch n"] | None = None
    ) -> Float[Array, "batch latent"]:
        _check.require_choice("pool", self.pool, POOLS)
        _check.require_rank("sets", sets, 3, "batch n d")
        _check.require_nonempty("sets", sets, "batch n d")
        _check.require_floating("sets", sets)
        if self.pool == "fspool" and sets.shape[1] != self.set_size:
            raise ValueError(
                f"sets: expected n = set_size = {self.set_size} elements, got shape {sets.shape}"
            )
        if mask is not None:
            _check.require_mask("mask", mask, sets.shape[:2], "batch n")
            # Whatever stands for an absent element, NaN included, has no part in any gradient.
            sets = jnp.where(mask[..., None], sets, 0)
        if self.pool == "continuous_fspool":
            _check.require_positive("num_knots", self.num_knots)

        how: Any = {"dtype": self.dtype, "dot_general": self.dot_general}
        if self.relational:
            hidden, mask = self._pairs(sets, mask)
        else:
            hidden = dense(self.hidden_dim, sets.shape[-1], name="hidden", **how)(sets)
        output = _Linear(self.latent_dim, self.hidden_dim, name="output", **how)
        features, bias = output(nn.relu(hidden))
        return self._pool(features, bias, mask)

    def _pairs(self, sets, mask):
        """Hidden features of all pairs: [y_i, y_j] K = y_i K₁ + y_j K₂, n rows each, not n²."""
        batch, n, d = sets.shape
        init = uniform_fan_in(2 * d)
        kernel = self.param("pair_kernel", init, (2 * d, self.hidden_dim))
        bias = self.param("pair_bias", init, (self.hidden_dim,))
        sets, kernel, bias = promote_dtype(sets, kernel, bias, dtype=self.dtype)
        first, second = sets @ kernel[:d], sets @ kernel[d:]
        pairs = first[:, :, None] + second[:, None, :] + bias
        if mask is not None:
            mask = (mask[:, :, None] & mask[:, None, :]).reshape(batch, n * n)
        return pairs.reshape(batch, n * n, self.hidden_dim), mask

    def _pool(self, features, bias, mask):
        # What all elements share leaves their ranks alone and comes out of the pool as a multiple.
        # Added there, it costs no pass over the features, the widest arrays there are.
        if self.pool == "sum":
            if mask is None:
                return pooling.sum_pool(features) + features.shape[-2] * bias
            return pooling.sum_pool(features + bias, mask=mask)
        if self.pool == "mean":
            if mask is None:
                return pooling.mean_pool(features) + bias
            return pooling.mean_pool(features + bias, mask=mask)
        fixed = self.pool == "fspool"
        positions = (self.set_size**2 if self.relational else self.set_size) if fixed else 0
        rows = positions if fixed else self.num_knots
        init = nn.initializers.normal(rows**-0.5)
        weight = self.param("pool_weight", init, (rows, self.latent_dim)).astype(features.dtype)
        if fixed and mask is None:
            return pooling.fspool(features, weight, method=self.rank_method) + bias * weight.sum(0)
        if mask is None:
            mask = jnp.ones(features.shape[:-1], bool)
        if not fixed:
            weight = pooling.continuous_weight(weight, mask)
        return pooling.fspool(features + bias, weight, mask=mask, method=self.rank_method)
