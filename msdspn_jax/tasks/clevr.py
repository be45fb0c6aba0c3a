"""CLEVR object property prediction (paper, section 4.3): ``msdspn train clevr``."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax import metrics
from msdspn_jax._progress import progress_bar
from msdspn_jax.data.clevr import MAX_OBJECTS, NUM_FEATURES
from msdspn_jax.errors import UserError
from msdspn_jax.implicit import parse_gradient
from msdspn_jax.losses import hungarian_loss
from msdspn_jax.minimise import Minimum
from msdspn_jax.models.resnet import STAGES, ResNet
from msdspn_jax.models.set_predictor import SetDecoder, SetPredictor, gradient_of
from msdspn_jax.models.slot_attention import (
    SlotAttentionPredictor,
    SlotMLPPredictor,
    from_clevr_layout,
    slot_loss,
    to_clevr_layout,
)
from msdspn_jax.training.cache import user_cache_folder
from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.task import Task, Variables, epoch_positions

ENERGY_MODELS = ("idspn", "dspn")

# The evaluation of test-time compute, beside the number of steps of the configuration.
_STEPS_TRIED = (10, 20, 40, 80)


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


# Models -----------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Predicted sets, in the layout of `msdspn_jax.data.clevr`.

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


# Data -------------------------------------------------------------------------------------------


def _drawn_per_step(config: Config) -> bool:
    return config.data == "procedural" and config.train_size == 0


def _render_options(config: Config) -> dict[str, Any]:
    return {
        "quality": config.render_quality,
        "num_objects": (config.min_objects, config.max_objects),
    }


def load_split(config: Config, split: Literal["train", "val", "test"]):
    """Images and objects of a fixed split, prepared where that has not been done before.

    Returns arrays images [num, size, size, 3] and objects [num, set_size, 19], memory-mapped.

    Raises:
      UserError: the data is missing or damaged, or has fewer images than asked for.
    """
    from msdspn_jax.data import clevr_cache, clevr_procedural, clevr_tfds

    cache_dir = Path(config.cache_dir) if config.cache_dir else user_cache_folder() / "clevr"
    number = {"train": config.train_size, "val": config.val_size, "test": config.test_size}[split]
    with progress_bar(f"clevr {split} images") as report:
        if config.data == "procedural":
            source = clevr_procedural.ProceduralScenes(
                split, number, size=config.size, seed=config.data_seed, **_render_options(config)
            )
            cache = clevr_procedural.rendered_set(source, cache_dir, on_progress=report)
            return cache.images, cache.objects[:, : config.set_size]
        assert config.data_dir is not None
        published = "val" if split == "test" else "train"
        prepared = clevr_cache.cache_folder(config.data_dir, published, config.size)
        if not (prepared / "manifest.json").exists():
            recorded = clevr_tfds.open_source(config.data_dir, published)
            prepared = clevr_cache.cache_folder(
                cache_dir / recorded.fingerprint[:16], published, config.size
            )
            clevr_cache.prepare_cache(recorded, prepared, size=config.size, on_progress=report)
    cache = clevr_cache.load_cache(prepared)
    # Validation images are held out of the training split: the published one is for the scores.
    limit = len(cache) if split == "test" else len(cache) - config.val_size
    first, available = (limit, config.val_size) if split == "val" else (0, limit)
    if split == "test":
        number = min(number, available)
    number = number or available
    if not 0 < number <= available:
        raise UserError(
            f"{prepared}: {len(cache)} images are too few for {number} of the {split} split"
            f" (val_size {config.val_size} are held out of the training split)"
        )
    chosen = slice(first, first + number)
    return cache.images[chosen], cache.objects[chosen, : config.set_size]


def _sampling(config: Config) -> dict[str, Any]:
    """The `Task` fields that say where training batches come from."""
    if _drawn_per_step(config):
        from msdspn_jax.data.clevr_render import procedural_examples

        def draw(key, step, slots):
            step_key = jax.random.fold_in(key, step)
            keys = jax.vmap(lambda slot: jax.random.fold_in(step_key, slot))(slots)
            images, objects = procedural_examples(keys, config.size, **_render_options(config))
            return {"images": images, "objects": objects[:, : config.set_size]}

        return {"sample": draw}
    images, objects = load_split(config, "train")

    def positions(key, step, slots):
        return epoch_positions(key, step, slots, batch_size=config.batch_size, size=len(images))

    if config.images_on == "host":

        def copy(key, step, slots):
            index = np.asarray(positions(key, step, slots))
            return {"images": images[index], "objects": objects[index]}

        return {"sample": copy, "host_data": True}

    def select(key, step, slots, data):
        index = positions(key, step, slots)
        return {name: array[index] for name, array in data.items()}

    arrays = {"images": np.asarray(images), "objects": np.asarray(objects)}
    return {"sample": select, "data": arrays}


# The task ---------------------------------------------------------------------------------------


def build(config: Config) -> Task:
    """The task that a configuration describes."""
    predictor = build_predictor(config)

    def stage(step: int) -> int | None:
        if config.model not in ENERGY_MODELS:
            return None
        return config.inner_steps if 2 * step < config.steps else config.late_inner_steps

    def loss(variables, batch, keys, *, stage, axis_name):
        losses, prediction, state = predictor.loss(
            variables, batch["images"], batch["objects"], keys, inner_steps=stage,
            axis_name=axis_name,
        )  # fmt: skip
        return jnp.mean(losses), (_inner_metrics(prediction), state)

    def evaluate(variables, split, key):
        images, objects = load_split(config, split)
        found, inner = predict_all(predictor, variables, images, objects, key)
        return inner | score(found, objects)

    def figures(variables, folder):
        draw_figures(predictor, variables, Path(folder))

    return Task(
        name="clevr",
        init=predictor.init,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        monitor=("ap_mean", "max"),
        stage=stage,
        stepwise=jax.default_backend() == "cpu",
        figures=figures,
        describe={
            "train_size": config.train_size or "fresh scenes, or all there are",
            "val_size": config.val_size,
            "test_size": config.test_size,
        },
        **_sampling(config),
    )


def _inner_metrics(prediction: Prediction) -> dict[str, Any]:
    if prediction.minimum is None:
        return {}
    return {
        "inner_energy": jnp.mean(prediction.minimum.energy),
        "inner_gradient_norm": jnp.mean(prediction.minimum.gradient_norm),
    }


# Scores and figures -----------------------------------------------------------------------------


# One program for every evaluation of a configuration: jit's cache is by identity otherwise.
@functools.lru_cache(maxsize=16)
def _scorer(predictor: Predictor, inner_steps: int | None):
    @jax.jit
    def run(variables, images, objects, keys):
        prediction = predictor.predict(variables, images, keys, inner_steps=inner_steps)
        values = {"loss": predictor.distance(prediction, objects)}
        if prediction.minimum is not None:
            values["inner_energy"] = prediction.minimum.energy
            values["inner_gradient_norm"] = prediction.minimum.gradient_norm
        return prediction.objects, values

    return run


def predict_all(
    predictor: Predictor,
    variables: Variables,
    images: UInt8[np.ndarray, "num size size 3"],
    objects: Float[np.ndarray, "num n 19"],
    key: Key[Array, ""],
    *,
    inner_steps: int | None = None,
) -> tuple[Float[np.ndarray, "num n 19"], dict[str, float]]:
    """Predict every image, a batch at a time.

    Returns:
      The predicted sets, and means over the images: ``loss`` (of training, in this model's own
      units) and how the inner minimisation went.
    """
    run = _scorer(predictor, inner_steps)
    number, chunk = len(images), min(len(images), predictor.config.batch_size)
    predicted, totals = [], {}
    for first in range(0, number, chunk):
        # The last chunk is filled up, so that one program serves all; what is too much is cut.
        index = np.minimum(np.arange(first, first + chunk), number - 1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        sets, values = run(variables, images[index], objects[index], keys)
        kept = min(chunk, number - first)
        predicted.append(np.asarray(sets)[:kept])
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value, np.float64)[:kept].sum())
    return np.concatenate(predicted), {name: total / number for name, total in totals.items()}


def score(
    prediction: Float[np.ndarray, "num n 19"], objects: Float[np.ndarray, "num n 19"]
) -> dict[str, float]:
    """Average precision at every published threshold, in [0, 1].

    ``ap_0.125`` and so on by protocol per_image, ``ap_mean`` their mean; ``dataset_ap_0.125`` and
    so on by protocol dataset. See `metrics.average_precision`.
    """
    found: dict[str, float] = {}
    protocols: dict[str, metrics.Protocol] = {"ap": "per_image", "dataset_ap": "dataset"}
    for prefix, protocol in protocols.items():
        values = metrics.average_precision(prediction, objects, protocol=protocol)
        found |= {
            f"{prefix}_{threshold:g}": float(value)
            for threshold, value in zip(metrics.AP_THRESHOLDS, values, strict=True)
        }
        if protocol == "per_image":
            found["ap_mean"] = float(np.mean(values))
    return found


def draw_figures(predictor: Predictor, variables: Variables, folder: Path) -> None:
    """Draw validation predictions, curves and errors into ``folder``.

    predictions.png; precision_recall.png; errors.png; for idspn and dspn also inner_steps.png, with
    its numbers in inner_steps.json: average precision by number of inner steps.
    """
    from msdspn_jax import plots, plots_clevr

    config = predictor.config
    images, objects = load_split(config, "val")
    key = jax.random.key(0)
    prediction, _ = predict_all(predictor, variables, images, objects, key)
    count = min(6, len(images))
    panels = plots_clevr.scenes(
        list(images[:count]), list(prediction[:count]), list(objects[:count])
    )
    plots.save(panels, folder / "predictions.png")
    curves = {
        "AP" + ("∞" if np.isinf(threshold) else f"{threshold:g}"): metrics.precision_recall(
            prediction, objects, threshold
        )
        for threshold in metrics.AP_THRESHOLDS
    }
    plots.save(plots_clevr.precision_recall_curves(curves), folder / "precision_recall.png")
    plots.save(_error_figure({config.model: prediction}, objects), folder / "errors.png")
    if config.model not in ENERGY_MODELS:
        return
    steps = sorted({*_STEPS_TRIED, config.steps_at_evaluation})
    by_steps = {}
    for num_steps in steps:
        tried, inner = predict_all(
            predictor, variables, images, objects, key, inner_steps=num_steps
        )
        by_steps[num_steps] = inner | score(tried, objects)
    (folder / "inner_steps.json").write_text(json.dumps(by_steps, indent=1) + "\n")
    names = [f"ap_{threshold:g}" for threshold in metrics.AP_THRESHOLDS]
    lines = {k: np.array([values[name] for name in names]) for k, values in by_steps.items()}
    figure = plots_clevr.average_precision_by_steps(
        lines, metrics.AP_THRESHOLDS, protocol="per image"
    )
    plots.save(figure, folder / "inner_steps.png")


def _error_figure(predictions: Mapping[str, np.ndarray], objects: np.ndarray):
    """Errors by attribute, and distance by number of objects, of one or several models."""
    from msdspn_jax import plots_clevr

    by_attribute, by_number = {}, {}
    for name, prediction in predictions.items():
        wrong = metrics.attribute_errors(prediction, objects)
        attributes = (*metrics.CLEVR_LAYOUT.attributes, "presence")
        by_attribute[name] = {a: float(np.nanmean(wrong[a])) for a in attributes}
        means = metrics.mean_by_number_of_objects(wrong["position"], objects)
        by_number[name] = {number: float(value) for number, value in means.items()}
    return plots_clevr.errors(by_attribute, by_number)
