"""Energies over sets: E(Y; context, θ), one number per set, to be minimised over Y.

An energy is any function ``(params, sets, context) -> [batch]`` whose value for one set depends on
that set and its context alone. `latent_energy` builds the one of the paper from a set encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray

Params = Any
"""A pytree of arrays θ, which may be differentiated."""
Energy = Callable[[Params, jax.Array, Any], jax.Array]
"""``(params, sets [batch, n, d], context) -> [batch]``; see `latent_energy`."""


class Context(NamedTuple):
    """What a set is decoded from. The first axis of every array is the batch.

    Floating-point arrays may be differentiated.

    Attributes:
        latent: z, the vector that the set's encoding shall match.
        initial_sets: Y₀, to which the proximity term ties the set; None without that term.
        inputs: X, an input multiset that the encoder sees beside Y; None if unconditioned.
        mask: True for the elements that are there; None if all are.
    """

    latent: Float[AnyArray, "batch latent"]
    initial_sets: Float[AnyArray, "batch n d"] | None = None
    inputs: Float[AnyArray, "batch n k"] | None = None
    mask: Bool[AnyArray, "batch n"] | None = None


@dataclass(frozen=True)
class LatentEnergy:
    """What `latent_energy` returns: a function that compares equal where its parts are equal.

    So `minimise` finds the program again that it compiled for an equal energy.
    """

    encode: Callable[..., jax.Array]
    proximity: float = 0.0

    def __call__(
        self, params: Params, sets: Float[AnyArray, "batch n d"], context: Context
    ) -> Float[Array, " batch"]:
        """E(Y; z, θ) for every set."""
        if not hasattr(context, "latent"):
            raise TypeError(
                "context: expected a Context, such as Context(latent=z), got arrays of shape "
                f"{jax.tree.map(jnp.shape, context)}"
            )
        inputs = sets
        if context.inputs is not None:
            if context.inputs.shape[:-1] != sets.shape[:-1]:
                raise ValueError(
                    f"context.inputs: expected [batch, n] = {sets.shape[:-1]} as in sets, "
                    f"got shape {context.inputs.shape}"
                )
            inputs = jnp.concatenate([sets, context.inputs.astype(sets.dtype)], axis=-1)
        mask = ()
        if context.mask is not None:
            _check.require_mask("context.mask", context.mask, sets.shape[:2], "batch n")
            mask = (context.mask,)
        encoding = self.encode(params, inputs, *mask)
        if jnp.ndim(encoding) != 2 or encoding.shape[0] != sets.shape[0]:
            raise ValueError(
                f"encode: expected a function of sets {inputs.shape} that returns [batch, latent], "
                f"got {getattr(encoding, 'shape', encoding)}"
            )
        _check.require_shape("context.latent", context.latent, encoding.shape, "batch latent")
        if context.initial_sets is not None:
            _check.require_shape(
                "context.initial_sets", context.initial_sets, sets.shape, "batch n d"
            )
        value = 0.5 * jnp.mean(jnp.square(encoding - context.latent), axis=-1)
        if self.proximity:
            if context.initial_sets is None:
                raise ValueError(
                    "context.initial_sets: expected an array because proximity > 0, got None"
                )
            distance = sets - context.initial_sets
            if context.mask is None:
                mean = jnp.mean(jnp.square(distance), axis=(-2, -1))
            else:
                distance = jnp.where(context.mask[..., None], distance, 0)
                size = jnp.maximum(jnp.sum(context.mask, -1), 1) * sets.shape[-1]
                # The sum of squares of 16 bits may leave the range of float16.
                squares = jnp.square(distance).astype(jnp.promote_types(sets.dtype, jnp.float32))
                mean = (jnp.sum(squares, axis=(-2, -1)) / size).astype(sets.dtype)
            value = value + self.proximity * 0.5 * mean
        return value


def latent_energy(encode: Callable[..., jax.Array], *, proximity: float = 0.0) -> LatentEnergy:
    """E(Y; z, θ) = ½ mean_c (g(Y; θ) − z)² + proximity · ½ mean (Y − Y₀)².

    Equation (1) of the package (paper, section 3). The paper's experiments with a learned initial
    set use proximity 0.1. Both terms are means, not sums: over the features of the latent, and over
    the n · d entries of the set. Where the context holds a mask, the second is a mean over the
    entries of the present elements, so that padding changes nothing.

    Args:
        encode: the set encoder g, called as ``encode(params, sets)``, or as ``encode(params, sets,
            mask)`` where the context holds a mask; for example `SetEncoder(...).apply`. Where the
            context holds inputs X, the sets are [Y, X], concatenated for each element, Y first.
        proximity: weight of the pull towards the initial set; the context must then hold it.

    Returns:
        An energy ``(params, sets [batch, n, d], context: Context) -> [batch]``.

    Example:
        >>> energy = latent_energy(lambda params, sets: sets.sum(1))
        >>> energy({}, jnp.ones((1, 2, 3)), Context(latent=jnp.zeros((1, 3)))).tolist()
        [2.0]
    """
    if not callable(encode) or (hasattr(encode, "init") and hasattr(encode, "apply")):
        raise TypeError(
            "encode: expected a function (params, sets) -> [batch, latent], such as the apply of a "
            f"flax module, got {encode!r:.60}"
        )
    _check.require_nonnegative("proximity", proximity)
    return LatentEnergy(encode, proximity)
