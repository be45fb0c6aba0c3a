import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import msdspn_jax as ms
from msdspn_jax.ranks import select_by_rank


def reference_fspool(features, weight):
    return np.sum(np.sort(np.asarray(features, np.float64), axis=-2) * np.asarray(weight), -2)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# Small integers: ties everywhere.
tied = hnp.arrays(np.float32, (2, 6, 3), elements=st.integers(-1, 1).map(float))


@given(tied)
@settings(max_examples=50, deadline=None)
def test_ranks_are_a_stable_permutation(features):
    expected = np.argsort(np.argsort(features, axis=1, kind="stable"), axis=1, kind="stable")
    for method in ("compare", "sort"):
        np.testing.assert_array_equal(ms.stable_ranks(features, method=method), expected)


@pytest.mark.parametrize("n", [17, 40])
def test_ranks_of_keys_under_ties(n):
    features = np.random.default_rng(n).integers(-3, 4, (2, n, 5)).astype(np.float32)
    # Zeros of either sign are equal; infinities and neighbouring numbers are not.
    features[0, :, 0] = np.where(np.arange(n) % 2, 0.0, -0.0)
    features[1, :6, 1] = [np.inf, 1 + 2**-23, -np.inf, 1, -1 - 2**-23, 3e38]
    expected = np.argsort(np.argsort(features, axis=1, kind="stable"), axis=1, kind="stable")
    ranks = jax.jit(ms.stable_ranks, static_argnames="method")
    np.testing.assert_array_equal(ranks(features, method="compare"), expected)
    np.testing.assert_array_equal(jax.vmap(ms.stable_ranks)(features), expected)
    weight = random(18, n, 5)
    grads = jax.grad(lambda w: jnp.sum(select_by_rank(w, expected) * features[:1]))(weight)
    reordered = np.zeros((n, 5), np.float32)
    for ranks_of_set in expected:
        np.add.at(reordered, (ranks_of_set, np.arange(5)), features[0])
    np.testing.assert_allclose(grads, reordered, atol=1e-5)


def test_ranks_of_other_precisions():
    features = random(19, 2, 24, 3)
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = features.astype(dtype)
        expected = ms.stable_ranks(rounded.astype(jnp.float32), method="sort")
        np.testing.assert_array_equal(ms.stable_ranks(rounded, method="compare"), expected)


@given(tied)
@settings(max_examples=30, deadline=None)
def test_fspool_equals_sorting_under_ties(features):
    weight = random(0, 6, 3)
    chex.assert_trees_all_close(
        ms.fspool(features, weight), reference_fspool(features, weight), atol=1e-5
    )


@pytest.mark.parametrize("n", [1, 2, 10, 70, 300])
@pytest.mark.parametrize("method", ["auto", "compare", "sort"])
def test_fspool_equals_sorting_at_any_size(n, method):
    features, weight = random(1, 2, n, 3), random(2, n, 3)
    pooled = jax.jit(ms.fspool, static_argnames="method")(features, weight, method=method)
    chex.assert_trees_all_close(pooled, reference_fspool(features, weight), rtol=1e-4, atol=1e-4)


def test_gradient_is_the_weight_of_the_rank():
    features, weight = random(3, 1, 5, 4), random(4, 5, 4)
    grads = jax.grad(lambda h: jnp.sum(ms.fspool(h, weight)))(features)
    chex.assert_trees_all_equal(
        grads[0], jnp.take_along_axis(weight, ms.stable_ranks(features)[0], 0)
    )


def test_equal_elements_get_different_gradients():
    weight = random(5, 4, 3)
    grads = jax.grad(lambda h: jnp.sum(ms.fspool(h, weight)))(jnp.ones((4, 3)))
    chex.assert_trees_all_equal(grads, weight)


