"""The model for data of one's own: an encoder by the kind of the inputs, then a set decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from msdspn_jax._check import AnyArray
from msdspn_jax.descent import Minimum
from msdspn_jax.losses import chamfer_loss, hungarian_loss
from msdspn_jax.models.resnet import STAGES, ResNet
from msdspn_jax.models.set_predictor import SetDecoder, SetPredictor
from msdspn_jax.set_encoder import SetEncoder, dense
from msdspn_jax.tasks.sets.config import Config
from msdspn_jax.training.task import Variables

MONITOR: tuple[str, Literal["min", "max"]] = ("loss", "min")
"""Which validation metric picks the best checkpoint."""


class Prediction(NamedTuple):
    """Predicted sets.

    Attributes:
        sets: [batch, n, d], in the units of the data.
        presence: [batch, n], trained towards 1 for elements and 0 for none; None where all sets are
            of one size.
        minimum: of the energy, whose sets are as the network has them: scaled, with presence.
    """

    sets: Float[Array, "batch n d"]
    presence: Float[Array, "batch n"] | None
    minimum: Minimum


class _MLP(nn.Module):
    """Vectors to latent vectors: three linear layers."""

    hidden_dim: int
    latent_dim: int

    @nn.compact
    def __call__(self, vectors: Float[AnyArray, "batch k"]) -> Float[Array, "batch latent"]:
        hidden = nn.relu(dense(self.hidden_dim, vectors.shape[-1], name="first")(vectors))
        hidden = nn.relu(dense(self.hidden_dim, self.hidden_dim, name="second")(hidden))
        return dense(self.latent_dim, self.hidden_dim, name="output")(hidden)


@dataclass(frozen=True)
class Predictor:
    """Inputs to sets, as pure functions of the variables; inputs in the units of the data."""

    config: Config

    def network(self, *, train: bool, axis_name: str | None = None) -> SetPredictor:
        """The flax module; ``train`` and ``axis_name`` are about batch statistics, of images."""
        c, form = self.config, self.config.form
        inner = c.resolved_inner()
        encoder: nn.Module
        if form.kind == "images":
            encoder = ResNet(
                STAGES[c.encoder], c.encoder_width, c.latent_dim, end_norm=c.encoder_end_norm,
                train=train, axis_name=axis_name, dtype=jnp.dtype(c.compute_dtype),
            )  # fmt: skip
        elif form.kind == "sets":
            pool = inner.pool or "fspool"
            encoder = SetEncoder(
                c.hidden_dim, c.latent_dim, form.input_shape[0],
                pool="fspool" if pool == "relation" else pool, dot_general=inner.dot_general,
            )  # fmt: skip
        else:
            encoder = _MLP(c.hidden_dim, c.latent_dim)
        decoder = SetDecoder(
            form.set_size, form.width, c.hidden_dim, inner=inner, initial_set=c.initial_set
        )
        return SetPredictor(encoder=encoder, decoder=decoder)

    def init(self, key: Key[Array, ""]) -> Variables:
        """Fresh variables."""
        form = self.config.form
        inputs = jnp.zeros(
            (2, *form.input_shape), jnp.uint8 if form.kind == "images" else jnp.float32
        )
        options: dict[str, Any] = {}
        if form.kind == "sets":
            options["mask"] = jnp.ones(inputs.shape[:2], bool)
        variables = dict(self.network(train=False).init(key, inputs, **options))
        params = variables.pop("params")
        return {"params": params} | ({"state": variables} if variables else {})

    def predict(
        self,
        variables: Variables,
        inputs: Num[AnyArray, "batch ..."],
        keys: Key[Array, " batch"],
        *,
        input_mask: Bool[AnyArray, "batch m"] | None = None,
        inner_steps: int | None = None,
        return_trajectory: bool = False,
    ) -> Prediction:
        """Predict with the running statistics.

        Args:
            variables: from `init`, or trained.
            inputs: of the shape that the configuration's ``form`` says.
            keys: one for every input; only random initial sets are drawn from them.
            input_mask: which elements are there, of inputs that are sets. Default: all.
            inner_steps: default: the configuration's for evaluation.
            return_trajectory: keep the sets after every inner step in ``minimum.trajectory``.
        """
        options = self.config.at_evaluation | {"return_trajectory": return_trajectory}
        options["num_steps"] = inner_steps or options["num_steps"]
        minimum = self._apply(
            self.network(train=False), variables, inputs, input_mask, keys, options
        )
        return self._prediction(minimum)

    def loss(
        self,
        variables: Variables,
        batch: dict[str, Any],
        keys: Key[Array, " batch"],
        *,
        inner_steps: int | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, " batch"], Prediction, Any]:
        """Loss of every example of a batch of `data.fitted`, the predictions, the new state."""
        options = {"mutable": list(variables.get("state", {})), "num_steps": inner_steps}
        minimum, state = self._apply(
            self.network(train=True, axis_name=axis_name), variables, batch["inputs"],
            batch.get("input_mask"), keys, options,
        )  # fmt: skip
        prediction = self._prediction(minimum)
        losses = self.distance(prediction, batch["targets"], batch["mask"])
        return losses, prediction, dict(state) or None

    def distance(
        self,
        prediction: Prediction,
        targets: Float[AnyArray, "batch n d"],
        mask: Bool[AnyArray, "batch n"],
    ) -> Float[Array, " batch"]:
        """What the model is trained to make small, for every set."""
        loss = {"hungarian": hungarian_loss, "chamfer": chamfer_loss}[self.config.loss]
        return loss(prediction.minimum.sets, self.scaled(targets, mask), weights=self.weights)

    @property
    def weights(self) -> Float[Array, " width"] | None:
        """Of the features in the loss, presence included; None: all are 1."""
        c = self.config
        if c.feature_weights is None and not (c.form.presence and c.presence_weight != 1):
            return None
        weights = c.feature_weights or (1.0,) * c.form.set_dim
        return jnp.array([*weights, c.presence_weight][: c.form.width])

    def scaled(
        self, targets: Float[AnyArray, "batch n d"], mask: Bool[AnyArray, "batch n"]
    ) -> Float[Array, "batch n width"]:
        """Sets as the network has them: scaled, with presence; what is not there is zero."""
        form = self.config.form
        sets = (jnp.asarray(targets) - jnp.array(form.shift)) / jnp.array(form.scale)
        if not form.presence:
            return sets
        there = mask[..., None]
        return jnp.concatenate([jnp.where(there, sets, 0), there.astype(sets.dtype)], -1)

    def _apply(self, network, variables, inputs, input_mask, keys, options) -> Any:
        everything = {"params": variables["params"], **variables.get("state", {})}
        form = self.config.form
        if form.kind != "images":
            inputs = (inputs - jnp.array(form.input_shift)) / jnp.array(form.input_scale)
        if form.kind == "sets":
            if input_mask is None:
                input_mask = jnp.ones(inputs.shape[:2], bool)
            inputs = jnp.where(input_mask[..., None], inputs, 0)
            options = options | {"mask": input_mask}
        return network.apply(everything, inputs, keys=keys, **options)

    def _prediction(self, minimum: Minimum) -> Prediction:
        form = self.config.form
        sets = minimum.sets[..., : form.set_dim] * jnp.array(form.scale) + jnp.array(form.shift)
        return Prediction(sets, minimum.sets[..., -1] if form.presence else None, minimum)


def build_predictor(config: Config) -> Predictor:
    """The model of a configuration."""
    return Predictor(config.completed())
