"""The Hungarian loss with class and box terms, against DETR's own, written again with SciPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import msdspn_jax as ms

N, M, CLASSES, BATCH = 5, 3, 4, 6


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(BATCH, N, CLASSES + 1)).astype(np.float32)
    boxes, others = (rng.uniform(0.1, 0.9, (BATCH, k, 4)).astype(np.float32) for k in (N, M))
    labels = rng.integers(0, CLASSES, (BATCH, M))
    mask = np.arange(M) < np.array([3, 1, 2, 0, 3, 2])[:, None]
    return (jnp.asarray(logits), jnp.asarray(boxes)), (jnp.asarray(labels), others), mask


def giou(a, b):
    """One pair, as Rezatofighi et al. have it, on corners."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    inside = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    inside *= max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    around = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    around *= max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    union = aw * ah + bw * bh - inside
    return inside / union - (around - union) / around


def detr(prediction, target, mask, *, weights=(1.0, 5.0, 2.0), no_object=0.1):
    """DETR's losses, over a whole batch: weighted cross-entropy, and boxes by their number."""
    (logits, boxes), (labels, others) = (jax.tree.map(np.asarray, x) for x in (prediction, target))
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ce = weight = box = count = 0.0
    for b in range(len(logits)):
        there = np.flatnonzero(mask[b])
        l1 = np.abs(boxes[b][:, None] - others[b][there]).sum(-1)
        overlap = np.array([[giou(x, y) for y in others[b][there]] for x in boxes[b]])
        overlap = overlap.reshape(N, len(there))
        cost = -weights[0] * np.exp(log_probability[b][:, labels[b][there]])
        cost = cost + weights[1] * l1 - weights[2] * overlap
        rows, columns = linear_sum_assignment(cost)
        wanted = np.full(N, CLASSES)
        wanted[rows] = labels[b][there][columns]
        w = np.where(wanted == CLASSES, no_object, 1.0)
        ce -= (w * log_probability[b][np.arange(N), wanted]).sum()
        weight += w.sum()
        box += (weights[1] * l1 + weights[2] * (1 - overlap))[rows, columns].sum()
        count += len(there)
    return weights[0] * ce / weight + box / max(count, 1)


def test_the_mean_over_a_batch_is_detrs_loss(problem):
    prediction, target, mask = problem
    loss = ms.set_loss(cost=ms.box_cost(), normalise="batch")
    found = jax.jit(loss)(prediction, target, target_mask=mask)
    assert found.shape == (BATCH,)
    assert found.mean() == pytest.approx(detr(prediction, target, mask), rel=1e-5)


def test_by_set_it_is_detrs_loss_of_a_batch_of_one(problem):
    prediction, target, mask = problem
    cost = ms.box_cost(class_weight=2.0, l1_weight=1.0, giou_weight=3.0, no_object_weight=0.5)
    found = ms.set_loss(cost=cost)(prediction, target, target_mask=mask)
    for b in range(BATCH):
        one = jax.tree.map(lambda x, b=b: x[b : b + 1], (prediction, target, mask))
        expected = detr(*one, weights=(2.0, 1.0, 3.0), no_object=0.5)
        assert found[b] == pytest.approx(expected, rel=1e-5)


def test_its_gradient_moves_boxes_and_classes_and_is_finite(problem):
    prediction, target, mask = problem
    loss = ms.set_loss(cost=ms.box_cost())

    def total(prediction):
        return loss(prediction, target, target_mask=mask).sum()

    logits, boxes = jax.jit(jax.grad(total))(prediction)
    assert np.isfinite(logits).all()
    assert np.isfinite(boxes).all()
    # The set without an object is told so by its classes alone.
    assert np.abs(logits[3]).min() > 0
    assert not np.abs(boxes[3]).any()
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, prediction, (logits, boxes))
    assert total(moved) < total(prediction)


def test_a_cost_of_ones_own_is_a_hungarian_loss():
    rng = np.random.default_rng(1)
    y, t = (rng.normal(size=(3, n, 2)).astype(np.float32) for n in (4, 4))
    found = ms.set_loss(cost=ms.pairwise_smooth_l1)(y, t)
    np.testing.assert_allclose(found, ms.hungarian_loss(y, t), rtol=1e-6)