def test_gradients_of_any_order():
    features, weight = random(6, 2, 5, 3), random(7, 5, 3)

    def function(features, weight):
        return jnp.sum(jnp.sin(ms.fspool(features**3, weight)))

    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (features, weight))
        check_grads(function, args, order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("pool", [ms.sum_pool, ms.mean_pool, None])
def test_mask_equals_leaving_out(pool):
    features = random(8, 2, 6, 3)
    mask = jnp.array([[True, False, True, True, False, False], [False] * 5 + [True]])
    weight = random(9, 6, 3)

    def pooled(features, mask=None):
        if pool is not None:
            return pool(features, mask=mask)
        return ms.fspool(features, weight[: features.shape[-2]], mask=mask)

    for row in range(2):
        kept = features[row][mask[row]]
        chex.assert_trees_all_close(pooled(features, mask)[row], pooled(kept), atol=1e-6)
    garbage = jnp.where(mask[..., None], features, jnp.nan)
    chex.assert_trees_all_equal(pooled(garbage, mask), pooled(features, mask))
    grads = jax.grad(lambda h: jnp.sum(pooled(h, mask) ** 2))(features)
    chex.assert_trees_all_equal(jnp.where(mask[..., None], 0, grads), jnp.zeros_like(grads))
    chex.assert_tree_all_finite(grads)


def test_empty_set_pools_to_zero():
    features, mask = random(10, 1, 3, 2), jnp.zeros((1, 3), bool)
    for pooled in (
        ms.sum_pool(features, mask=mask),
        ms.mean_pool(features, mask=mask),
        ms.fspool(features, random(11, 3, 2), mask=mask),
        ms.fspool(features, ms.continuous_weight(random(12, 4, 2), mask), mask=mask),
    ):
        chex.assert_trees_all_equal(pooled, jnp.zeros((1, 2)))


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_continuous_weight_interpolates_the_relative_position(size):
    knots = random(13, 4, 2)
    mask = jnp.arange(8) < size
    weight = ms.continuous_weight(knots, mask[None])[0]
    position = np.arange(size) / max(size - 1, 1) * 3
    for c in range(2):
        expected = np.interp(position, np.arange(4), knots[:, c])
        np.testing.assert_allclose(weight[:size, c], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(dtype):
    features, weight = random(14, 2, 4, 3).astype(dtype), random(15, 4, 3).astype(dtype)
    assert ms.fspool(features, weight).dtype == dtype
    chex.assert_trees_all_close(
        ms.fspool(features, weight).astype(jnp.float32),
        reference_fspool(features.astype(jnp.float32), weight.astype(jnp.float32)),
        rtol=0.05,
        atol=0.05,
    )


def test_vmap_and_jit_agree_with_plain():
    features, weight = random(16, 3, 2, 5, 4), random(17, 5, 4)
    plain = ms.fspool(features, weight)
    chex.assert_trees_all_close(jax.vmap(ms.fspool, (0, None))(features, weight), plain)
    chex.assert_trees_all_close(jax.jit(ms.fspool)(features, weight), plain, rtol=1e-6)


def test_nan_propagates():
    assert bool(jnp.isnan(ms.fspool(jnp.array([[1.0], [jnp.nan]]), jnp.ones((2, 1)))).all())


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ms.fspool(jnp.ones(3), jnp.ones((3, 1))), "features: expected at least 2 axes"),
        (lambda: ms.fspool(jnp.ones((0, 2)), jnp.ones((0, 2))), "features: expected every axis"),
        (lambda: ms.fspool(jnp.ones((3, 2)), jnp.ones((4, 2))), r"weight: expected \[n, c\]"),
        (lambda: ms.fspool(jnp.ones((3, 2)), jnp.ones((3, 2)), method="x"), "method: expected one"),
        (
            lambda: ms.fspool(jnp.ones((3, 2)), jnp.ones((3, 2)), mask=jnp.ones(2, bool)),
            "mask: expected shape",
        ),
        (lambda: ms.sum_pool(jnp.ones((3, 2), int)), "features: expected a floating-point"),
        (lambda: ms.mean_pool(jnp.ones((3, 2)), mask=jnp.ones(3)), "mask: expected booleans"),
        (lambda: ms.continuous_weight(jnp.ones(3), jnp.ones((1, 3), bool)), "knots: expected 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_select_by_rank_large_gathers():
    features, weight = random(18, 2, 80, 2), random(19, 80, 2)
    places = ms.stable_ranks(features)
    chex.assert_trees_all_equal(
        select_by_rank(weight, places),
        jax.vmap(lambda r: jnp.take_along_axis(weight, r, 0))(places),
    )


def test_a_nan_stays_in_its_set_at_any_size():
    for n in (4, 20, 80):
        features, weight = random(20, 2, n, 3), random(21, n, 3)
        broken = ms.fspool(features.at[0, 0].set(jnp.nan), weight)
        assert bool(jnp.isnan(broken[0]).all())
        chex.assert_trees_all_close(broken[1], ms.fspool(features, weight)[1], atol=1e-5)


def test_means_of_16_bits_do_not_overflow():
    features = jnp.full((1024, 1), 100.0, jnp.float16)
    assert ms.mean_pool(features).item() == 100
    assert ms.mean_pool(features, mask=jnp.arange(1024) < 1000).item() == 100
