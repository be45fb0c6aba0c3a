"""A Hungarian loss with terms of its own, as DETR has it: classes, boxes, and no object.

Boxes are (x, y, w, h): centre, width and height, in any unit; in DETR as shares of the image
(Carion et al. 2020, arXiv 2005.12872, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax import _check, matching
from msdspn_jax._check import AnyArray
from msdspn_jax.matching.assignment import INVALID, Method
from msdspn_jax.matching.bottleneck import assign_bottleneck

Matching = Literal["sum", "bottleneck"]
Normalise = Literal["set", "batch"]


class Term(NamedTuple):
    """A part of a set's loss: a mean over its matched pairs, and over what is left unmatched.

    Attributes:
        pair: the loss of every pair.
        alone: the loss of every prediction that is left unmatched; None: nothing.
        alone_weight: what an unmatched prediction weighs in the mean, where a pair weighs 1.
    """

    pair: Float[Array, "batch n m"]
    alone: Float[Array, "batch n"] | None = None
    alone_weight: float = 0.0


class Costs(NamedTuple):
    """What a cost of `set_loss` returns.

    Attributes:
        match: what the matching makes small, [batch, n, m]; no gradient flows through it.
        terms: whose sum is the loss.
    """

    match: Float[Array, "batch n m"]
    terms: tuple[Term, ...]


Cost = Callable[[Any, Any], Costs | Float[Array, "batch n m"]]


@dataclass(frozen=True)
class BoxCost:
    """The cost of `box_cost`: a function that compares equal where its weights are equal."""

    class_weight: float
    l1_weight: float
    giou_weight: float
    no_object_weight: float

    def __call__(
        self,
        prediction: tuple[Float[AnyArray, "batch n logits"], Float[AnyArray, "batch n 4"]],
        target: tuple[Int[AnyArray, "batch m"], Float[AnyArray, "batch m 4"]],
    ) -> Costs:
        """Costs of every predicted to every target object."""
        (logits, boxes), (labels, target_boxes) = prediction, target
        _check.require_rank("prediction[0]", logits, 3, "batch n num_classes+1")
        _check.require_shape("prediction[1]", boxes, (*logits.shape[:2], 4), "batch n 4")
        _check.require_rank("target[0]", labels, 2, "batch m")
        _check.require_shape("target[1]", target_boxes, (*labels.shape, 4), "batch m 4")
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"target[0]: expected integer classes, got dtype {labels.dtype}")
        classes = logits.shape[-1] - 1
        if not _check.is_traced(labels):
            values = np.asarray(labels)
            unknown = values[(values < 0) | (values >= classes)]
            if unknown.size:
                raise ValueError(
                    f"target[0]: expected classes from 0 to {classes - 1}, got {unknown[0]}"
                )
        known = (labels >= 0) & (labels < classes)
        log_probability = jax.nn.log_softmax(logits)
        # [batch, n, m]: of the class of every target.
        index = jnp.where(known, labels, 0)[:, None, :]
        of_target = jnp.take_along_axis(log_probability, index, axis=2)
        of_target = jnp.where(known[:, None, :], of_target, jnp.nan)
        l1 = jnp.sum(jnp.abs(boxes[:, :, None] - target_boxes[:, None]), -1)
        giou = generalised_iou(boxes[:, :, None], target_boxes[:, None])
        # The matching takes the probability, not its logarithm: DETR found it to do better.
        match = self.l1_weight * l1 - self.giou_weight * giou
        match = match - self.class_weight * jnp.exp(of_target)
        naming = Term(
            -self.class_weight * of_target,
            -self.class_weight * log_probability[..., -1],
            self.no_object_weight,
        )
        return Costs(match, (naming, Term(self.l1_weight * l1 + self.giou_weight * (1 - giou))))


def box_cost(
    *,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    no_object_weight: float = 0.1,
) -> BoxCost:
    """DETR's cost of objects with a class and a box, for `set_loss`; its weights by default.

    A prediction is a pair (logits [batch, n, num_classes + 1], boxes [batch, n, 4]), whose last
    logit is that of no object. A target is a pair (classes [batch, m], integers from 0, boxes
    [batch, m, 4]). Boxes are (x, y, w, h), see `generalised_iou`. Other integers are refused, and
    make the loss NaN under ``jit``.

    Args:
        class_weight: of the cross-entropy, and of the probability in the matching.
        l1_weight: of the sum of the four absolute differences.
        giou_weight: of 1 − generalised IoU.
        no_object_weight: what a prediction without a target counts in the mean of the
            cross-entropy, where a matched one counts 1.

    Example:
        >>> box_cost(giou_weight=0.0) == box_cost(giou_weight=0.0)
        True
    """
    weights = {
        "class_weight": class_weight,
        "l1_weight": l1_weight,
        "giou_weight": giou_weight,
        "no_object_weight": no_object_weight,
    }
    for name, value in weights.items():
        _check.require_nonnegative(name, value)
    return BoxCost(**weights)


@dataclass(frozen=True)
class SetLoss:
    """What `set_loss` returns: a function that compares equal where its parts are equal."""

    cost: Cost
    matching: Matching = "sum"
    normalise: Normalise = "set"
    method: Method = "auto"

    def __call__(
        self,
        prediction: Any,
        target: Any,
        *,
        target_mask: Bool[AnyArray, "batch m"] | None = None,
    ) -> Float[Array, " batch"]:
        """The loss of every set; ``target_mask`` is True for the targets that are there.

        Targets that are not there may hold anything: the cost sees zeros in their place.
        """
        costs = self.costs(prediction, _without_absent(target, target_mask))
        assignment = self._assign(costs, target_mask)
        matched = assignment[..., None] == jnp.arange(costs.match.shape[2])
        alone, pairs = ~jnp.any(matched, -1), jnp.sum(matched, (1, 2))
        invalid = jnp.any(assignment == INVALID, 1)
        # Of such a set every pair, so that not only the loss but also its gradient is NaN.
        matched |= invalid[:, None, None]
        # The sum of many numbers of 16 bits may be too large for their type, where the mean is not.
        wide = jnp.promote_types(costs.match.dtype, jnp.float32)
        total = jnp.zeros(len(costs.match), wide)
        for term in costs.terms:
            # Selected, not multiplied: what is not matched may be infinite.
            value = jnp.sum(jnp.where(matched, term.pair, 0), (1, 2), wide)
            weight = pairs.astype(wide)
            if term.alone is not None:
                value += term.alone_weight * jnp.sum(jnp.where(alone, term.alone, 0), 1, wide)
                weight += term.alone_weight * jnp.sum(alone, 1)
            if self.normalise == "batch":
                weight = jnp.broadcast_to(jnp.mean(weight), weight.shape)
            total += value / jnp.where(weight > 0, weight, 1)
        return (total * jnp.where(invalid, jnp.nan, 1)).astype(costs.match.dtype)

    def assign(
        self,
        prediction: Any,
        target: Any,
        *,
        target_mask: Bool[AnyArray, "batch m"] | None = None,
    ) -> Int[Array, "batch n"]:
        """The target of every prediction, `UNMATCHED` for those without."""
        costs = self.costs(prediction, _without_absent(target, target_mask))
        return self._assign(costs, target_mask)

    def costs(self, prediction: Any, target: Any) -> Costs:
        """What the cost says of every pair."""
        costs = self.cost(prediction, target)
        if not isinstance(costs, Costs):
            costs = Costs(costs, (Term(costs),))
        _check.require_rank("cost", costs.match, 3, "batch n m")
        batch, n, m = costs.match.shape
        if m > n:
            raise ValueError(f"target: expected at most n = {n} elements as predicted, got {m}")
        for i, term in enumerate(costs.terms):
            _check.require_shape(f"cost: terms[{i}].pair", term.pair, (batch, n, m), "batch n m")
            if term.alone is not None:
                _check.require_shape(f"cost: terms[{i}].alone", term.alone, (batch, n), "batch n")
        return costs

    def _assign(self, costs: Costs, target_mask: Any) -> Int[Array, "batch n"]:
        match, mask = lax.stop_gradient(costs.match), None
        if target_mask is not None:
            shape = (match.shape[0], match.shape[2])
            _check.require_mask("target_mask", target_mask, shape, "batch m")
            mask = (jnp.ones(match.shape[:2], bool), target_mask)
        assign = assign_bottleneck if self.matching == "bottleneck" else matching.assign
        return assign(match, mask=mask, method=self.method)


def _without_absent(target: Any, target_mask: Any) -> Any:
    """The target with zeros where it is absent, in all arrays that begin as the mask does."""
    if target_mask is None:
        return target

    def present(leaf):
        shape = jnp.shape(target_mask)
        if jnp.shape(leaf)[: len(shape)] != shape:
            return leaf
        # Zeros of its own type: booleans stay booleans.
        mask = jnp.reshape(target_mask, shape + (1,) * (jnp.ndim(leaf) - 2))
        return jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(present, target)


def set_loss(
    *,
    cost: Cost,
    matching: Matching = "sum",
    normalise: Normalise = "set",
    method: Method = "auto",
) -> SetLoss:
    """A Hungarian loss with a cost of one's own.

    The result is a function ``(prediction, target, target_mask=None) -> [batch]``, to be averaged
    over the batch. Predictions and targets are whatever the cost takes. The loss is that of the
    pairs of the best matching, each term divided by their number.

    Args:
        cost: ``(prediction, target) -> [batch, n, m]``, the cost of every pair, differentiable, in
            which n ≥ m; for example `box_cost`. One whose loss is not what is matched by, or with
            a loss for what is left over, returns `Costs`.
        matching: what the matching makes small: the "sum" of the costs, or "bottleneck", the
            largest of them, and then the sum (`assign_bottleneck`).
        normalise: "set": every set's terms are means over its own pairs. "batch": the mean of the
            result over the batch is a mean over all its pairs, as in DETR, so that larger sets
            count more. Under ``jax.shard_map`` the batch is that of the shard.
        method: solver of the assignment problem, see `assign`.

    Raises:
        ValueError: from the function, shapes that do not fit, more targets than predictions, NaN or
            infinity in concrete costs; under ``jit`` such a set has loss NaN.

    Example:
        >>> loss = set_loss(cost=box_cost(class_weight=1.0, l1_weight=5.0, giou_weight=2.0))
        >>> box = jnp.array([0.5, 0.5, 0.2, 0.2])
        >>> logits = jnp.array([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])  # two classes, no object
        >>> prediction = logits, jnp.stack([box, box + 0.1])[None]
        >>> target = jnp.array([[0, 1]]), jnp.stack([box, box])[None]
        >>> there = jnp.array([[True, False]])
        >>> [round(float(x), 4) for x in loss(prediction, target, target_mask=there)]
        [0.0002]
        >>> set_loss(cost=lambda y, t: jnp.abs(y - t.mT))(jnp.ones((1, 2, 1)), jnp.zeros((1, 1, 1)))
        Array([1.], dtype=float32)
    """
    _check.require_choice("matching", matching, get_args(Matching))
    _check.require_choice("normalise", normalise, get_args(Normalise))
    _check.require_choice("method", method, get_args(Method))
    return SetLoss(cost, matching, normalise, method)


def iou(
    boxes: Float[AnyArray, "*#batch 4"], others: Float[AnyArray, "*#batch 4"]
) -> Float[Array, "*any"]:
    """Intersection over union of boxes (x, y, w, h), centre and size; from 0 to 1.

    A negative width or height counts as zero, and so does the ratio of two boxes without area.

    Args:
        boxes: [..., 4].
        others: [..., 4]; the leading axes broadcast, as in `generalised_iou`.

    Raises:
        ValueError: the last axis of one is not 4.

    Example:
        >>> box = jnp.array([0.5, 0.5, 1.0, 1.0])
        >>> iou(box, box).item(), iou(box, jnp.array([0.5, 0.5, 1.0, 0.5])).item()
        (1.0, 0.5)
    """
    boxes, others, dtype = _widened(boxes, others)
    inside, union, _ = _areas(boxes, others)
    return _ratio(inside, union).astype(dtype)


def generalised_iou(
    boxes: Float[AnyArray, "*#batch 4"], others: Float[AnyArray, "*#batch 4"]
) -> Float[Array, "*any"]:
    """Generalised intersection over union of boxes (x, y, w, h), centre and size; from −1 to 1.

    IoU less the share of the smallest box around both that neither covers (Rezatofighi et al. 2019,
    arXiv 1902.09630), so that it has a gradient where boxes do not meet. A negative width or height
    counts as zero.

    Args:
        boxes: [..., 4].
        others: [..., 4]; the leading axes broadcast: ``a[:, :, None]`` and ``b[:, None]`` give
            every pair.

    Raises:
        ValueError: the last axis of one is not 4.

    Example:
        >>> box = jnp.array([0.5, 0.5, 1.0, 1.0])
        >>> generalised_iou(box, box).item(), generalised_iou(box, box + jnp.eye(4)[0]).item()
        (1.0, 0.0)
    """
    boxes, others, dtype = _widened(boxes, others)
    inside, union, around = _areas(boxes, others)
    return (_ratio(inside, union) - _ratio(around - union, around)).astype(dtype)


def _widened(boxes, others):
    """Both in 32 bits or more, and the dtype of the result: areas of 16 bits, of boxes in pixels
    for one, would leave their range.
    """
    for name, array in (("boxes", boxes), ("others", others)):
        if jnp.ndim(array) == 0 or jnp.shape(array)[-1] != 4:
            raise ValueError(f"{name}: expected a last axis of 4, got shape {jnp.shape(array)}")
    dtype = jnp.result_type(boxes, others)
    wide = jnp.promote_types(dtype, jnp.float32)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return boxes.astype(wide), others.astype(wide), dtype if floating else wide


def _areas(boxes, others):
    """The areas of what two boxes share, of their union, and of the smallest box around both.

    From the distance of their centres: corners of boxes far from the origin would round to a grid
    that may be coarser than the boxes.
    """
    size, other_size = jnp.maximum(boxes[..., 2:], 0), jnp.maximum(others[..., 2:], 0)
    apart = jnp.abs(boxes[..., :2] - others[..., :2])
    reach = (size + other_size) / 2
    inside = jnp.minimum(jnp.minimum(size, other_size), reach - apart)
    inside = jnp.prod(jnp.maximum(inside, 0), -1)
    around = jnp.prod(jnp.maximum(jnp.maximum(size, other_size), reach + apart), -1)
    return inside, jnp.prod(size, -1) + jnp.prod(other_size, -1) - inside, around


def _ratio(a, b):
    """a / b, and 0 where b is; NaN where it is NaN."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