def test_what_is_not_finite_makes_nan_under_jit_and_errors_without(problem):
    (logits, boxes), target, mask = problem
    bad = logits, boxes.at[0, 0, 0].set(jnp.nan)
    loss = ms.set_loss(cost=ms.box_cost())
    found = jax.jit(loss)(bad, target, target_mask=mask)
    assert np.isnan(found[0])
    assert np.isfinite(found[1:]).all()
    with pytest.raises(ValueError, match="cost: expected finite numbers"):
        loss(bad, target, target_mask=mask)


@pytest.mark.usefixtures("without_hook")
def test_shapes_that_do_not_fit_are_named(problem):
    (logits, boxes), (labels, others), mask = problem
    loss = ms.set_loss(cost=ms.box_cost())
    with pytest.raises(ValueError, match=r"prediction\[1\]: expected shape \(6, 5, 4\)"):
        loss((logits, boxes[..., :3]), (labels, others))
    with pytest.raises(TypeError, match=r"target\[0\]: expected integer classes, got dtype float"):
        loss((logits, boxes), (others[..., 0], others))
    with pytest.raises(ValueError, match=r"target_mask: expected shape \(6, 3\)"):
        loss((logits, boxes), (labels, others), target_mask=mask[:, :2])
    with pytest.raises(ValueError, match="target: expected at most n = 2 elements as predicted"):
        loss((logits[:, :2], boxes[:, :2]), (labels, others))
    with pytest.raises(ValueError, match="matching: expected one of 'sum', 'bottleneck', got 'x'"):
        ms.set_loss(cost=ms.box_cost(), matching="x")
    with pytest.raises(ValueError, match="l1_weight: expected a number >= 0, got -1"):
        ms.box_cost(l1_weight=-1)


def test_iou_of_known_boxes():
    box = jnp.array([0.0, 0.0, 2.0, 2.0])
    assert ms.iou(box, box) == 1
    assert ms.iou(box, jnp.array([1.0, 0.0, 2.0, 2.0])) == pytest.approx(1 / 3)
    assert ms.iou(box, jnp.array([4.0, 0.0, 2.0, 2.0])) == 0
    assert ms.iou(jnp.zeros(4), jnp.zeros(4)) == 0
    for ratio in (ms.iou, ms.generalised_iou):
        assert np.isnan(ratio(box, box * np.nan))
    several = jnp.stack([box, box / 2, jnp.array([1.0, 1.0, 3.0, -1.0])])
    pairs = ms.iou(several[:, None], several[None])
    np.testing.assert_allclose(pairs, [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 0]])
    large = (100 * several).astype(jnp.float16)
    np.testing.assert_allclose(ms.iou(large[:, None], large[None]), pairs, atol=1e-3)


def test_generalised_iou_of_known_boxes():
    box = jnp.array([0.0, 0.0, 2.0, 2.0])
    assert ms.generalised_iou(box, box) == 1
    half = jnp.array([0.0, 0.0, 1.0, 2.0])
    assert ms.generalised_iou(box, half) == pytest.approx(0.5)
    away = jnp.array([4.0, 0.0, 2.0, 2.0])  # 2 by 2 between them, of 6 by 2 around
    assert ms.generalised_iou(box, away) == pytest.approx(-1 / 3)
    point = jnp.zeros(4)
    assert ms.generalised_iou(point, point) == 0
    assert np.isfinite(jax.grad(lambda b: ms.generalised_iou(b, point))(point)).all()


# --- the bottleneck matching ---


def brute_force(cost):
    """The least largest cost, and the least sum among matchings that have it."""
    n, m = cost.shape
    if n < m:
        cost, n, m = cost.T, m, n
    chosen = [cost[list(rows), range(m)] for rows in itertools.permutations(range(n), m)]
    least = min(x.max() for x in chosen)
    return least, min(x.sum() for x in chosen if x.max() == least)


@pytest.mark.parametrize("method", ["device", "host"])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_bottleneck_is_the_least_largest_cost_then_the_least_sum(shape, method):
    rng = np.random.default_rng(2)
    cost = rng.integers(-6, 7, (20, *shape)).astype(np.float32)
    found = np.asarray(ms.assign_bottleneck(cost, method=method))
    for matrix, row in zip(cost, found, strict=True):
        rows = np.flatnonzero(row >= 0)
        assert len(set(row[rows])) == len(rows) == min(shape)
        pairs = matrix[rows, row[rows]]
        assert (pairs.max(), pairs.sum()) == brute_force(matrix)


