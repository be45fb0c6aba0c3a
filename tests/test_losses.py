import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msdspn_jax as ms

KEYS = jax.random.split(jax.random.key(0), 3)
PREDICTION = jax.random.normal(KEYS[0], (3, 5, 2))
TARGET = jax.random.normal(KEYS[1], (3, 4, 2))
MASK = jnp.array([[True, False, True, True], [False, True, False, False], [False] * 4])


def smooth_l1(a, b):
    difference = np.abs(np.asarray(a) - np.asarray(b))
    return np.mean(np.where(difference < 1, 0.5 * difference**2, difference - 0.5), -1)


def by_enumeration(prediction, target):
    """Least mean cost over all ways to give every target a prediction of its own."""
    m = len(target)
    return min(
        np.mean([smooth_l1(prediction[i], target[j]) for j, i in enumerate(chosen)])
        for chosen in itertools.permutations(range(len(prediction)), m)
    )


@pytest.mark.parametrize("method", ["device", "host"])
def test_hungarian_equals_enumeration(method):
    expected = [by_enumeration(p, t) for p, t in zip(PREDICTION, TARGET, strict=True)]
    loss = ms.hungarian_loss(PREDICTION, TARGET, method=method)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_hungarian_with_mask_equals_the_present_targets():
    loss = ms.hungarian_loss(PREDICTION, TARGET, target_mask=MASK)
    expected = [by_enumeration(PREDICTION[i], TARGET[i][MASK[i]]) for i in range(2)]
    np.testing.assert_allclose(loss[:2], expected, rtol=1e-5)
    assert float(loss[2]) == 0


def test_chamfer_with_mask_equals_the_present_targets():
    loss = ms.chamfer_loss(PREDICTION, TARGET, target_mask=MASK)
    for i in range(2):
        kept = TARGET[i][MASK[i]][None]
        chex.assert_trees_all_close(loss[i], ms.chamfer_loss(PREDICTION[i : i + 1], kept)[0])
    assert float(loss[2]) == 0
    grads = jax.grad(lambda p: jnp.sum(ms.chamfer_loss(p, TARGET, target_mask=MASK)))(PREDICTION)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("loss", [ms.hungarian_loss, ms.chamfer_loss])
def test_invariant_to_both_orders_and_zero_on_equal_sets(loss):
    loss = jax.jit(loss)
    value = loss(PREDICTION, TARGET)
    shuffled = loss(PREDICTION[:, ::-1], TARGET[:, jnp.array([1, 3, 0, 2])])
    chex.assert_trees_all_close(value, shuffled, atol=1e-6)
    chex.assert_trees_all_close(loss(TARGET, TARGET[:, ::-1]), jnp.zeros(3), atol=1e-6)


