"""The models of CLEVR object property prediction: from images to sets of objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax._check import AnyArray
from msdspn_jax.clevr.objects import NUM_FEATURES
from msdspn_jax.clevr.slots import from_clevr_layout, slot_loss, to_clevr_layout
from msdspn_jax.descent import Minimum
from msdspn_jax.losses import hungarian_loss
from msdspn_jax.models.resnet import STAGES, ResNet
from msdspn_jax.models.set_predictor import SetDecoder, SetPredictor
from msdspn_jax.models.slot_attention import SlotAttentionPredictor, SlotMLPPredictor
from msdspn_jax.tasks.clevr.config import Config
from msdspn_jax.training import outer
from msdspn_jax.training.task import Variables

MONITOR: tuple[str, Literal["min", "max"]] = ("ap_mean", "max")
"""Which validation metric picks the best checkpoint."""


class Prediction(NamedTuple):
    """Predicted sets, in the layout of `msdspn_jax.clevr.objects`.

    Attributes:
        objects: [batch, set_size, 19].
        minimum: of the energy, with its trajectory where asked for; None for the slot models.
        output: the network's own, of which ``objects`` is made (slot models: positions in [0, 1]).
    """

    objects: Float[Array, "batch n 19"]
    minimum: Minimum | None
    output: Any


@dataclass(frozen=True)
class Predictor:
    """Images to sets of objects, by any of the four models; pure functions of the variables."""

    config: Config

    def network(self, *, train: bool, axis_name: str | None = None) -> nn.Module:
        """The flax module; ``train`` and ``axis_name`` are about the batch statistics."""
        c = self.config
        if c.model == "slot-attention":
            return SlotAttentionPredictor(c.set_size, NUM_FEATURES, c.slot_dim, c.slot_iterations)
        if c.model == "slot-mlp":
            return SlotMLPPredictor(c.set_size, NUM_FEATURES, c.slot_dim, c.hidden_dim)
        return SetPredictor(
            encoder=ResNet(
                STAGES[c.encoder],
                c.encoder_width,
                c.latent_dim,
                c.encoder_stride,
                c.encoder_end_norm,
                train=train,
                axis_name=axis_name,
                dtype=jnp.dtype(c.compute_dtype),
            ),
            decoder=SetDecoder(c.set_size, NUM_FEATURES, c.hidden_dim, inner=c.resolved_inner()),
        )

    def init(self, key: Key[Array, ""]) -> Variables:
        """Fresh variables."""
        images = jnp.zeros((2, self.config.size, self.config.size, 3), jnp.uint8)
        variables = dict(self.network(train=False).init(key, images))
        params = variables.pop("params")
        return {"params": params} | ({"state": variables} if variables else {})

    def predict(
        self,
        variables: Variables,
        images: UInt8[AnyArray, "batch size size 3"] | Float[AnyArray, "batch size size 3"],
        keys: Key[Array, " batch"],
        *,
        inner_steps: int | None = None,
        return_trajectory: bool = False,
    ) -> Prediction:
        """Predict with the running statistics.

        Args:
            variables: from `init`, or trained.
            images: uint8, or floats in [0, 1].
            keys: one for every image; only slot-attention draws from them.
            inner_steps: of idspn and dspn. Default: the configuration's for evaluation.
            return_trajectory: keep the sets after every inner step in ``minimum.trajectory``.
        """
        options = self.config.at_evaluation
        if self.config.minimises:
            options["return_trajectory"] = return_trajectory
            options["num_steps"] = inner_steps or options["num_steps"]
        output = self._apply(self.network(train=False), variables, images, keys, options)
        return self._prediction(output)

    def loss(
        self,
        variables: Variables,
        images: UInt8[AnyArray, "batch size size 3"] | Float[AnyArray, "batch size size 3"],
        objects: Float[AnyArray, "batch n 19"],
        keys: Key[Array, " batch"],
        *,
        inner_steps: int | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, " batch"], Prediction, Any]:
        """Training loss of every image, the predictions, and the updated batch statistics."""
        network = self.network(train=True, axis_name=axis_name)
        options: dict[str, Any] = {"mutable": list(variables.get("state", {}))}
        if self.config.minimises:
            options["num_steps"] = inner_steps
        output, state = self._apply(network, variables, images, keys, options)
        prediction = self._prediction(output)
        return self.distance(prediction, objects), prediction, dict(state) or None

    def distance(
        self, prediction: Prediction, objects: Float[AnyArray, "batch n 19"]
    ) -> Float[Array, " batch"]:
        """What the model is trained to make small, for every image."""
        weight = self.config.position_weight
        if self.config.minimises:
            weights = None if weight == 1 else _feature_weights(weight)
            return hungarian_loss(prediction.objects, objects, weights=weights)
        return slot_loss(prediction.output, from_clevr_layout(objects), position_weight=weight)

    def _apply(self, network: nn.Module, variables, images, keys, options) -> Any:
        everything = {"params": variables["params"], **variables.get("state", {})}
        arguments = (images, keys) if self.config.model == "slot-attention" else (images,)
        return network.apply(everything, *arguments, **options)

    def _prediction(self, output: Any) -> Prediction:
        if self.config.minimises:
            return Prediction(output.sets, output, output)
        return Prediction(to_clevr_layout(output), None, output)


def _feature_weights(position: float) -> Float[Array, " 19"]:
    """Weights whose mean is one, those of the position so many times the others."""
    weights = jnp.ones(NUM_FEATURES).at[:3].set(position)
    return weights / jnp.mean(weights)


def build_predictor(config: Config) -> Predictor:
    """The model of a configuration."""
    return Predictor(config)


def outer_optimizer(config: Config) -> optax.GradientTransformation:
    """What changes the parameters: by default Adam, on the published schedule of the model.

    iDSPN: a tenth of the rate from 90% of the steps on. Slot models: a linear warm-up, then halved
    every third of 150,000 steps, scaled to the steps there are.
    """
    rate, steps = config.resolved_learning_rate(), max(config.steps, 1)
    if config.minimises:
        drop = {int(config.rate_drop * steps): 0.1} if config.rate_drop < 1 else {}
        return outer.outer_optimizer(config, optax.piecewise_constant_schedule(rate, drop))
    warmup = max(1, min(config.warmup_steps, steps // 10))

    def schedule(step):
        rising = jnp.minimum(1.0, (step + 1) / warmup)
        return rate * rising * 0.5 ** (step * 3 / steps)

    return outer.outer_optimizer(config, schedule)
