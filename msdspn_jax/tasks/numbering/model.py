"""The seven models of class-specific numbering behind one interface (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from msdspn_jax.descent import Minimum
from msdspn_jax.models.bilstm import BiLSTM
from msdspn_jax.models.deep_sets import DeepSets
from msdspn_jax.models.set_predictor import INITIAL_SCALE, SetDecoder, SetPredictor
from msdspn_jax.models.transformer import PositionEncoding, Transformer
from msdspn_jax.set_encoder import SetEncoder
from msdspn_jax.tasks.numbering.config import Config

_POSITION_ENCODINGS: dict[str, PositionEncoding] = {
    "transformer": "none",
    "transformer-pe": "sinusoidal",
    "transformer-random-pe": "random",
}


class NumberingModel(NamedTuple):
    """A model that numbers the elements of multisets.

    Attributes:
        init: ``key -> params``.
        apply: ``(params, inputs [batch, n, num_classes], noise [batch, n, w], **options) ->
            (prediction [batch, n, n], minimum)``. The minimum is None unless the model minimises,
            and only then the options, those of its `SetDecoder`, have a meaning. Row i of the noise
            belongs to element i.
        noise_width: w, the standard normal numbers that an element needs; 0 for most.
        cost: what the prediction is trained with, see `losses.numbering_loss`: "l2" for points on
            the simplex, "ce" for logits.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[..., tuple[Float[Array, "batch n n"], Minimum | None]]
    noise_width: int
    cost: str

    def draw_noise(self, keys: Key[Array, " batch"], n: int) -> Float[Array, "batch n w"]:
        """Draw the noise of every set from a key of its own."""
        shape = (n, self.noise_width)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def build_model(config: Config) -> NumberingModel:
    """The model that a configuration names."""
    return _minimising(config) if config.minimises else _baseline(config)


def _minimising(config: Config) -> NumberingModel:
    """DSPN and iDSPN: from noise, descend an energy that sees the input beside the output."""
    n, inner = config.set_size, config.resolved_inner()
    predictor = SetPredictor(
        encoder=SetEncoder(config.hidden_dim, config.latent_dim, n, dot_general=inner.dot_general),
        decoder=SetDecoder(n, n, config.hidden_dim, inner=inner, initial_set="random"),
        condition_on_inputs=True,
    )

    def init(key):
        return predictor.init(key, jnp.zeros((1, n, config.num_classes)))["params"]

    def apply(params, inputs, noise, **options):
        minimum: Any = predictor.apply(
            {"params": params}, inputs, initial_sets=INITIAL_SCALE * noise, **options
        )
        return minimum.sets, minimum

    return NumberingModel(init, apply, noise_width=n, cost="l2")


def _baseline(config: Config) -> NumberingModel:
    module = _baseline_module(config)
    noise_width = getattr(module, "noise_width", 0)

    def arguments(inputs, noise):
        return (inputs, noise) if noise_width else (inputs,)

    def init(key):
        inputs = jnp.zeros((1, config.set_size, config.num_classes))
        noise = jnp.zeros((1, config.set_size, noise_width))
        return module.init(key, *arguments(inputs, noise))["params"]

    def apply(params, inputs, noise, **options):
        del options
        prediction: Any = module.apply({"params": params}, *arguments(inputs, noise))
        return prediction, None

    return NumberingModel(init, apply, noise_width, cost="ce")


def _baseline_module(config: Config) -> nn.Module:
    n, width = config.set_size, config.width
    if config.model == "deep-sets":
        return DeepSets(n, config.hidden_dim)
    if config.model == "bilstm":
        return BiLSTM(n, width)
    encoding = _POSITION_ENCODINGS[config.model]
    return Transformer(n, encoding, width, feed_forward_dim=2 * width)
