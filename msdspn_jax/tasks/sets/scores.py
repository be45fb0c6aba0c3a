"""Scores and figures of models for data of one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from msdspn_jax._check import AnyArray
from msdspn_jax._cores import compiler_options
from msdspn_jax.box_losses import iou
from msdspn_jax.losses import pairwise_smooth_l1
from msdspn_jax.matching import INVALID, assign
from msdspn_jax.tasks.evaluation import inner_scores, means, over_split
from msdspn_jax.tasks.sets.coco import BOX_NAMES
from msdspn_jax.tasks.sets.model import Prediction, Predictor
from msdspn_jax.training.task import Variables

PRESENCE_THRESHOLD = 0.5
FOUND_IOU = 0.5
"""A box is found by one that it shares so much of their union with."""
_LISTED = 16
"""Errors are given by feature, up to so many of them."""
_SHOWN = 8


# One program for every evaluation of a configuration: jit's cache is by identity otherwise.
@functools.lru_cache(maxsize=16)
def _runner(predictor: Predictor, inner_steps: int | None):
    @functools.partial(jax.jit, compiler_options=compiler_options())
    def run(variables, batch, keys):
        prediction = predictor.predict(
            variables, batch["inputs"], keys, input_mask=batch.get("input_mask"),
            inner_steps=inner_steps,
        )  # fmt: skip
        found: dict[str, Any] = {"sets": prediction.sets}
        if prediction.presence is not None:
            found["presence"] = prediction.presence
        scores = inner_scores(prediction.minimum)
        if "targets" in batch:
            scores |= score(predictor, prediction, batch["targets"], batch["mask"])
        return found, scores

    return run


def predict_all(
    predictor: Predictor,
    variables: Variables,
    arrays: Mapping[str, np.ndarray],
    key: Key[Array, ""],
    *,
    inner_steps: int | None = None,
    batch_size: int | None = None,
    key_each: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Predict for every input, a batch at a time.

    Args:
        predictor: the model.
        variables: its variables.
        arrays: of `data.fitted`; targets and mask need not be there.
        key: of random initial sets.
        inner_steps: default: the configuration's for evaluation.
        batch_size: default: that of training.
        key_each: every input has a key of its own; or all have the same, so that what is predicted
            for one does not depend on its place.

    Returns:
        The predictions: sets, and presence if sets vary in size; and the scores of every set, those
        of the inner minimisation and, with targets, those of `score`.
    """
    run = _runner(predictor, inner_steps)

    def of_batch(index):
        if key_each:
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index))
        else:
            keys = jnp.broadcast_to(key, (len(index),))
        return run(variables, {name: array[index] for name, array in arrays.items()}, keys)

    size = batch_size or predictor.config.batch_size
    return over_split(of_batch, len(arrays["inputs"]), batch_size=size)


def score(
    predictor: Predictor,
    prediction: Prediction,
    targets: Float[AnyArray, "batch n d"],
    mask: Bool[AnyArray, "batch n"],
) -> dict[str, Float[Array, " batch"]]:
    """Scores of every set.

    ``loss`` as in training. ``size_right``: whether as many elements are predicted as there are.
    ``error_NAME``: absolute error of a feature, in the units of the data, summed over the elements
    of the target and those matched to them, NaN where the prediction is not finite; ``error``, the
    mean of all features, where there are too many to list. ``elements``: of the target.

    Where the first four features are a box: ``iou`` with the boxes matched to those of the target,
    summed; ``boxes_predicted``; and ``boxes_found``, pairs of a predicted and a target box, each in
    one pair at most, whose IoU is at least `FOUND_IOU`.
    """
    form = predictor.config.form
    found = {"loss": predictor.distance(prediction, targets, mask)}
    if prediction.presence is not None:
        number = jnp.sum(prediction.presence > PRESENCE_THRESHOLD, -1)
        found["size_right"] = (number == jnp.sum(mask, -1)).astype(jnp.float32)
    cost = pairwise_smooth_l1(
        prediction.minimum.sets, predictor.scaled(targets, mask), weights=predictor.weights
    )
    matched = assign(cost, mask=(jnp.ones(mask.shape, bool), mask))
    there = matched >= 0
    other = jnp.take_along_axis(targets, jnp.maximum(matched, 0)[..., None], axis=1)
    errors = jnp.where(there[..., None], jnp.abs(prediction.sets - other), 0).sum(1)
    errors = jnp.where(jnp.any(matched == INVALID, 1)[:, None], jnp.nan, errors)
    found["elements"] = jnp.sum(mask, -1)
    if form.names[:4] in BOX_NAMES:
        found |= _box_scores(prediction, targets, mask, matched, other)
    if form.set_dim > _LISTED:
        return found | {"error": errors.mean(-1)}
    return found | {f"error_{name}": errors[:, i] for i, name in enumerate(form.names)}