def test_bottleneck_with_a_mask_and_what_is_not_finite():
    cost = np.full((2, 3, 2), 9.0, np.float32)
    cost[0, :2, :2] = [[0, 4], [4, 7]]
    cost[0, 2] = np.nan
    cost[1, 0, 0] = np.inf
    mask = (np.array([[True, True, False]] * 2), np.ones((2, 2), bool))
    found = jax.jit(lambda c: ms.assign_bottleneck(c, mask=mask))(cost)
    assert found[0].tolist() == [1, 0, ms.UNMATCHED]
    assert (found[1] == ms.INVALID).all()
    with pytest.raises(ValueError, match=r"cost: expected finite numbers .* at index \(1, 0, 0\)"):
        ms.assign_bottleneck(cost, mask=mask)


def test_set_loss_with_the_bottleneck_matching():
    cost = jnp.array([[[0.0, 4.0], [4.0, 7.0]]])
    for matching, value in (("sum", 3.5), ("bottleneck", 4.0)):
        loss = ms.set_loss(cost=lambda y, t: cost + 0 * (y - t), matching=matching)
        assert loss(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))).tolist() == [value]


@pytest.mark.parametrize("label", [-1, 3])
def test_classes_that_do_not_exist_are_refused_where_they_count(label):
    logits, box = jnp.array([[[5.0, 0.0, 0.0, 1.0]]]), jnp.full((1, 1, 4), 0.5)
    loss, target = ms.set_loss(cost=ms.box_cost()), (jnp.array([[label]]), jnp.nan * box)
    with pytest.raises(
        ValueError, match=rf"target\[0\]: expected classes from 0 to 2, got {label}"
    ):
        loss((logits, box), (target[0], box))
    assert jnp.isnan(jax.jit(loss)((logits, box), (target[0], box))).all()
    absent = jnp.array([[False]])
    value, gradient = jax.value_and_grad(
        lambda logits: loss((logits, box), target, target_mask=absent).sum()
    )(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_boxes_of_16_bits_in_pixels():
    box = jnp.array([150.0, 150.0, 300.0, 300.0])
    expected = ms.generalised_iou(box, box + 10)
    found = ms.generalised_iou(box.astype(jnp.float16), (box + 10).astype(jnp.float16))
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_boxes_smaller_than_the_spacing_of_floats_at_their_place():
    box = jnp.array([1e5, 1e5, 1e-3, 1e-3])
    assert ms.iou(box, box) == ms.generalised_iou(box, box) == 1
    assert ms.iou(box, box * jnp.array([1, 1, 2, 1])) == pytest.approx(1 / 2)
    assert ms.generalised_iou(box, box + jnp.eye(4)[0]) < -0.7


@pytest.mark.parametrize("normalise", ["set", "batch"])
def test_sums_of_16_bits_stay_in_range(normalise):
    values = jnp.full((2, 300, 1), 400.0, jnp.float16)
    loss = ms.set_loss(cost=lambda y, t: jnp.abs(y - t.mT), normalise=normalise)
    found = loss(values, jnp.zeros_like(values))
    assert found.dtype == jnp.float16
    assert found.tolist() == [400, 400]


@pytest.mark.usefixtures("without_hook")
def test_boxes_in_whole_pixels_are_numbers_like_others():
    boxes, others = np.array([10, 10, 10, 10]), np.array([15, 10, 10, 10])
    assert ms.generalised_iou(jnp.asarray(boxes), jnp.asarray(others)).item() == pytest.approx(
        1 / 3
    )


def test_a_mask_keeps_the_type_of_the_target():
    def cost(prediction, target):
        points, flag = target
        far = jnp.abs(prediction[:, :, None, 0] - points[:, None, :, 0])
        return far + 10.0 * (~flag)[:, None, :]

    prediction = jnp.array([[[0.0], [1.0], [2.0]]])
    target = (jnp.array([[[0.0], [1.0]]]), jnp.array([[True, False]]))
    loss = ms.set_loss(cost=cost)
    found = loss(prediction, target, target_mask=jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(found, loss(prediction, target))
