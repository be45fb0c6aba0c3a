import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msdspn_jax as ms

KEY = jax.random.key(0)
SETS = jax.random.normal(KEY, (2, 4, 3))


def build(**changes):
    encoder = ms.SetEncoder(**({"hidden_dim": 6, "latent_dim": 5, "set_size": 4} | changes))
    return encoder, encoder.init(KEY, SETS)


@pytest.mark.parametrize("pool", ["fspool", "continuous_fspool", "sum", "mean"])
@pytest.mark.parametrize("relational", [False, True])
def test_invariant_to_the_order_of_elements(pool, relational):
    encoder, params = build(pool=pool, relational=relational)
    apply = jax.jit(encoder.apply)
    order = jnp.array([2, 0, 3, 1])
    chex.assert_trees_all_close(apply(params, SETS), apply(params, SETS[:, order]), atol=1e-5)
    assert apply(params, SETS).shape == (2, 5)


def test_relational_sees_all_ordered_pairs():
    encoder, params = build(relational=True, pool="sum")
    p = params["params"]
    expected = np.zeros((2, 5))
    for i in range(4):
        for j in range(4):
            pair = np.concatenate([SETS[:, i], SETS[:, j]], -1)
            hidden = np.maximum(pair @ p["pair_kernel"] + p["pair_bias"], 0)
            expected += hidden @ p["output"]["kernel"] + p["output"]["bias"]
    np.testing.assert_allclose(encoder.apply(params, SETS), expected, atol=1e-5)


@pytest.mark.parametrize("relational", [False, True])
@pytest.mark.parametrize("pool", ["continuous_fspool", "mean"])
def test_mask_equals_a_smaller_set(pool, relational):
    encoder, params = build(pool=pool, relational=relational)
    mask = jnp.array([[True, True, True, False]] * 2)
    masked = encoder.apply(params, SETS.at[:, 3].set(1e3), mask)
    chex.assert_trees_all_close(masked, encoder.apply(params, SETS[:, :3]), atol=1e-5)


def test_initial_parameters_follow_the_published_law():
    encoder = ms.SetEncoder(hidden_dim=400, latent_dim=300, set_size=9)
    params = encoder.init(KEY, jnp.ones((1, 9, 16)))["params"]
    for layer, fan_in in (("hidden", 16), ("output", 400)):
        bound = fan_in**-0.5
        for leaf in params[layer].values():
            assert 0.98 * bound < float(jnp.abs(leaf).max()) <= bound
            np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(params["pool_weight"].std(), 1 / 3, rtol=0.1)


def test_computes_in_the_given_dtype():
    encoder, params = build(dtype=jnp.bfloat16)
    assert encoder.apply(params, SETS).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("changes", "sets", "mask", "message"),
    [
        ({"pool": "max"}, SETS, None, "pool: expected one of 'fspool'"),
        ({}, SETS[0], None, "sets: expected 3 axes"),
        ({}, SETS[:, :3], None, "sets: expected n = set_size = 4"),
        ({}, SETS[:, :0], None, "sets: expected every axis"),
        ({}, SETS.astype(int), None, "sets: expected a floating-point"),
        ({}, SETS, jnp.ones((2, 3), bool), "mask: expected shape"),
        ({}, SETS, jnp.ones((2, 4)), "mask: expected"),
        ({"pool": "continuous_fspool", "num_knots": 0}, SETS, None, "num_knots: expected"),
    ],
)
def test_errors(changes, sets, mask, message):
    encoder = ms.SetEncoder(**({"hidden_dim": 6, "latent_dim": 5, "set_size": 4} | changes))
    with pytest.raises((ValueError, TypeError), match=message):
        encoder.init(KEY, sets, mask)
