"""How good predicted objects are: average precision by both published protocols, errors by kind.

Everything runs on the host with NumPy, in float64, on whole evaluation sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax.clevr.objects import CLEVR_LAYOUT, PRESENCE_THRESHOLD, ObjectLayout
from msdspn_jax.matching.assignment import assign

Protocol = Literal["per_image", "dataset"]
Thresholds = Sequence[float] | Float[AnyArray, " thresholds"]

#: AP∞, AP1, AP0.5, AP0.25, AP0.125 and AP0.0625, in CLEVR units.
AP_THRESHOLDS = (float("inf"), 1.0, 0.5, 0.25, 0.125, 0.0625)
AP_NAMES = ("AP∞", *(f"AP{threshold:g}" for threshold in AP_THRESHOLDS[1:]))


class Reliability(NamedTuple):
    """How well scores are kept, by bin.

    Attributes:
        score: the mean score.
        right: the share of elements that are right.
        number: elements.
        error: the mean distance of score and share over all elements, the expected calibration
            error.
    """

    score: Float[np.ndarray, " bins"]
    right: Float[np.ndarray, " bins"]
    number: Int[np.ndarray, " bins"]
    error: float


class PrecisionRecall(NamedTuple):
    """Precision and recall after each prediction, from the most to the least confident one."""

    score: Float[np.ndarray, " predictions"]
    precision: Float[np.ndarray, " predictions"]
    recall: Float[np.ndarray, " predictions"]


def average_precision(
    prediction: Float[AnyArray, "images n d"],
    target: Float[AnyArray, "images m d"],
    thresholds: Thresholds = AP_THRESHOLDS,
    protocol: Protocol = "per_image",
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> Float[np.ndarray, " thresholds"]:
    """Average precision of predicted objects, in [0, 1], at each distance threshold.

    A prediction is right when all attributes (argmax) equal those of a real object of its image and
    its position is closer than the threshold. AP is the area under the monotone envelope of the
    precision-recall curve. The two protocols differ in ranking and in who may claim an object:

    - ``"per_image"`` (iDSPN, Zhang et al. 2022): predictions are ranked within their image; each
      in turn takes the closest object with its attributes that is not yet taken, whatever the
      distance, and is right where that distance is below the threshold. Mean of the images' APs.
    - ``"dataset"`` (Slot Attention, Locatello et al. 2020): one ranking of all predictions of all
      images; a prediction claims the closest object with its attributes, and is right if it is
      within the threshold and no earlier prediction has been right about the same object.

    Images without objects have no recall: they are left out of the mean over images, and their
    predictions count as wrong in ``"dataset"``.

    Args:
        prediction: predicted sets; the presence feature is the score that ranks them. Ties keep
            the order of the predictions.
        target: true sets; an element is real where its presence is above 0.5.
        thresholds: distances in the units of ``layout.position_scale`` (CLEVR units); infinity is
            allowed.
        protocol: ``"per_image"`` or ``"dataset"``. Scores of the two are not comparable.
        layout: which features mean what.

    Raises:
        ValueError: wrong shapes, a value that is not finite, a threshold that is not positive, an
            unknown protocol, or no real object at all.

    Example:
        >>> truth = np.zeros((1, 1, 19))
        >>> truth[0, 0, [3, 5, 13, 16, 18]] = 1  # rubber, cyan, sphere, large; it is there
        >>> average_precision(truth + 0.01, truth, thresholds=[0.125, 0.01]).tolist()
        [1.0, 0.0]
    """
    _check.require_choice("protocol", protocol, ("per_image", "dataset"))
    if protocol == "per_image":
        by_image = average_precision_per_image(prediction, target, thresholds, layout=layout)
        return np.nanmean(by_image, axis=0)
    ranked = _rank_dataset(prediction, target, layout)
    curves = [_count(ranked, threshold) for threshold in _check_thresholds(thresholds)]
    return np.stack([_area(curve.precision, curve.recall) for curve in curves])


def average_precision_per_image(
    prediction: Float[AnyArray, "images n d"],
    target: Float[AnyArray, "images m d"],
    thresholds: Thresholds = AP_THRESHOLDS,
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> Float[np.ndarray, "images thresholds"]:
    """Average precision of each image by itself (protocol ``"per_image"``, before the mean).

    Arguments and errors as in `average_precision`. NaN for an image without real objects.
    """
    thresholds = _check_thresholds(thresholds)
    taken_distance, num_real = _taken_in_turn(prediction, target, layout)
    n = taken_distance.shape[1]
    right = taken_distance[:, None, :] < thresholds[:, None]
    true_positives = np.cumsum(right, axis=-1)
    precision = true_positives / np.arange(1, n + 1)
    with np.errstate(invalid="ignore"):
        recall = true_positives / num_real[:, None, None]
    area = _area(precision, recall)
    return np.where(num_real[:, None] > 0, area, np.nan)


def right_within(
    prediction: Float[AnyArray, "images n d"],
    target: Float[AnyArray, "images m d"],
    distance: float,
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> Bool[np.ndarray, "images n"]:
    """Which predictions are right, by the rule of protocol ``"per_image"``.

    All attributes are those of an object closer than ``distance`` that no more confident prediction
    has taken. Arguments and errors as in `average_precision`; in the order of the predictions.
    """
    (checked,) = _check_thresholds([distance])
    taken_distance, _ = _taken_in_turn(prediction, target, layout)
    order = np.argsort(-np.asarray(prediction)[..., layout.presence], axis=1, kind="stable")
    right = np.empty(order.shape, bool)
    np.put_along_axis(right, order, taken_distance < checked, axis=1)
    return right


def precision_recall(
    prediction: Float[AnyArray, "images n d"],
    target: Float[AnyArray, "images m d"],
    threshold: float,
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> PrecisionRecall:
    """The precision-recall curve of protocol ``"dataset"`` at one threshold, before the envelope.

    Arguments and errors as in `average_precision`; arrays have one entry a prediction of any image.
    """
    (checked,) = _check_thresholds([threshold])
    return _count(_rank_dataset(prediction, target, layout), checked)


def attribute_errors(
    prediction: Float[AnyArray, "images n d"],
    target: Float[AnyArray, "images m d"],
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> dict[str, Float[np.ndarray, " images"]]:
    """What is wrong with the predictions, attribute by attribute, for each image.

    Every real object is paired with one prediction by the assignment of least total squared
    distance over all features, presence included.

    Returns:
        By name, the mean over the real objects of each image (NaN without any):
        ``"position"``: distance in the units of ``layout.position_scale`` (CLEVR units);
        each attribute's name: share of objects with a wrong argmax;
        ``"presence"``: share of objects whose prediction has presence 0.5 or less;
        ``"count"``: |predictions with presence above 0.5 − real objects|, not a mean.

    Raises:
        ValueError: as `average_precision`, and for fewer predictions than elements of the target.
    """
    prediction, target, real = _check_sets(prediction, target, layout)
    if prediction.shape[1] < target.shape[1]:
        raise ValueError(
            f"prediction: expected at least as many elements as target, {target.shape[1]}, "
            f"got {prediction.shape[1]}"
        )
    squared = ((target[:, :, None] - prediction[:, None]) ** 2).sum(axis=-1)
    everyone = np.ones(prediction.shape[:2], bool)
    mask = (jnp.asarray(real), jnp.asarray(everyone))
    columns = np.asarray(assign(jnp.asarray(squared), mask=mask, method="host"))
    paired = np.take_along_axis(prediction, columns[..., None], axis=1)

    difference = (paired - target)[..., layout.position]
    errors = {"position": np.linalg.norm(difference, axis=-1) * layout.position_scale}
    for name, features in layout.attributes.items():
        errors[name] = paired[..., features].argmax(-1) != target[..., features].argmax(-1)
    errors["presence"] = paired[..., layout.presence] <= PRESENCE_THRESHOLD
    num_real = real.sum(axis=1)
    with np.errstate(invalid="ignore"):
        means = {name: (error * real).sum(axis=1) / num_real for name, error in errors.items()}
    num_predicted = (prediction[..., layout.presence] > PRESENCE_THRESHOLD).sum(axis=1)
    return {**means, "count": np.abs(num_predicted - num_real).astype(np.float64)}


def mean_by_number_of_objects(
    values: Sequence[float] | Float[AnyArray, " images *rest"],
    target: Float[AnyArray, "images m d"],
    *,
    layout: ObjectLayout = CLEVR_LAYOUT,
) -> dict[int, Float[np.ndarray, "*rest"] | float]:
    """Mean of a per-image value over the images with 1, 2, … real objects.

    ``values`` is, for example, `average_precision_per_image` or an entry of `attribute_errors`.
    Numbers of objects that no image has are left out.
    """
    values, target = np.asarray(values, np.float64), np.asarray(target)
    if len(values) != len(target):
        raise ValueError(f"values: expected one row per image, {len(target)}, got {len(values)}")
    num_real = (target[..., layout.presence] > PRESENCE_THRESHOLD).sum(axis=1)
    numbers = np.unique(num_real[num_real > 0])
    return {int(number): values[num_real == number].mean(axis=0) for number in numbers}


def _taken_in_turn(
    prediction: AnyArray, target: AnyArray, layout: ObjectLayout
) -> tuple[Float[np.ndarray, "images n"], Int[np.ndarray, " images"]]:
    """How far the object is that each prediction takes, the most confident first, and their number.

    Each takes the closest object with its attributes that is not yet taken; infinite where there is
    none.
    """
    prediction, target, real = _check_sets(prediction, target, layout)
    order = np.argsort(-prediction[..., layout.presence], axis=1, kind="stable")
    prediction = np.take_along_axis(prediction, order[..., None], axis=1)
    distance = _distance_where_alike(prediction, target, real, layout)
    images, n, _ = distance.shape
    rows = np.arange(images)
    taken = np.empty((images, n))
    for rank in range(n):
        closest = np.argmin(distance[:, rank], axis=1)
        taken[:, rank] = distance[rows, rank, closest]
        # A row of infinities has no object to take, and its argmin must not take one.
        found = np.isfinite(taken[:, rank])
        distance[rows[found], :, closest[found]] = np.inf
    return taken, real.sum(axis=1)


class _Ranked(NamedTuple):
    """All predictions of all images, the most confident first."""

    score: Float[np.ndarray, " predictions"]
    distance: Float[np.ndarray, " predictions"]
    claimed: Int[np.ndarray, " predictions"]
    num_real: int


def _rank_dataset(prediction: AnyArray, target: AnyArray, layout: ObjectLayout) -> _Ranked:
    prediction, target, real = _check_sets(prediction, target, layout)
    score = prediction[..., layout.presence].ravel()
    order = np.argsort(-score, kind="stable")
    distance = _distance_where_alike(prediction, target, real, layout)
    closest = distance.argmin(axis=-1)
    claimed = closest + np.arange(len(target))[:, None] * target.shape[1]
    return _Ranked(
        score[order], distance.min(axis=-1).ravel()[order], claimed.ravel()[order], int(real.sum())
    )


def _count(ranked: _Ranked, threshold: float) -> PrecisionRecall:
    (within,) = np.nonzero(ranked.distance < threshold)
    # np.unique gives the first place of every value: the first of those who claim the same object.
    _, first = np.unique(ranked.claimed[within], return_index=True)
    right = np.zeros(len(ranked.score))
    right[within[first]] = 1
    true_positives = np.cumsum(right)
    precision = true_positives / np.arange(1, len(right) + 1)
    return PrecisionRecall(ranked.score, precision, true_positives / ranked.num_real)


def _area(
    precision: Float[np.ndarray, "*batch ranks"], recall: Float[np.ndarray, "*batch ranks"]
) -> Float[np.ndarray, "*batch"] | float:
    """Area under the envelope: each recall counts with the best precision at it or beyond."""
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    return (envelope * np.diff(recall, axis=-1, prepend=0.0)).sum(axis=-1)


def _distance_where_alike(
    prediction: Float[np.ndarray, "images n d"],
    target: Float[np.ndarray, "images m d"],
    real: Bool[np.ndarray, "images m"],
    layout: ObjectLayout,
) -> Float[np.ndarray, "images n m"]:
    """Distance of prediction and object; infinite if that is not real or attributes differ."""
    difference = prediction[:, :, None, layout.position] - target[:, None, :, layout.position]
    distance = np.linalg.norm(difference * layout.position_scale, axis=-1)
    alike = np.broadcast_to(real[:, None, :], distance.shape)
    for features in layout.attributes.values():
        predicted, true = prediction[..., features].argmax(-1), target[..., features].argmax(-1)
        alike = alike & (predicted[:, :, None] == true[:, None, :])
    return np.where(alike, distance, np.inf)


def _check_sets(prediction: AnyArray, target: AnyArray, layout: ObjectLayout):
    """Both sets in float64, and which elements of the target are real."""
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    for name, sets in (("prediction", prediction), ("target", target)):
        if sets.ndim != 3 or sets.shape[-1] != layout.num_features:
            raise ValueError(
                f"{name}: expected shape [images, n, {layout.num_features}], got {sets.shape}"
            )
        if not np.isfinite(sets).all():
            image = int(np.nonzero(~np.isfinite(sets).all(axis=(1, 2)))[0][0])
            raise ValueError(
                f"{name}: expected finite values, got a NaN or an infinity in image {image}"
            )
    if len(prediction) != len(target):
        raise ValueError(
            "prediction and target: expected as many images, got "
            f"{len(prediction)} and {len(target)}"
        )
    real = target[..., layout.presence] > PRESENCE_THRESHOLD
    if not real.any():
        raise ValueError(
            f"target: expected a real object (presence above {PRESENCE_THRESHOLD}), got none"
        )
    return prediction, target, real


def _check_thresholds(thresholds: Thresholds) -> Float[np.ndarray, " thresholds"]:
    thresholds = np.asarray(thresholds, np.float64)
    if thresholds.ndim != 1 or not len(thresholds) or not (thresholds > 0).all():
        raise ValueError(f"thresholds: expected a list of positive distances, got {thresholds}")
    return thresholds
