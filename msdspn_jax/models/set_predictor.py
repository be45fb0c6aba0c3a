"""Set prediction by energy minimisation: DSPN and iDSPN, which differ in `gradient` alone."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from msdspn_jax import _check
from msdspn_jax.adjoints import Gradient, Projection, identity, unrolled
from msdspn_jax.descent import Minimum, minimise
from msdspn_jax.energy import Context, latent_energy
from msdspn_jax.set_encoder import SetEncoder

INITIAL_SETS = ("learned", "random")
INITIAL_SCALE = 0.1
"""Learned and random initial sets are drawn as 0.1 · N(0, 1)."""


def random_initial_sets(
    keys: Key[Array, " batch"], set_size: int, set_dim: int
) -> Float[Array, "batch n d"]:
    """0.1 · N(0, 1) for every set from a key of its own, so that batches can be split anywhere."""

    def draw(key):
        return INITIAL_SCALE * jax.random.normal(key, (set_size, set_dim))

    return jax.vmap(draw)(keys)


class SetDecoder(nn.Module):
    """From a latent vector to the set that minimises E(Y; z, θ) (paper, section 3).

    Attributes:
        set_size: n.
        set_dim: d.
        hidden_dim: width of the energy's set encoder.
        num_steps: inner steps; `__call__` can override them, at evaluation for instance.
        learning_rate: inner step size.
        momentum: inner momentum, of Nesterov's kind where it is not zero.
        optimizer: an optax transformation in place of the two above.
        max_grad_norm: per-set clipping of the inner gradient; None for none.
        gradient: how the minimum is differentiated: `identity()` is iDSPN, `unrolled()` is DSPN.
        initial_set: "learned" (one set, shared by all), or "random" (drawn for every set).
        proximity: weight of the energy's pull towards the initial set.
        pool: see `SetEncoder`.
        relational: see `SetEncoder`.
        projection: onto the feasible sets, e.g. `projections.simplex`.
        rank_method: see `SetEncoder`.
    """

    set_size: int
    set_dim: int
    hidden_dim: int = 512
    num_steps: int = 20
    learning_rate: float = 1.0
    momentum: float = 0.9
    optimizer: optax.GradientTransformation | None = None
    max_grad_norm: float | None = None
    gradient: Gradient = identity()
    initial_set: str = "learned"
    proximity: float = 0.1
    pool: str = "fspool"
    relational: bool = False
    projection: Projection | None = None
    rank_method: str = "auto"

    @nn.compact
    def __call__(
        self,
        latent: Float[Array, "batch latent"],
        *,
        inputs: Float[Array, "batch n k"] | None = None,
        mask: Bool[Array, "batch n"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        initial_sets: Float[Array, "batch n d"] | None = None,
        num_steps: int | None = None,
        tolerance: float | None = None,
        return_trajectory: bool = False,
    ) -> Minimum:
        """Decode.

        Args:
            latent: z.
            inputs: X, to condition the energy on an input multiset.
            mask: elements that are there, for sets of varying size.
            keys: one key for every set; needed for random initial sets and not otherwise.
            initial_sets: start here instead.
            num_steps: inner steps, in place of the attribute.
            tolerance: see `minimise`.
            return_trajectory: see `minimise`.
        """
        _check.require_rank("latent", latent, 2, "batch latent")
        _check.require_choice("initial_set", self.initial_set, INITIAL_SETS)
        batch, n, d = latent.shape[0], self.set_size, self.set_dim
        start = self._start(batch, keys, initial_sets).astype(latent.dtype)

        encoder = SetEncoder(
            self.hidden_dim,
            latent.shape[-1],
            n,
            pool=self.pool,
            relational=self.relational,
            rank_method=self.rank_method,
            parent=None,
        )
        width = d + (0 if inputs is None else inputs.shape[-1])
        params = self.param(
            "energy_encoder", lambda key: encoder.init(key, jnp.zeros((1, n, width)))["params"]
        )

        def encode(params, *args) -> jax.Array:
            return encoder.apply({"params": params}, *args)  # type: ignore[return-value]

        return minimise(
            latent_energy(encode, proximity=self.proximity),
            params,
            Context(latent, start if self.proximity else None, inputs, mask),
            start,
            optimizer=self._optimizer(),
            num_steps=self.num_steps if num_steps is None else num_steps,
            projection=self.projection,
            max_grad_norm=self.max_grad_norm,
            gradient=self.gradient,
            tolerance=tolerance,
            return_trajectory=return_trajectory,
        )

    def _optimizer(self) -> optax.GradientTransformation:
        if self.optimizer is not None:
            return self.optimizer
        momentum = self.momentum or None
        return optax.sgd(self.learning_rate, momentum=momentum, nesterov=momentum is not None)

    def _start(self, batch, keys, given):
        shape = (self.set_size, self.set_dim)
        learned = None
        if self.initial_set == "learned":
            learned = self.param("initial_set", nn.initializers.normal(INITIAL_SCALE), shape)
        if given is not None:
            _check.require_shape("initial_sets", given, (batch, *shape), "batch n d")
            return given
        if learned is not None:
            return jnp.broadcast_to(learned, (batch, *shape))
        if keys is None:
            if self.is_initializing():
                return jnp.zeros((batch, *shape))
            raise ValueError(
                "keys: expected one key for every set because initial_set='random', got None"
            )
        if jnp.shape(keys)[:1] != (batch,):
            raise ValueError(f"keys: expected {batch} keys, one a set, got shape {keys.shape}")
        return random_initial_sets(keys, *shape)


class SetPredictor(nn.Module):
    """Encoder, then `SetDecoder`: from any input to a set.

    Attributes:
        encoder: any module from inputs to latent [batch, latent]: a `SetEncoder`, an image network.
        decoder: from the latent to a set.
        condition_on_inputs: let the energy see the input multiset X beside Y (class-specific
            numbering, paper section 4.1).
    """

    encoder: nn.Module
    decoder: SetDecoder
    condition_on_inputs: bool = False

    def __call__(
        self,
        inputs: Any,
        *,
        mask: Bool[Array, "batch n"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        **decoder_options: Any,
    ) -> Minimum:
        """Predict a set for every input; `decoder_options` as in `SetDecoder.__call__`.

        A mask goes to the encoder, as the set of elements that the input holds.
        """
        latent = self.encoder(inputs) if mask is None else self.encoder(inputs, mask)
        condition = inputs if self.condition_on_inputs else None
        return self.decoder(latent, inputs=condition, keys=keys, **decoder_options)


def set_autoencoder(
    *,
    set_size: int,
    set_dim: int,
    hidden_dim: int = 512,
    latent_dim: int = 512,
    input_pool: str = "fspool",
    **decoder_options: Any,
) -> SetPredictor:
    """A `SetPredictor` from sets to sets of the same shape (paper, section 4.2).

    Args:
        set_size: n.
        set_dim: d.
        hidden_dim: width of both set encoders.
        latent_dim: width of z.
        input_pool: pool of the input encoder; the decoder's is its own option ``pool``.
        **decoder_options: attributes of `SetDecoder`, first of all ``gradient``.
    """
    return SetPredictor(
        encoder=SetEncoder(hidden_dim, latent_dim, set_size, pool=input_pool),
        decoder=SetDecoder(set_size, set_dim, hidden_dim, **decoder_options),
    )


def gradient_of(model: str) -> Gradient:
    """The one argument in which the two models of the paper differ: "idspn" or "dspn"."""
    return _check.lookup("model", model, {"idspn": identity, "dspn": unrolled})()