def test_gradient_is_that_of_the_matched_pairs():
    with jax.enable_x64(True):
        prediction, target = (jnp.asarray(x, jnp.float64) for x in (PREDICTION, TARGET))
        grads = jax.grad(lambda p: jnp.sum(ms.hungarian_loss(p, target)))(prediction)
        eps, direction = 1e-6, jax.random.normal(KEYS[2], prediction.shape)
        up, down = (
            jnp.sum(ms.hungarian_loss(prediction + sign * eps * direction, target))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(jnp.sum(grads * direction), (up - down) / (2 * eps), rtol=1e-6)


def test_nan_becomes_nan_and_stays_in_its_set():
    broken = PREDICTION.at[1, 0, 0].set(jnp.nan)
    for loss in (ms.hungarian_loss, ms.chamfer_loss):
        value = jax.jit(loss)(broken, TARGET)
        np.testing.assert_array_equal(jnp.isnan(value), [False, True, False])


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("loss", [ms.hungarian_loss, ms.chamfer_loss])
def test_errors(loss):
    with pytest.raises(ValueError, match="prediction: expected 3 axes"):
        loss(PREDICTION[0], TARGET)
    with pytest.raises(ValueError, match="target: expected batch and d"):
        loss(PREDICTION, TARGET[..., :1])
    with pytest.raises(ValueError, match="target: expected every axis"):
        loss(PREDICTION, TARGET[:, :0])
    with pytest.raises(ValueError, match="target_mask: expected shape"):
        loss(PREDICTION, TARGET, target_mask=MASK[:, :3])
    if loss is ms.hungarian_loss:
        with pytest.raises(ValueError, match="target: expected at most n = 4"):
            loss(TARGET, PREDICTION)


WEIGHTS = np.array([0.5, 3.0], np.float32)


def test_weights_of_features_count_in_matching_and_value():
    cost = np.abs(np.asarray(PREDICTION)[:, :, None] - np.asarray(TARGET)[:, None])
    cost = WEIGHTS * np.where(cost < 1, 0.5 * cost**2, cost - 0.5)
    expected = [
        min(
            np.mean([c[i, j] for j, i in enumerate(chosen)])
            for chosen in itertools.permutations(range(5), 4)
        )
        for c in cost.mean(-1)
    ]
    loss = ms.hungarian_loss(PREDICTION, TARGET, weights=WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # A weight of the squares is a scale of its root.
    scale = np.sqrt(WEIGHTS)
    loss = ms.chamfer_loss(PREDICTION, TARGET, weights=WEIGHTS, target_mask=MASK)
    expected = ms.chamfer_loss(PREDICTION * scale, TARGET * scale, target_mask=MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_weights_of_other_features_are_refused():
    with pytest.raises(ValueError, match=r"weights: expected shape \(2,\) \[d\], got \(3,\)"):
        ms.hungarian_loss(PREDICTION, TARGET, weights=np.ones(3))


@pytest.mark.usefixtures("without_hook")
def test_classes_that_are_not_one_hot_are_refused():
    target, classes = jnp.eye(2)[None], jnp.array([[[1.0, 0.0], [0.6, 0.4]]])
    with pytest.raises(ValueError, match=r"classes: expected one-hot rows, got \[0\.6 0\.4\]"):
        ms.numbering_loss(target, target, classes)


@pytest.mark.parametrize("loss", [ms.hungarian_loss, ms.set_loss(cost=ms.pairwise_smooth_l1)])
def test_the_gradient_of_what_is_not_finite_is_nan_too(loss):
    prediction = jnp.array([[[jnp.nan], [4.0], [5.0]], [[1.5], [3.0], [0.0]]])
    found = jax.jit(jax.vmap(jax.grad(lambda p: loss(p[None], TARGET[:1, :2, :1]).sum())))(
        prediction
    )
    assert jnp.isnan(found[0]).all()
    assert jnp.isfinite(found[1]).all()


def test_hungarian_loss_of_many_elements_of_16_bits():
    prediction, target = (
        jnp.full((1, 300, 1), 400, jnp.float16),
        jnp.zeros((1, 300, 1), jnp.float16),
    )
    loss = ms.hungarian_loss(prediction, target)
    assert (loss.dtype, loss.item()) == (jnp.float16, 399.5)


@pytest.mark.parametrize("loss", [ms.hungarian_loss, ms.chamfer_loss])
def test_absent_targets_may_hold_nan(loss):
    prediction, mask = jnp.array([[[1.5], [4.0]]]), jnp.array([[True, False]])

    def value(absent):
        target = jnp.array([[[1.0], [absent]]])
        return jax.value_and_grad(lambda p: loss(p, target, target_mask=mask).sum())(prediction)

    chex.assert_trees_all_equal(value(jnp.nan), value(0.0))


@pytest.mark.usefixtures("without_hook")
def test_integers_do_not_wrap_around():
    a, b = jnp.array([[[1], [4]]], jnp.uint8), jnp.array([[[4], [3]]], jnp.uint8)
    for loss in (ms.hungarian_loss, ms.chamfer_loss):
        chex.assert_trees_all_equal(loss(a, b), loss(1.0 * a, 1.0 * b))


def test_absent_predictions_take_no_target():
    prediction = jnp.array([[[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]]])
    target = jnp.array([[[0.0, 0.0], [9.0, 9.0], [0.0, 0.0]]])
    mask = jnp.array([[True, True, False]])

    def loss(of, prediction):
        return of(prediction, target, target_mask=mask, prediction_mask=mask)[0]

    for of in (ms.hungarian_loss, ms.chamfer_loss):
        value, gradient = jax.value_and_grad(loss, argnums=1)(of, prediction)
        assert value == of(prediction[:, :2], target[:, :2])[0]
        assert np.all(np.asarray(gradient[0, 1]) != 0)
        chex.assert_trees_all_equal(gradient[0, 2], jnp.zeros(2))
        nan = prediction.at[0, 2].set(jnp.nan)
        assert loss(of, nan) == value


@pytest.mark.parametrize("of", [ms.hungarian_loss, ms.chamfer_loss])
def test_sets_without_elements_have_loss_zero(of):
    sets = jnp.ones((1, 2, 3))
    nobody = jnp.zeros((1, 2), bool)
    value, gradient = jax.value_and_grad(
        lambda x: of(x, sets, prediction_mask=nobody, target_mask=nobody)[0]
    )(2 * sets)  # fmt: skip
    assert value == 0
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(sets))


def test_fewer_predictions_than_targets_are_no_perfect_match():
    sets, mask = jnp.ones((2, 2, 3)), jnp.array([[True, True], [True, False]])
    with pytest.raises(ValueError, match=r"prediction_mask: .* got 1 of 2 in set 1"):
        ms.hungarian_loss(sets, sets, prediction_mask=mask)
    loss = jax.jit(ms.hungarian_loss)(sets, sets, prediction_mask=mask)
    np.testing.assert_array_equal(loss, [0.0, np.nan])


@pytest.mark.usefixtures("without_hook")
def test_what_is_wrong_with_a_prediction_is_said_of_the_prediction():
    sets = jnp.ones((1, 2, 3))
    minimum = ms.minimise(
        lambda params, sets, context: jnp.sum(sets**2, (1, 2)), {}, None, sets, num_steps=1
    )
    with pytest.raises(TypeError, match="prediction: expected an array, got a Minimum"):
        ms.hungarian_loss(minimum, sets)  # type: ignore[arg-type]
    for name, arguments in (("prediction", (sets / 0, sets)), ("target", (sets, sets / 0))):
        with pytest.raises(ValueError, match=f"{name}: expected finite values, got 6"):
            ms.hungarian_loss(*arguments)
    with pytest.raises(TypeError, match="target: expected an array, got a list"):
        ms.chamfer_loss(sets, [[[1.0, 2.0, 3.0]]])  # type: ignore[arg-type]
    # Its imaginary part would be lost.
    with pytest.raises(TypeError, match="prediction: expected real numbers, got dtype complex64"):
        ms.hungarian_loss(sets + 1j, sets)


@pytest.mark.usefixtures("without_hook")
def test_weights_may_be_a_list():
    prediction, target = jnp.ones((1, 2, 2)), jnp.zeros((1, 2, 2))
    expected = ms.hungarian_loss(prediction, target, weights=jnp.array([1.0, 2.0]))
    chex.assert_trees_all_equal(
        ms.hungarian_loss(prediction, target, weights=[1.0, 2.0]),
        expected,  # type: ignore[arg-type]
    )


def test_numbering_distances_of_16_bits_stay_in_range():
    prediction, target = jnp.full((1, 2, 64), 40, jnp.float16), jnp.zeros((1, 2, 64), jnp.float16)
    loss = jax.jit(ms.numbering_loss)(prediction, target, jnp.ones((1, 2, 1), jnp.float16))
    assert (loss.dtype, loss.item()) == (jnp.float16, 320)


@pytest.mark.usefixtures("without_hook")
def test_numbering_distances_of_integers_are_those_of_floats():
    prediction = jnp.array([[[1, 1, 0], [0, 3, 1], [2, 0, 1]]])
    target, classes = jnp.eye(3, dtype=int)[None], jnp.ones((1, 3, 1))
    expected = ms.numbering_loss(prediction.astype(float), target.astype(float), classes)
    np.testing.assert_allclose(ms.numbering_loss(prediction, target, classes), expected, rtol=1e-6)
    assert expected[0] % 1 > 0.01
    unsigned = [np.array(x, np.uint8) for x in ([[[0, 2]]], [[[1, 0]]])]
    np.testing.assert_allclose(ms.numbering_loss(*unsigned, np.ones((1, 1, 1))), 5**0.5, rtol=1e-6)


def test_a_mask_of_all_changes_no_loss_of_16_bits():
    prediction, target = jnp.full((1, 300, 1), 17, jnp.float16), jnp.zeros((1, 300, 1), jnp.float16)
    mask = jnp.ones((1, 300), bool)
    np.testing.assert_allclose(ms.chamfer_loss(prediction, target, target_mask=mask), 578)
    far = jnp.full((1, 64, 8), 4000, jnp.float16)
    loss = jax.jit(ms.numbering_loss)(far, 0 * far, jnp.ones((1, 64, 1), jnp.float16))
    np.testing.assert_allclose(loss, 4000 * 8**0.5, rtol=1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_nan_among_many_elements_becomes_nan(which):
    sets = [np.random.default_rng(which).normal(size=(2, 128, 2)).astype("f") for _ in range(2)]
    sets[which][0, 127, 1] = np.nan
    for mask in (None, jnp.ones((2, 128), bool)):
        found = jax.jit(lambda a, b, mask: ms.chamfer_loss(a, b, target_mask=mask))(*sets, mask)
        assert np.isnan(found[0])
        assert np.isfinite(found[1])
