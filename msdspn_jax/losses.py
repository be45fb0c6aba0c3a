"""Losses between sets: Hungarian (optimal assignment), Chamfer (nearest neighbours), numbering.

Predictions are [batch, n, d], targets [batch, m, d], losses [batch]: average over the batch
yourself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax import _check, matching
from msdspn_jax._check import AnyArray


def smooth_l1(difference: Float[AnyArray, "*any"]) -> Float[Array, "*any"]:
    """½x² within ±1, |x| − ½ outside (Huber's function with δ = 1), entry by entry.

    Example:
        >>> smooth_l1(jnp.array([-2.0, 0.0, 0.5])).tolist()
        [1.5, 0.0, 0.125]
    """
    size = jnp.abs(difference)
    inside = jnp.minimum(size, 1)
    return 0.5 * jnp.square(inside) + (size - inside)


def pairwise_smooth_l1(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch m d"],
    *,
    weights: Float[AnyArray, " d"] | None = None,
) -> Float[Array, "batch n m"]:
    """Smooth-l1 distance, mean over d, of every predicted element to every target element.

    With ``weights`` every feature is first multiplied by its own.

    Example:
        >>> pairwise_smooth_l1(jnp.zeros((1, 2, 1)), jnp.array([[[0.0], [1.0], [3.0]]])).tolist()
        [[[0.0, 0.5, 2.5], [0.0, 0.5, 2.5]]]
    """
    prediction, target = _checked_sets(prediction, target)
    return _weighted_mean(smooth_l1(prediction[:, :, None] - target[:, None]), weights)


def pairwise_squared(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch m d"],
    *,
    weights: Float[AnyArray, " d"] | None = None,
) -> Float[Array, "batch n m"]:
    """Squared Euclidean distance, mean over d, of every predicted to every target element.

    With ``weights`` every feature is first multiplied by its own.

    Example:
        >>> pairwise_squared(jnp.zeros((1, 2, 1)), jnp.array([[[0.0], [1.0], [3.0]]])).tolist()
        [[[0.0, 1.0, 9.0], [0.0, 1.0, 9.0]]]
    """
    prediction, target = _checked_sets(prediction, target)
    return _weighted_mean(jnp.square(prediction[:, :, None] - target[:, None]), weights)


def hungarian_loss(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch m d"],
    *,
    target_mask: Bool[AnyArray, "batch m"] | None = None,
    prediction_mask: Bool[AnyArray, "batch n"] | None = None,
    weights: Float[AnyArray, " d"] | None = None,
    method: matching.Method = "auto",
) -> Float[Array, " batch"]:
    """Smooth-l1 distance of the best one-to-one matching, mean over the matched pairs.

    The loss of the paper's sections 4.2 and 4.3. The assignment is piecewise constant, so the
    gradient is that of the matched pairs; among assignments that cost the same, one is chosen, and
    always the same one.

    Args:
        prediction: n elements.
        target: m elements, m ≤ n.
        target_mask: True for the target elements that are there. Predictions left over by the
            present ones are free; a set with no element has loss 0. (The alternative for sets of
            varying size is a presence feature in d, with absent elements all zero.)
        prediction_mask: True for the predicted elements that are there, where their number is
            known; the others are matched to nothing. At least as many as targets.
        weights: one number >= 0 for every feature, 1 for all by default: the distance is the mean
            over d of weight times smooth l1, in the matching as well.
        method: solver of the assignment problem, see `assign`; "host" cannot be jitted.

    Returns:
        One number per set; under ``jit`` NaN where the prediction or the target is not finite, or
        has more present targets than predictions.

    Raises:
        ValueError: shapes that do not fit, more targets than predictions, NaN or infinity in
            concrete arrays.

    Example:
        >>> prediction, target = jnp.array([[[1.0], [4.0]]]), jnp.array([[[4.0], [3.0]]])
        >>> hungarian_loss(prediction, target).tolist()
        [0.75]
        >>> hungarian_loss(prediction, target, target_mask=jnp.array([[True, False]])).tolist()
        [0.0]
    """
    target = _without_absent("target_mask", target, target_mask)
    prediction = _without_absent("prediction_mask", prediction, prediction_mask)
    _check.require_finite("prediction", prediction)
    _check.require_finite("target", target)
    cost = pairwise_smooth_l1(prediction, target, weights=weights)
    n, m = cost.shape[1:]
    if m > n:
        raise ValueError(f"target: expected at most n = {n} elements as predicted, got {m}")
    mask, size = None, m
    if target_mask is not None or prediction_mask is not None:
        rows, columns = _present(cost, prediction_mask, target_mask)
        mask = (rows, columns)
        size = jnp.maximum(jnp.sum(columns, -1), 1)
        if prediction_mask is not None:
            size = _enough(jnp.sum(rows, -1), jnp.sum(columns, -1), size)
    assignment = matching.assign(lax.stop_gradient(cost), mask=mask, method=method)
    # The sum of many numbers of 16 bits may be too large for their type, where the mean is not.
    wide = cost.astype(jnp.promote_types(cost.dtype, jnp.float32))
    return (matching.matched_cost(wide, assignment) / size).astype(cost.dtype)


def chamfer_loss(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch m d"],
    *,
    target_mask: Bool[AnyArray, "batch m"] | None = None,
    prediction_mask: Bool[AnyArray, "batch n"] | None = None,
    weights: Float[AnyArray, " d"] | None = None,
) -> Float[Array, " batch"]:
    """Squared distance to the nearest element of the other set, both ways (arXiv 1906.06565).

    Mean over d, mean over the elements of each set, the two directions added. Cheaper than the
    Hungarian loss and blind to multiplicity: two targets may share one prediction.

    Args:
        prediction: n elements.
        target: m elements.
        target_mask: True for the target elements that are there; absent ones are nobody's
            neighbour. A set with no element has loss 0.
        prediction_mask: the same of the predicted elements, where their number is known.
        weights: one number >= 0 for every feature, by which its square is multiplied; 1 for all by
            default.

    Example:
        >>> prediction, target = jnp.array([[[1.0], [4.0]]]), jnp.array([[[4.0], [3.0]]])
        >>> chamfer_loss(prediction, target).tolist()
        [2.5]
    """
    target = _without_absent("target_mask", target, target_mask)
    prediction = _without_absent("prediction_mask", prediction, prediction_mask)
    distance = pairwise_squared(prediction, target, weights=weights)
    if target_mask is None and prediction_mask is None:
        loss = jnp.mean(jnp.min(distance, 1), -1) + jnp.mean(jnp.min(distance, 2), -1)
    else:
        rows, columns = _present(distance, prediction_mask, target_mask)
        loss = _nearest(distance, rows, columns)
        loss += _nearest(jnp.swapaxes(distance, 1, 2), columns, rows)
    # XLA's minimum of many numbers may pass over NaN on a CPU.
    return loss * jnp.where(jnp.any(jnp.isnan(distance), (1, 2)), jnp.nan, 1)


def _present(pairs, prediction_mask, target_mask):
    """Which rows and columns of [batch, n, m] are there."""
    batch, n, m = pairs.shape
    rows = jnp.ones((batch, n), bool) if prediction_mask is None else prediction_mask
    return rows, jnp.ones((batch, m), bool) if target_mask is None else target_mask


def _enough(predicted, wanted, size):
    """`size`, and NaN for sets with fewer elements than are wanted: they would seem perfect."""
    few = predicted < wanted
    if not _check.is_traced(few) and np.any(few):
        at = int(np.argmax(few))
        raise ValueError(
            "prediction_mask: expected at least as many elements as targets, got "
            f"{int(predicted[at])} of {int(wanted[at])} in set {at}"
        )
    return jnp.where(few, jnp.nan, size)


def _nearest(distance, rows, columns):
    """Mean over the rows that are there of the distance to the nearest column that is there."""
    both = rows & jnp.any(columns, -1, keepdims=True)
    nearest = jnp.min(jnp.where(columns[:, None], distance, jnp.inf), 2)
    # As in `hungarian_loss`, a sum of 16 bits may be too large for its type.
    wide = jnp.promote_types(distance.dtype, jnp.float32)
    total = jnp.sum(jnp.where(both, nearest, 0).astype(wide), -1)
    return (total / jnp.maximum(jnp.sum(rows, -1), 1)).astype(distance.dtype)


def _without_absent(name, sets, mask):
    """Zeros in place of the absent elements: of NaN there, a gradient would be NaN."""
    if mask is None:
        return sets
    _check.require_mask(name, mask, jnp.shape(sets)[:2], "batch m")
    return jnp.where(mask[..., None], sets, 0)


def _checked_sets(prediction, target):
    """Both sets as floating-point arrays: differences of integers wrap around."""
    for name, sets in (("prediction", prediction), ("target", target)):
        if hasattr(sets, "sets"):
            raise TypeError(
                f"{name}: expected an array, got a {type(sets).__name__}: take its sets"
            )
        _check.require_rank(name, sets, 3, "batch n d")
        _check.require_nonempty(name, sets, "batch n d")
        dtype = jnp.result_type(sets)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{name}: expected real numbers, got dtype {dtype}")
    if prediction.shape[0] != target.shape[0] or prediction.shape[2] != target.shape[2]:
        raise ValueError(
            "target: expected batch and d as in prediction "
            f"{prediction.shape}, got shape {target.shape}"
        )
    if not jnp.issubdtype(jnp.result_type(prediction, target), jnp.floating):
        return jnp.asarray(prediction, float), jnp.asarray(target, float)
    return prediction, target


def _weighted_mean(values, weights):
    if weights is None:
        return jnp.mean(values, -1)
    weights = jnp.asarray(weights)
    _check.require_shape("weights", weights, values.shape[-1:], "d")
    if not _check.is_traced(weights) and not np.all(np.asarray(weights) >= 0):
        raise ValueError(f"weights: expected numbers >= 0, got {weights}")
    return jnp.mean(weights * values, -1)


NUMBERING_COSTS = ("l2", "ce")


def numbering_assignment(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch n d"],
    classes: Float[AnyArray, "batch n num_classes"],
    *,
    cost: str = "l2",
    method: matching.Method = "auto",
) -> Int[Array, "batch n"]:
    """Match every predicted element to a target element of its own class, at least total cost.

    Row i of prediction and of target belong to the same input element; within a class any order is
    right (paper, section 4.1). Other classes are kept apart by a cost that no matching within the
    classes can reach, so the result is exact for costs of any size.

    Args:
        prediction: for cost "l2" points, for "ce" logits.
        target: one-hot numbers.
        classes: one-hot classes of the input elements.
        cost: "l2", Euclidean distance, or "ce", cross-entropy.
        method: solver of the assignment problem, see `assign`.

    Returns:
        For every element of prediction, in order, the index of its target. Where the prediction is
        not finite, `INVALID`, of which `numbering_loss` makes NaN.

    Example:
        >>> target = jnp.eye(3)[None]
        >>> classes = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # two of one kind, and one
        >>> numbering_assignment(target[:, jnp.array([1, 0, 2])], target, classes).tolist()
        [[1, 0, 2]]
        >>> numbering_assignment(target[:, jnp.array([2, 1, 0])], target, classes).tolist()
        [[0, 1, 2]]
    """
    prediction, target = _checked_sets(prediction, target)
    _check.require_shape("target", target, prediction.shape, "batch n d")
    _check.require_rank("classes", classes, 3, "batch n num_classes")
    if classes.shape[:2] != prediction.shape[:2]:
        raise ValueError(
            f"classes: expected [batch, n] = {prediction.shape[:2]} as in prediction, "
            f"got shape {classes.shape}"
        )
    if not _check.is_traced(classes):
        values = np.asarray(classes)
        one_hot = ((values == 0) | (values == 1)).all(-1) & (values.sum(-1) == 1)
        if not one_hot.all():
            raise ValueError(f"classes: expected one-hot rows, got {values[~one_hot][0]}")
    _check.require_choice("cost", cost, NUMBERING_COSTS)
    prediction, target = lax.stop_gradient((prediction, target))
    # What is farther apart than any two may be is out of the range of float16.
    wide = jnp.promote_types(jnp.result_type(prediction, target), jnp.float32)
    prediction, target = prediction.astype(wide), target.astype(wide)
    if cost == "l2":
        pairs = _distance(prediction[:, :, None] - target[:, None])
    else:
        pairs = -jnp.einsum("bid,bjd->bij", jax.nn.log_softmax(prediction), target)
    same = jnp.einsum("bic,bjc->bij", classes, classes) > 0.5
    lowest, highest = (f(pairs, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    apart = highest + pairs.shape[-1] * (highest - lowest) + 1
    # NaN must stay where it is, so that the assignment can report it.
    return matching.assign(jnp.where(same, pairs, apart), method=method)


def numbering_loss(
    prediction: Float[AnyArray, "batch n d"],
    target: Float[AnyArray, "batch n d"],
    classes: Float[AnyArray, "batch n num_classes"],
    *,
    cost: str = "l2",
    method: matching.Method = "auto",
    assignment: Int[AnyArray, "batch n"] | None = None,
) -> Float[Array, " batch"]:
    """Loss of class-specific numbering: cost of the best matching within classes, mean over pairs.

    The loss of the paper's section 4.1.

    Args:
        prediction: for cost "l2" points (DSPN, iDSPN), for "ce" logits (all other models).
        target: one-hot numbers.
        classes: one-hot classes of the input elements.
        cost: "l2", Euclidean distance (not squared), or "ce", cross-entropy.
        method: solver of the assignment problem, see `assign`.
        assignment: what `numbering_assignment` found, if it is known already.

    Example:
        >>> target, classes = jnp.eye(3)[None], jnp.ones((1, 3, 1))
        >>> numbering_loss(target[:, ::-1], target, classes).tolist()
        [0.0]
    """
    prediction, target = _checked_sets(prediction, target)
    if assignment is None:
        assignment = numbering_assignment(prediction, target, classes, cost=cost, method=method)
    _check.require_choice("cost", cost, NUMBERING_COSTS)
    matched = jnp.take_along_axis(target, assignment[..., None], axis=1)
    if cost == "l2":
        return jnp.mean(_distance(prediction - matched), -1)
    return jnp.mean(-jnp.sum(jax.nn.log_softmax(prediction) * matched, -1), -1)


def _distance(difference: Float[AnyArray, "*any d"]) -> Float[Array, "*any"]:
    """l2 norm, with derivative zero rather than NaN at zero: the simplex has corners to sit in."""
    # Squares of 16 bits would leave the range of float16.
    wide = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    squared = jnp.sum(jnp.square(wide), -1)
    zero = squared == 0
    norm = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))
    return norm.astype(difference.dtype)