def _box_scores(prediction, targets, mask, matched, other):
    boxes, finite = prediction.sets[..., :4], jnp.isfinite(prediction.sets).all((1, 2))
    there = jnp.broadcast_to(finite[:, None], matched.shape)
    if prediction.presence is not None:
        there &= prediction.presence > PRESENCE_THRESHOLD
    overlap = jnp.where(matched >= 0, iou(boxes, other[..., :4]), 0)
    near = iou(boxes[:, :, None], targets[:, None, :, :4]) >= FOUND_IOU
    pairs = assign(~near, mask=(there, mask))
    found = jnp.take_along_axis(near, jnp.maximum(pairs, 0)[..., None], axis=2)[..., 0]
    return {
        "iou": jnp.where(finite, overlap.sum(1), 0),
        "boxes_predicted": there.sum(1),
        "boxes_found": (found & (pairs >= 0)).sum(1),
    }


def evaluate(
    predictor: Predictor,
    variables: Variables,
    arrays: Mapping[str, np.ndarray],
    key: Key[Array, ""],
) -> dict[str, float]:
    """Every score over a split, see `averages`."""
    return averages(predict_all(predictor, variables, arrays, key)[1])


def averages(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of every score over the sets; of errors and IoU over the elements, if there is one;
    of boxes ``f1``, twice those found as a share of all predicted and all true ones.
    """
    sums = {name: np.sum(x, dtype=float) for name, x in scores.items()}
    per_element = [name for name in scores if name.split("_")[0] in ("error", "iou")]
    counts = ("elements", "boxes_predicted", "boxes_found")
    found = means({k: x for k, x in scores.items() if k not in (*counts, *per_element)})
    if sums["elements"]:
        found |= {name: float(sums[name] / sums["elements"]) for name in per_element}
        if "boxes_found" in sums:
            both = sums["boxes_predicted"] + sums["elements"]
            found["f1"] = float(2 * sums["boxes_found"] / both)
    return found


def draw_figures(
    predictor: Predictor, variables: Variables, arrays: Mapping[str, np.ndarray], folder: Path
) -> None:
    """Draw predictions.png, inner_loop.png and strip.png into ``folder``."""
    from msdspn_jax import plots
    from msdspn_jax.tasks.sets.plots import boxes, point_sets

    arrays = {name: array[:_SHOWN] for name, array in arrays.items()}
    if not len(arrays["inputs"]):
        return
    keys = jax.random.split(jax.random.key(0), len(arrays["inputs"]))
    prediction = jax.jit(
        lambda variables: predictor.predict(
            variables, arrays["inputs"], keys, input_mask=arrays.get("input_mask"),
            return_trajectory=True,
        )
    )(variables)  # fmt: skip
    sets, form = np.asarray(prediction.sets), predictor.config.form
    there = np.ones(sets.shape[:2], bool)
    if prediction.presence is not None:
        there = np.asarray(prediction.presence) > PRESENCE_THRESHOLD
    pairs = [
        (target[mask], elements[shown])
        for target, mask, elements, shown in zip(
            arrays["targets"], arrays["mask"], sets, there, strict=True
        )
    ]
    if form.kind == "images" and form.names[:4] in BOX_NAMES:
        figure = boxes(arrays["inputs"], pairs)
    else:
        figure = point_sets(pairs, form.names)
    plots.save(figure, folder / "predictions.png")
    trajectory: Any = jax.tree.map(np.asarray, prediction.minimum.trajectory)
    figure = plots.inner_curves(trajectory.energy, trajectory.gradient_norm)
    plots.save(figure, folder / "inner_loop.png")
    target = np.asarray(predictor.scaled(arrays["targets"][:1], arrays["mask"][:1]))[0]
    figure = plots.strip(trajectory.sets[:, 0], target, energy=trajectory.energy[:, 0])
    plots.save(figure, folder / "strip.png")
