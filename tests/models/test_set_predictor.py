import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msdspn_jax as ms

KEY = jax.random.key(0)
SETS = jax.random.normal(KEY, (3, 4, 2))
SMALL = {"set_size": 4, "set_dim": 2, "hidden_dim": 8, "latent_dim": 6}
THREE = ms.Inner(num_steps=3)


def test_dspn_and_idspn_differ_in_the_adjoint_alone():
    predictors = [
        ms.set_autoencoder(**SMALL, inner=ms.Inner(num_steps=3, adjoint=adjoint))
        for adjoint in (ms.identity(), ms.unrolled())
    ]
    params = predictors[0].init(KEY, SETS)
    chex.assert_trees_all_equal_structs(params, predictors[1].init(KEY, SETS))

    def loss(params, model):
        sets = model.apply(params, SETS).sets
        return jnp.mean((sets - SETS) ** 2), sets

    (g1, y1), (g2, y2) = (
        jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, m) for m in predictors
    )
    chex.assert_trees_all_close(y1, y2, atol=1e-6)
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))  # noqa: E731
    assert norm(jax.tree.map(jnp.subtract, g1, g2)) > 0.01 * norm(g2)


def test_random_initial_sets_come_from_the_keys_alone():
    model = ms.set_autoencoder(
        **SMALL, inner=ms.Inner(num_steps=3, proximity=0.0), initial_set="random"
    )
    params = model.init(KEY, SETS)
    assert "initial_set" not in params["params"]["decoder"]
    keys = jax.random.split(KEY, 3)
    apply = jax.jit(lambda inputs, keys: model.apply(params, inputs, keys=keys).sets)
    sets = apply(SETS, keys)
    order = jnp.array([1, 2, 0])
    chex.assert_trees_all_close(apply(SETS[order], keys[order]), sets[order], atol=1e-6)
    assert float(jnp.abs(apply(SETS, keys[order]) - sets).max()) > 1e-3
    draws = ms.random_initial_sets(jax.random.split(KEY, 500), 4, 2)
    np.testing.assert_allclose([draws.mean(), draws.std()], [0, 0.1], atol=0.01)


def test_number_of_steps_can_change_at_evaluation():
    model = ms.set_autoencoder(**SMALL, inner=THREE)
    params = model.init(KEY, SETS)
    few, same, more = (
        model.apply(params, SETS, num_steps=steps, return_trajectory=True) for steps in (None, 3, 6)
    )
    chex.assert_trees_all_equal(few.sets, same.sets)
    chex.assert_shape(more.trajectory.sets, (7, 3, 4, 2))
    chex.assert_trees_all_close(more.trajectory.sets[3], few.sets, atol=1e-6)


@pytest.mark.parametrize("pool", ["sum", "mean", "relation"])
def test_pools_and_relational_encoders_train(pool):
    model = ms.set_autoencoder(**SMALL, inner=ms.Inner(num_steps=3, pool=pool))
    params = model.init(KEY, SETS)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, SETS).sets ** 2)))(params)
    chex.assert_tree_all_finite(grads)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.usefixtures("without_hook")
def test_errors():
    model = ms.set_autoencoder(
        **SMALL, inner=ms.Inner(num_steps=3, proximity=0.0), initial_set="random"
    )
    params = model.init(KEY, SETS)
    with pytest.raises(ValueError, match="keys: expected one key for every set"):
        model.apply(params, SETS)
    with pytest.raises(ValueError, match="keys: expected 3 keys"):
        model.apply(params, SETS, keys=jax.random.split(KEY, 2))
    with pytest.raises(ValueError, match="initial_sets: expected shape"):
        model.apply(params, SETS, initial_sets=jnp.ones((3, 4, 3)))
    with pytest.raises(ValueError, match="initial_set: expected one of"):
        ms.set_autoencoder(**SMALL, initial_set="zeros").init(KEY, SETS)


