"""Class-specific numbering (paper, section 4.1): ``msdspn train numbering``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from msdspn_jax.adjoints import parse_gradient
from msdspn_jax.equivariance import EquivarianceReport, check_equivariance
from msdspn_jax.losses import numbering_assignment, numbering_loss
from msdspn_jax.metrics import numbering_accuracy
from msdspn_jax.tasks.numbering.data import NumberingBatch, check_sizes, draw_batch, fold_in_each
from msdspn_jax.tasks.numbering.model import NumberingModel, numbering_model
from msdspn_jax.training.config import TrainConfig, adam
from msdspn_jax.training.task import Task, epoch_positions

ModelName = Literal[
    "idspn",
    "dspn",
    "deep-sets",
    "transformer",
    "transformer-pe",
    "transformer-random-pe",
    "bilstm",
]

# Validation and test sets do not depend on the seed of a run: all runs are judged by the same.
_SPLIT_SEEDS = {"val": 20211, "test": 20212}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Number the elements of a multiset within their classes: [a, b, b, a] to [a0, b0, b1, a1]."""

    steps: int = 50_000
    """Training steps (one step: one batch)."""
    model: ModelName = "idspn"
    """Which of the seven models to train."""
    train_size: int | None = 640
    """Samples in the fixed training set; 0: a fresh one every time. Published: 640, 6400, 64000."""
    augment: bool = False
    """Permute every sample anew each time it is drawn (published for bilstm, transformer-pe)."""
    set_size: int = 64
    """Elements in a multiset; the numbers are one-hot in as many dimensions."""
    num_classes: int = 4
    """Classes there are."""
    classes_per_set: int | None = None
    """Draw that many of the classes for a multiset, then its elements from among them."""
    val_size: int = 6_400
    """Validation samples; they pick the checkpoint by macro accuracy."""
    test_size: int = 64_000
    """Test samples."""

    hidden_dim: int = 256
    """Hidden width of dspn, idspn, deep-sets."""
    latent_dim: int = 256
    """Width of the latent vector of dspn, idspn."""
    width: int = 64
    """Width of the transformers (feed-forward part: twice that) and the cells of bilstm."""
    inner_steps: int = 20
    """Inner steps of dspn, idspn."""
    eval_inner_steps: int | None = None
    """Inner steps at evaluation; default: as in training."""
    inner_momentum: float | None = None
    """Momentum of the inner steps; default: 0.9 for idspn, 0 for dspn."""
    max_inner_grad_norm: float | None = None
    """Clip the inner gradient of every set to this norm; default: 40 for idspn, none for dspn."""
    gradient: str | None = None
    """How the minimum is differentiated: identity, neumann:K, conjugate_gradient:K:DAMPING, exact,
    unrolled; default: identity for idspn, unrolled for dspn."""
    pool: Literal["fspool", "sum", "mean"] = "fspool"
    """Pool of the energy's set encoder (dspn, idspn)."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        check_sizes(
            n=self.set_size, num_classes=self.num_classes, classes_per_set=self.classes_per_set
        )
        if self.train_size is not None and self.train_size < 0:
            raise ValueError(f"train_size must not be negative, got {self.train_size}")
        for name in ("val_size", "test_size", "inner_steps", "hidden_dim", "latent_dim", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_inner_steps is not None and self.eval_inner_steps < 1:
            raise ValueError(f"eval_inner_steps must be at least 1, got {self.eval_inner_steps}")
        if self.gradient is not None:
            parse_gradient(self.gradient)


def build_model(config: Config) -> NumberingModel:
    """The model that a configuration names."""
    return numbering_model(
        config.model,
        set_size=config.set_size,
        num_classes=config.num_classes,
        hidden_dim=config.hidden_dim,
        latent_dim=config.latent_dim,
        width=config.width,
        inner_steps=config.inner_steps,
        inner_momentum=config.inner_momentum,
        max_inner_grad_norm=config.max_inner_grad_norm,
        gradient=None if config.gradient is None else parse_gradient(config.gradient),
        pool=config.pool,
    )


def build(config: Config) -> Task:
    """The task that a configuration describes."""
    model = build_model(config)
    draw = _drawer(config)

    def sample(key, step, slots):
        key_order, key_samples, key_augment = (jax.random.fold_in(key, i) for i in range(3))
        if config.train_size:
            index = epoch_positions(
                key_order, step, slots, batch_size=config.batch_size, size=config.train_size
            )
            keys = fold_in_each(key_samples, index)
        else:
            keys = fold_in_each(jax.random.fold_in(key_samples, step), slots)
        augment = fold_in_each(jax.random.fold_in(key_augment, step), slots)
        return draw(keys, permutation_keys=augment if config.augment else None)

    def loss(variables, batch, keys, *, stage, axis_name):
        del stage, axis_name
        scores = _score(model, variables["params"], batch, keys)
        means = {name: jnp.mean(value) for name, value in scores.items()}
        return means.pop("loss"), (means, None)

    @jax.jit
    def score_split(params, sample_keys, noise_keys):
        batch = draw(sample_keys)
        return _score(model, params, batch, noise_keys, num_steps=config.eval_inner_steps)

    def evaluate(variables, split, key):
        size = {"val": config.val_size, "test": config.test_size}[split]
        chunk = min(size, 8 * config.batch_size)
        totals: dict[str, float] = {}
        for first in range(0, size, chunk):
            # The last chunk is filled up, so that one program serves all; what is too much is cut.
            index = jnp.arange(first, first + chunk)
            scores = score_split(
                variables["params"],
                fold_in_each(jax.random.key(_SPLIT_SEEDS[split]), index),
                fold_in_each(key, index),
            )
            for name, value in scores.items():
                kept = np.asarray(value, np.float64)[: size - first]
                totals[name] = totals.get(name, 0.0) + float(kept.sum())
        return {name: total / size for name, total in totals.items()}

    def figures(variables, folder):
        draw_predictions(config, variables["params"], Path(folder) / "numbering.png")

    return Task(
        name="numbering",
        init=lambda key: {"params": model.init(key)},
        sample=sample,
        loss=loss,
        evaluate=evaluate,
        optimizer=adam(config),
        monitor=("macro_accuracy", "max"),
        figures=figures,
        describe={
            "train_size": config.train_size or "fresh samples",
            "val_size": config.val_size,
            "test_size": config.test_size,
        },
    )


def _drawer(config: Config) -> Callable[..., NumberingBatch]:
    def draw(keys, permutation_keys=None):
        return draw_batch(
            keys,
            n=config.set_size,
            num_classes=config.num_classes,
            classes_per_set=config.classes_per_set,
            permutation_keys=permutation_keys,
        )

    return draw


def _score(model: NumberingModel, params: PyTree, batch: NumberingBatch, keys, *, num_steps=None):
    """Loss and accuracies of every set, and how the inner minimisation went, if there is one."""
    noise = model.draw_noise(keys, batch.inputs.shape[1])
    prediction, minimum = model.apply(params, batch.inputs, noise, num_steps)
    assignment = numbering_assignment(prediction, batch.targets, batch.inputs, cost=model.cost)
    accuracy = numbering_accuracy(prediction, batch.targets, assignment)
    scores = {
        "loss": numbering_loss(
            prediction, batch.targets, batch.inputs, cost=model.cost, assignment=assignment
        ),
        "micro_accuracy": accuracy.micro,
        "macro_accuracy": accuracy.macro,
    }
    if minimum is not None:
        scores |= {
            "inner_energy": minimum.energy,
            "inner_gradient_norm": minimum.gradient_norm,
        }
    return scores


# --- which equivariance does a model have? ---

NoiseBelongsTo = Literal["model", "elements"]

#: The published check marks (paper, table 1): set-equivariant, multiset-equivariant.
PUBLISHED_EQUIVARIANCE: dict[str, tuple[bool, bool]] = {
    "deep-sets": (True, True),
    "transformer": (True, True),
    "transformer-random-pe": (False, False),
    "transformer-pe": (False, False),
    "bilstm": (False, False),
    "dspn": (False, True),
    "idspn": (False, True),
}

#: The reading of randomness under which those marks hold, for the models that draw any. The initial
#: set of DSPN is what the minimisation acts on, part of its input; a position encoding, random or
#: not, is part of the model that adds it.
PUBLISHED_READING: dict[str, NoiseBelongsTo] = {
    "transformer-random-pe": "model",
    "dspn": "elements",
    "idspn": "elements",
}


def model_equivariance(
    config: Config,
    params: PyTree,
    *,
    key: Key[Array, ""],
    noise_belongs_to: NoiseBelongsTo | None = None,
    num_sets: int = 9,
    num_permutations: int = 6,
) -> EquivarianceReport:
    """Check which equivariance the model of `config` has with these parameters.

    Args:
        config: names the model and its sizes.
        params: fresh or trained.
        key: draws the multisets, permutations and noise.
        noise_belongs_to: for models that draw noise, see `msdspn_jax.equivariance`. "model": row i
            of the output always meets row i of one fixed noise. "elements": the noise is permuted
            with the inputs, two thirds of the multisets have equal noise for equal inputs, and
            outputs may be exchanged among equal inputs. None: as the published check marks take it,
            `PUBLISHED_READING`.
        num_sets: multisets to try; in every third all elements are equal.
        num_permutations: permutations of each.
    """
    model = build_model(config)
    reading = noise_belongs_to or PUBLISHED_READING.get(config.model, "model")
    n, num_classes, width = config.set_size, config.num_classes, model.noise_width
    key_sets, key_noise, key_class, key_check = jax.random.split(key, 4)
    inputs = _drawer(config)(jax.random.split(key_sets, num_sets)).inputs
    kind = (jnp.arange(num_sets) % 3)[:, None, None]
    inputs = jnp.where(kind == 2, inputs[:, :1], inputs)
    options: dict[str, Any] = {
        "key": key_check,
        "num_permutations": num_permutations,
        "batched": True,
        "name": config.model,
    }
    if width == 0 or reading == "model":
        noise = jax.random.normal(key_noise, (1, n, width))

        def function(sets):
            fixed = jnp.broadcast_to(noise.astype(sets.dtype), (*sets.shape[:2], width))
            return model.apply(params, sets, fixed)[0]

        return check_equivariance(function, inputs, **options)
    noise = jax.random.normal(key_noise, (num_sets, n, width))
    by_class = jax.random.normal(key_class, (num_sets, num_classes, width))
    shared = jnp.einsum("snc,scw->snw", inputs, by_class)
    pairs = jnp.concatenate([inputs, jnp.where(kind == 0, noise, shared)], axis=-1)
    return check_equivariance(
        lambda sets: model.apply(params, sets[..., :num_classes], sets[..., num_classes:])[0],
        pairs,
        # Elements of one class may be exchanged whatever their noise: where the minimisation takes
        # two of them to the same corner of the simplex, it forgets which came from where.
        equal_by=slice(num_classes),
        **options,
    )


# --- pictures ---


def draw_predictions(config: Config, params: PyTree, path: Path, *, num_sets: int = 6) -> None:
    """Draw validation multisets with the predicted numbers in them; wrong elements are crossed."""
    import matplotlib
    from matplotlib.figure import Figure

    from msdspn_jax import plots

    # A row of at most 16 elements stays readable.
    shown = min(config.set_size, 16)
    index = jnp.arange(num_sets)
    batch = _drawer(config)(fold_in_each(jax.random.key(_SPLIT_SEEDS["val"]), index))
    model = build_model(config)
    noise = model.draw_noise(fold_in_each(jax.random.key(0), index), config.set_size)
    prediction, _ = jax.jit(
        lambda params, inputs, noise: model.apply(params, inputs, noise, config.eval_inner_steps)
    )(params, batch.inputs, noise)
    assignment = numbering_assignment(prediction, batch.targets, batch.inputs, cost=model.cost)
    expected = jnp.take_along_axis(batch.targets.argmax(-1), assignment, axis=1)
    number, classes = np.asarray(prediction.argmax(-1)), np.asarray(batch.inputs.argmax(-1))
    right = number == np.asarray(expected)
    figure = Figure(figsize=(0.45 * shown + 1.5, 0.5 * num_sets + 0.6))
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["tab10"]
    for row in range(num_sets):
        for column in range(shown):
            place = (column, num_sets - row)
            axes.scatter(*place, s=240, color=colors(classes[row, column] % 10), alpha=0.85)
            axes.text(*place, str(number[row, column]), ha="center", va="center", color="white")
            if not right[row, column]:
                axes.scatter(*place, s=330, marker="x", color="black", linewidth=1.5)
        share = f"{right[row].mean():.0%} right"
        axes.text(shown - 0.2, num_sets - row, share, va="center", fontsize=9)
    title = f"{config.model}: color is the class, the number is predicted"
    if shown < config.set_size:
        title += f" (first {shown} of {config.set_size})"
    axes.set(xlim=(-0.7, shown + 1.6), ylim=(0.3, num_sets + 0.7))
    axes.set_title(title, fontsize=10)
    axes.axis("off")
    plots.save(figure, path, dpi=120, tight=True)
