"""Set prediction by energy minimisation: DSPN and iDSPN, which differ in the adjoint alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.descent import Minimum, lowest, minimise
from msdspn_jax.energy import Context, Energy, LatentEnergy, latent_energy
from msdspn_jax.models.inner import DEFAULTS, Inner
from msdspn_jax.set_encoder import SetEncoder

INITIAL_SETS = ("learned", "random")
INITIAL_SCALE = 0.1
"""Learned and random initial sets are drawn as 0.1 · N(0, 1)."""


def random_initial_sets(
    keys: Key[Array, " batch"], set_size: int, set_dim: int
) -> Float[Array, "batch n d"]:
    """0.1 · N(0, 1) for every set, from a key of its own: how a batch is split changes nothing.

    Args:
        keys: one for every set.
        set_size: n.
        set_dim: d.

    Example:
        >>> random_initial_sets(jax.random.split(jax.random.key(0), 3), 4, 2).shape
        (3, 4, 2)
    """

    def draw(key):
        return INITIAL_SCALE * jax.random.normal(key, (set_size, set_dim))

    return jax.vmap(draw)(keys)


def _checked(num_starts: Any) -> int:
    if _check.is_traced(num_starts):
        raise TypeError(f"num_starts: expected a Python integer, got {num_starts!r}")
    _check.require_steps("num_starts", num_starts)
    return int(num_starts)


def _start_noise(num_starts: int, n: int, d: int) -> Float[Array, "starts 1 n d"]:
    """What is added to an initial set to have several; nothing for the first."""
    noise = jax.random.normal(jax.random.key(0), (num_starts - 1, 1, n, d))
    return jnp.pad(noise, ((1, 0), (0, 0), (0, 0), (0, 0)))


def _by_start(minima: Minimum, num_starts: int) -> Minimum:
    """With the axis of starts, which is the first part of the batch, before all others."""

    def of_batch(x):
        return x.reshape(num_starts, -1, *x.shape[1:])

    def of_trajectory(x):
        return jnp.moveaxis(x.reshape(len(x), num_starts, -1, *x.shape[2:]), 1, 0)

    trajectory = jax.tree.map(of_trajectory, minima.trajectory)
    found = jax.tree.map(of_batch, minima._replace(trajectory=None))
    return found._replace(trajectory=trajectory)


class _Encode(NamedTuple):
    """The encoder g as a function (params, sets); equal where the modules are equal."""

    encoder: SetEncoder

    def __call__(self, params: Any, *arguments: jax.Array) -> jax.Array:
        return self.encoder.apply({"params": params}, *arguments)  # type: ignore[return-value]


class SetDecoder(nn.Module):
    """From a latent vector to the set that minimises E(Y; z, θ) (paper, section 3).

    Attributes:
        set_size: n.
        set_dim: d.
        hidden_dim: width of the energy's set encoder.
        inner: the settings of the inner minimisation; its adjoint makes this DSPN or iDSPN. Fields
            that are None are as in `models.inner.DEFAULTS`.
        optimizer: an optax transformation in place of step size and momentum.
        initial_set: "learned" (one set, shared by all), or "random" (drawn for every set). With an
            implicit adjoint the learned one learns through the proximity term alone: with a
            proximity of 0 it stays as it is.
        rank_method: see `SetEncoder`.

    Example:
        >>> decoder = SetDecoder(set_size=3, set_dim=2, hidden_dim=8, inner=Inner(num_steps=2))
        >>> latent = jnp.ones((4, 6))
        >>> decoder.apply(decoder.init(jax.random.key(0), latent), latent, num_steps=5).sets.shape
        (4, 3, 2)
    """

    set_size: int
    set_dim: int
    hidden_dim: int = 512
    inner: Inner = Inner()
    optimizer: optax.GradientTransformation | None = None
    initial_set: str = "learned"
    rank_method: str = "auto"

    @nn.compact
    def __call__(
        self,
        latent: Float[AnyArray, "batch latent"],
        *,
        inputs: Float[AnyArray, "batch n k"] | None = None,
        mask: Bool[AnyArray, "batch n"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        initial_sets: Float[AnyArray, "batch n d"] | None = None,
        num_starts: int | None = None,
        **options: Any,
    ) -> Minimum:
        """Decode.

        Args:
            latent: z.
            inputs: X, to condition the energy on an input multiset.
            mask: True for the elements that are there, for sets of varying size.
            keys: one key for every set; needed for random initial sets and not otherwise.
            initial_sets: start here instead of at the learned or random sets.
            num_starts: descend from so many initial sets, these and others with noise of deviation
                1 on them, and keep the set of the lowest energy (`lowest`). The noise is the same
                at every call and for every set. All descend at once: as many times the time and the
                memory. Default: 1.
            **options: arguments of `minimise` that replace those of the attributes, such as
                ``num_steps`` at evaluation, ``tolerance``, ``return_trajectory``.
        """
        _check.require_rank("latent", latent, 2, "batch latent")
        _check.require_floating("latent", latent)
        _check.require_choice("initial_set", self.initial_set, INITIAL_SETS)
        batch, n, d = latent.shape[0], self.set_size, self.set_dim
        start = self._start(batch, keys, initial_sets).astype(latent.dtype)
        width = d + (0 if inputs is None else inputs.shape[-1])
        encoder = self._encoder(latent.shape[-1])
        params = self.param(
            "energy_encoder", lambda key: encoder.init(key, jnp.zeros((1, n, width)))["params"]
        )
        energy = self._energy(encoder)
        context = Context(latent, start if energy.proximity else None, inputs, mask)
        settings = self.inner.or_else(DEFAULTS).options()
        if self.optimizer is not None:
            settings["optimizer"] = self.optimizer
        # None is a value of these; of the others it is no choice, as tasks pass it.
        off = ("max_grad_norm", "tolerance", "projection")
        settings |= {k: value for k, value in options.items() if value is not None or k in off}
        num_starts = 1 if num_starts is None else _checked(num_starts)
        if num_starts == 1:
            return minimise(energy, params, context, start, **settings)
        starts = start + _start_noise(num_starts, n, d).astype(start.dtype)
        # As one large batch: outside of `jit`, `minimise` then finds its program again.
        context = jax.tree.map(lambda x: jnp.concatenate([x] * num_starts), context)
        minima = minimise(energy, params, context, starts.reshape(-1, n, d), **settings)
        return lowest(_by_start(minima, num_starts))

    def energy(self, variables: Any) -> tuple[Energy, Any]:
        """The energy that the decoder minimises, and its parameters within ``variables``.

        For `minimise` and `suggest_step_size` on a trained model. The energy's context is a
        `Context` of latents, initial sets (with a proximity) and inputs (if conditioned).

        Args:
            variables: of this module, or of the `SetPredictor` that it belongs to.

        Example:
            >>> decoder = SetDecoder(4, 2, 8)
            >>> variables = decoder.init(jax.random.key(0), jnp.ones((1, 6)))
            >>> energy, params = decoder.energy(variables)
            >>> energy(params, sets := jnp.zeros((1, 4, 2)), Context(jnp.ones((1, 6)), sets)).shape
            (1,)
        """
        params = variables.get("params", variables)
        params = params.get("decoder", params)
        if "energy_encoder" not in params:
            raise ValueError(
                "variables: expected those of a SetDecoder or SetPredictor (of a larger model, its"
                f" part: variables['params']['decoder']), got {', '.join(map(str, params))}"
            )
        params = params["energy_encoder"]
        return self._energy(self._encoder(params["output"]["bias"].shape[-1])), params

    def _encoder(self, latent_dim: int) -> SetEncoder:
        inner = self.inner.or_else(DEFAULTS)
        return SetEncoder(
            self.hidden_dim,
            latent_dim,
            self.set_size,
            pool=inner.set_pool,
            relational=inner.pool == "relation",
            rank_method=self.rank_method,
            dot_general=inner.dot_general,
            parent=None,
        )

    def _energy(self, encoder: SetEncoder) -> LatentEnergy:
        proximity = self.inner.or_else(DEFAULTS).proximity or 0.0
        return latent_energy(_Encode(encoder), proximity=proximity)

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

    Example:
        >>> model = SetPredictor(SetEncoder(8, 6, set_size=5), SetDecoder(3, 2, 8))
        >>> sets = jnp.ones((1, 5, 4))  # of other sizes than those predicted
        >>> model.apply(model.init(jax.random.key(0), sets), sets, num_steps=2).sets.shape
        (1, 3, 2)
    """

    encoder: nn.Module
    decoder: SetDecoder
    condition_on_inputs: bool = False

    def __call__(
        self,
        inputs: Any,
        *,
        mask: Bool[AnyArray, "batch n"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        **decoder_options: Any,
    ) -> Minimum:
        """Predict a set for every input; `decoder_options` as in `SetDecoder.__call__`.

        A mask goes to the encoder, as the set of elements that the input holds; with
        ``condition_on_inputs``, where rows of input and output belong together, to the decoder too.
        """
        if self.condition_on_inputs and mask is not None:
            decoder_options = {"mask": mask} | decoder_options
        latent = self.encoder(inputs) if mask is None else self.encoder(inputs, mask)
        condition = inputs if self.condition_on_inputs else None
        return self.decoder(latent, inputs=condition, keys=keys, **decoder_options)


def set_autoencoder(
    *,
    set_size: int,
    set_dim: int,
    hidden_dim: int = 512,
    latent_dim: int = 512,
    inner: Inner = Inner(),  # noqa: B008 (a value)
    **decoder_options: Any,
) -> SetPredictor:
    """A `SetPredictor` from sets to sets of the same shape (paper, section 4.2).

    Args:
        set_size: n.
        set_dim: d.
        hidden_dim: width of both set encoders.
        latent_dim: width of z.
        inner: the settings of the inner minimisation. Both set encoders use its pool (where that is
            "relation", the input encoder uses "fspool") and its products.
        **decoder_options: further attributes of `SetDecoder`.

    Example:
        >>> model = set_autoencoder(set_size=4, set_dim=2, inner=Inner(adjoint="unrolled"))
        >>> sets = jnp.ones((1, 4, 2))
        >>> model.apply(model.init(jax.random.key(0), sets), sets).sets.shape
        (1, 4, 2)
    """
    how = inner.or_else(DEFAULTS)
    encoder = SetEncoder(
        hidden_dim, latent_dim, set_size, pool=how.set_pool, dot_general=how.dot_general
    )
    decoder = SetDecoder(set_size, set_dim, hidden_dim, inner=inner, **decoder_options)
    return SetPredictor(encoder=encoder, decoder=decoder)