def test_a_decoder_hands_out_its_energy():
    model = ms.set_autoencoder(**SMALL, inner=THREE)
    variables = model.init(KEY, SETS)
    latent = model.apply(variables, SETS, method=lambda module, x: module.encoder(x))
    energy, params = model.decoder.energy(variables)
    start = jnp.broadcast_to(variables["params"]["decoder"]["initial_set"], SETS.shape)
    context = ms.Context(latent, start)
    minimum = ms.minimise(energy, params, context, start, num_steps=3)
    chex.assert_trees_all_close(minimum.sets, model.apply(variables, SETS).sets, atol=1e-6)
    assert ms.suggest_step_size(energy, params, context, SETS, key=KEY).step_size > 0


@pytest.mark.usefixtures("without_hook")
def test_of_several_starts_the_lowest_energy_counts():
    model = ms.SetDecoder(4, 2, 8, inner=ms.Inner(num_steps=3, proximity=0.0))
    latent = jax.random.normal(KEY, (3, 6))
    params = model.init(KEY, latent)
    apply = jax.jit(lambda n: model.apply(params, latent, num_starts=n), static_argnums=0)
    one, four = apply(1), apply(4)
    chex.assert_trees_all_equal(one, apply(None))
    assert (four.energy <= one.energy + 1e-6).all()
    assert (four.energy < 0.99 * one.energy).any()
    chex.assert_trees_all_equal_shapes_and_dtypes(one, four)
    # What is found for a set depends neither on its place nor on the others.
    alone = model.apply(params, latent[1:2], num_starts=4)
    chex.assert_trees_all_close(alone.sets[0], four.sets[1], atol=1e-5)
    with pytest.raises(ValueError, match="num_starts: expected an integer >= 1, got 0"):
        model.apply(params, latent, num_starts=0)


def test_none_switches_a_setting_off():
    inner = ms.Inner(num_steps=3, max_grad_norm=1e-3, projection="simplex")
    decoder = ms.SetDecoder(4, 2, 8, inner=inner)
    latent = jnp.ones((1, 6))
    variables = decoder.init(jax.random.key(0), latent)
    on = decoder.apply(variables, latent).sets
    off = decoder.apply(variables, latent, max_grad_norm=None, projection=None).sets
    np.testing.assert_allclose(on.sum(-1), 1, rtol=1e-5)
    assert np.abs(off.sum(-1) - 1).max() > 0.1


def test_padding_of_a_condition_is_not_seen():
    model = ms.SetPredictor(
        ms.SetEncoder(8, 8, 4, pool="continuous_fspool"),
        ms.SetDecoder(4, 2, 8, inner=ms.Inner(num_steps=5, step_size=5.0)),
        condition_on_inputs=True,
    )
    inputs = jax.random.normal(jax.random.key(0), (1, 4, 3))
    mask = jnp.array([[True, True, False, False]])
    variables = model.init(jax.random.key(1), inputs, mask=mask)
    predict = jax.jit(lambda x: model.apply(variables, x, mask=mask).sets[:, :2])
    expected = predict(inputs)
    assert np.ptp(expected) > 0
    for padding in (100.0, np.nan):
        np.testing.assert_array_equal(predict(inputs.at[:, 2:].set(padding)), expected)


def test_a_masked_set_is_decoded_as_the_smaller_one():
    inner = ms.Inner(num_steps=3, pool="continuous_fspool")
    large, small = (
        ms.SetDecoder(n, 2, hidden_dim=8, inner=inner, initial_set="random") for n in (5, 3)
    )
    latent = jax.random.normal(KEY, (4, 6))
    keys = jax.random.split(KEY, 4)
    starts = jax.random.normal(KEY, (4, 5, 2))
    variables = large.init(KEY, latent, keys=keys)
    mask = jnp.broadcast_to(jnp.arange(5) < 3, (4, 5))
    found = large.apply(variables, latent, mask=mask, initial_sets=starts)
    expected = small.apply(variables, latent, initial_sets=starts[:, :3])
    chex.assert_trees_all_close(found.sets[:, :3], expected.sets, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found.energy, expected.energy, rtol=1e-5)
    assert jnp.max(jnp.abs(expected.sets - starts[:, :3])) > 1e-3
