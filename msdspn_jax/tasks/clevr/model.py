"""The models of CLEVR object property prediction: their settings, and images to sets of objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax.adjoints import parse_gradient
from msdspn_jax.clevr.objects import MAX_OBJECTS, NUM_FEATURES
from msdspn_jax.clevr.slots import from_clevr_layout, slot_loss, to_clevr_layout
from msdspn_jax.descent import Minimum
from msdspn_jax.losses import hungarian_loss
from msdspn_jax.models.resnet import STAGES, ResNet
from msdspn_jax.models.set_predictor import SetDecoder, SetPredictor, gradient_of
from msdspn_jax.models.slot_attention import (
    SlotAttentionPredictor,
    SlotMLPPredictor,
)
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.task import Variables

ENERGY_MODELS = ("idspn", "dspn")
#: Which validation metric picks the best checkpoint.
MONITOR: tuple[str, Literal["min", "max"]] = ("ap_mean", "max")


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Predict the objects of CLEVR images: position, material, color, shape and size of each.

    The defaults are the published settings of iDSPN at 128 x 128 (54,700 steps are 100 epochs).
    --data procedural needs no download: scenes are drawn and rendered by this library.
    """

    steps: int = 54_700
    """Training steps (one step: one batch)."""
    learning_rate: float = 0.0
    """Adam's learning rate; 0: as published (1e-3; 4e-4 for slot-attention and slot-mlp)."""
    evaluate_every: int = 2_000
    """Steps between evaluations on the validation split (and one at the end)."""
    model: Literal["idspn", "dspn", "slot-attention", "slot-mlp"] = "idspn"
    """Which model to train."""

    data: Literal["procedural", "folder", "tfds"] = "procedural"
    """procedural: rendered here; folder: an extracted CLEVR_v1.0; tfds: TensorFlow Datasets."""
    data_dir: str | None = None
    """Where the data of folder and tfds lies, or a cache that `msdspn data clevr` made of it."""
    cache_dir: str | None = None
    """Where resized or rendered images are kept between runs. Default: the user's cache folder."""
    images_on: Literal["device", "host"] = "device"
    """Where a fixed training set waits: on the accelerator (128 x 128: 49 kB an image), or in the
    host's memory, from which every batch is copied."""
    train_size: int = 0
    """Training images; 0: all of folder and tfds, for procedural fresh scenes at every step."""
    val_size: int = 1_000
    """Validation images (of folder and tfds: the last ones of the training split)."""
    test_size: int = 15_000
    """Test images (of folder and tfds: the first ones of the published validation split)."""
    data_seed: int = 0
    """Which procedural scenes make the fixed sets."""
    render_quality: Literal["fast", "default", "high"] = "default"
    """Rays a pixel of procedural scenes: 1, 4 or 16."""
    size: int = 128
    """Side of the images, pixels."""
    set_size: int = MAX_OBJECTS
    """Elements of a predicted set: at least max_objects."""
    min_objects: int = 3
    """Fewest objects of a procedural scene."""
    max_objects: int = MAX_OBJECTS
    """Most objects of a procedural scene."""

    encoder: Literal["resnet18", "resnet34"] = "resnet18"
    """Image encoder of idspn and dspn."""
    encoder_width: int = 64
    """Channels of its first stage."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the image encoder's arithmetic; parameters, statistics and the inner loop stay
    in float32."""
    latent_dim: int = 512
    """Width of the latent vector."""
    hidden_dim: int = 512
    """Hidden width of the energy's set encoder."""
    pool: Literal["fspool", "relation", "sum", "mean"] = "fspool"
    """Set encoder of the energy: how it pools; relation: all pairs of elements, then fspool."""
    inner_steps: int = 20
    """Inner steps in the first half of training."""
    late_inner_steps: int = 40
    """Inner steps in the second half of training."""
    eval_inner_steps: int | None = None
    """Inner steps at evaluation. Default: as in the second half of training."""
    inner_learning_rate: float = 1.0
    """Step size of the inner minimisation."""
    momentum: float | None = None
    """Nesterov momentum of the inner minimisation. Default: 0.9 for idspn; 0.5 for dspn."""
    max_grad_norm: float = 10.0
    """Clip the inner gradient of every set to this norm."""
    backward: str = "auto"
    """How the minimum is differentiated: auto (the model's way), identity, neumann:K,
    conjugate_gradient:K[:DAMPING], exact, unrolled."""
    rate_drop: float = 0.9
    """After this share of the steps the learning rate is a tenth (idspn, dspn)."""

    slot_dim: int = 64
    """Width of features and slots of slot-attention and slot-mlp."""
    slot_iterations: int = 3
    """Rounds of attention of slot-attention."""
    position_weight: float = 1.0
    """Weight of the position in the loss of slot-attention and slot-mlp (more: variants *, †)."""
    warmup_steps: int = 1_000
    """Steps over which the learning rate of slot-attention and slot-mlp rises."""

    def __post_init__(self) -> None:
        """Resolve the learning rate and refuse values that cannot be meant."""
        if self.learning_rate == 0:
            rate = 1e-3 if self.model in ENERGY_MODELS else 4e-4
            object.__setattr__(self, "learning_rate", rate)
        super().__post_init__()
        positive = ("val_size", "test_size", "size", "set_size", "encoder_width", "latent_dim")
        positive += ("hidden_dim", "inner_steps", "late_inner_steps", "inner_learning_rate")
        positive += ("max_grad_norm", "slot_dim", "slot_iterations", "position_weight")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.eval_inner_steps is not None and self.eval_inner_steps < 1:
            raise ValueError(f"eval_inner_steps must be positive, got {self.eval_inner_steps}")
        if self.train_size < 0:
            raise ValueError(f"train_size must not be negative, got {self.train_size}")
        if not 0 < self.rate_drop <= 1:
            raise ValueError(f"rate_drop must be in (0, 1], got {self.rate_drop}")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(
                "min_objects and max_objects must satisfy 1 <= min_objects <= max_objects <= "
                f"{MAX_OBJECTS}, got {self.min_objects} and {self.max_objects}"
            )
        needed = self.max_objects if self.data == "procedural" else MAX_OBJECTS
        if not needed <= self.set_size <= MAX_OBJECTS:
            raise ValueError(
                f"set_size must be at least {needed}, the most objects of an image, and at most"
                f" {MAX_OBJECTS}, got {self.set_size}"
            )
        if self.data != "procedural" and self.data_dir is None:
            raise ValueError(f"data {self.data!r} needs data_dir: where the data lies")
        if self.backward != "auto":
            parse_gradient(self.backward)

    @property
    def steps_at_evaluation(self) -> int:
        """Inner steps at evaluation, the default resolved."""
        return self.eval_inner_steps or self.late_inner_steps


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
        momentum = {"idspn": 0.9, "dspn": 0.5}[c.model] if c.momentum is None else c.momentum
        gradient = gradient_of(c.model) if c.backward == "auto" else parse_gradient(c.backward)
        return SetPredictor(
            encoder=ResNet(
                STAGES[c.encoder],
                c.encoder_width,
                c.latent_dim,
                train=train,
                axis_name=axis_name,
                dtype=jnp.dtype(c.compute_dtype),
            ),
            decoder=SetDecoder(
                c.set_size,
                NUM_FEATURES,
                c.hidden_dim,
                num_steps=c.inner_steps,
                learning_rate=c.inner_learning_rate,
                momentum=momentum,
                max_grad_norm=c.max_grad_norm,
                gradient=gradient,
                pool="fspool" if c.pool == "relation" else c.pool,
                relational=c.pool == "relation",
            ),
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
        images: UInt8[Array, "batch size size 3"],
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
        options: dict[str, Any] = {}
        if self.config.model in ENERGY_MODELS:
            steps = inner_steps or self.config.steps_at_evaluation
            options = {"num_steps": steps, "return_trajectory": return_trajectory}
        output = self._apply(self.network(train=False), variables, images, keys, options)
        return self._prediction(output)

    def loss(
        self,
        variables: Variables,
        images: UInt8[Array, "batch size size 3"],
        objects: Float[Array, "batch n 19"],
        keys: Key[Array, " batch"],
        *,
        inner_steps: int | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, " batch"], Prediction, Any]:
        """Training loss of every image, the predictions, and the updated batch statistics."""
        network = self.network(train=True, axis_name=axis_name)
        options: dict[str, Any] = {"mutable": list(variables.get("state", {}))}
        if self.config.model in ENERGY_MODELS:
            options["num_steps"] = inner_steps
        output, state = self._apply(network, variables, images, keys, options)
        prediction = self._prediction(output)
        return self.distance(prediction, objects), prediction, dict(state) or None

    def distance(
        self, prediction: Prediction, objects: Float[Array, "batch n 19"]
    ) -> Float[Array, " batch"]:
        """What the model is trained to make small, for every image."""
        if self.config.model in ENERGY_MODELS:
            return hungarian_loss(prediction.objects, objects)
        weight = self.config.position_weight
        return slot_loss(prediction.output, from_clevr_layout(objects), position_weight=weight)

    def _apply(self, network: nn.Module, variables, images, keys, options) -> Any:
        everything = {"params": variables["params"], **variables.get("state", {})}
        arguments = (images, keys) if self.config.model == "slot-attention" else (images,)
        return network.apply(everything, *arguments, **options)

    def _prediction(self, output: Any) -> Prediction:
        if self.config.model in ENERGY_MODELS:
            return Prediction(output.sets, output, output)
        return Prediction(to_clevr_layout(output), None, output)


def build_predictor(config: Config) -> Predictor:
    """The model of a configuration."""
    return Predictor(config)


def outer_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, on the published schedule of the model.

    iDSPN: a tenth of the rate from 90% of the steps on. Slot models: a linear warm-up, then halved
    every third of 150,000 steps, scaled to the steps there are.
    """
    rate, steps = config.learning_rate, max(config.steps, 1)
    if config.model in ENERGY_MODELS:
        drop = {int(config.rate_drop * steps): 0.1} if config.rate_drop < 1 else {}
        return optax.adam(optax.piecewise_constant_schedule(rate, drop))
    warmup = max(1, min(config.warmup_steps, steps // 10))

    def schedule(step):
        rising = jnp.minimum(1.0, (step + 1) / warmup)
        return rate * rising * 0.5 ** (step * 3 / steps)

    return optax.adam(schedule)
