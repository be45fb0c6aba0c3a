import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import msdspn_jax as ms

KEY = jax.random.key(0)


def test_quadratic():
    curvature = jnp.linspace(0.01, 0.2, 6).reshape(3, 2)
    energy = problems.quadratic(curvature)
    context = ms.Context(jnp.ones((4, 3, 2)))
    suggestion = ms.suggest_step_size(
        energy, {"scale": jnp.ones(())}, context, jnp.zeros((4, 3, 2)), key=KEY, momentum=0.0,
        num_iterations=100,
    )  # fmt: skip
    np.testing.assert_allclose(suggestion.curvature, 0.2, rtol=1e-3)
    np.testing.assert_allclose(suggestion.stable_below, 10.0, rtol=1e-3)
    np.testing.assert_allclose(suggestion.step_size, 5.0, rtol=1e-3)
    assert bool((suggestion.movement > 0.5).all())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_limit_separates_stable_from_unstable(momentum):
    energy = problems.quadratic(jnp.linspace(0.01, 0.2, 6).reshape(3, 2))
    problem = energy, {"scale": jnp.ones(())}, ms.Context(jnp.ones((1, 3, 2)))
    start = jnp.zeros((1, 3, 2))
    limit = ms.suggest_step_size(
        *problem, start, key=KEY, momentum=momentum, num_iterations=100
    ).stable_below
    for factor, stable in ((0.97, True), (1.03, False)):
        optimizer = optax.sgd(factor * limit, momentum=momentum or None, nesterov=momentum > 0)
        energy_after = ms.minimise(*problem, start, optimizer=optimizer, num_steps=600).energy
        assert bool(energy_after[0] < problem[0](*problem[1:2], start, problem[2])[0]) == stable


def test_flat_energy_is_an_error():
    with pytest.raises(ValueError, match="energy: expected a finite curvature other than zero"):
        ms.suggest_step_size(
            lambda params, sets, context: jnp.sum(sets, (1, 2)), {}, None, jnp.ones((1, 2, 2)),
            key=KEY,
        )  # fmt: skip


def test_an_energy_that_curves_down_is_seen_by_the_sign():
    found = ms.suggest_step_size(
        lambda params, sets, context: -0.5 * jnp.sum(sets**2, (1, 2)), {}, None,
        jnp.ones((1, 2, 2)), key=KEY,
    )  # fmt: skip
    np.testing.assert_allclose(found.curvature, [-1.0], rtol=1e-5)


def unrelated():
    """Targets, and latents that have nothing to do with them."""
    energy, params, context, start = problems.fspool_problem(
        KEY, batch=4, n=8, d=4, hidden=32, latent=32, proximity=0
    )
    targets = jax.random.normal(jax.random.key(9), start.shape)
    return energy, params, context._replace(latent=3 * context.latent), targets


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_suggestion_descends_where_the_curvature_alone_promises_too_much(momentum):
    problem = unrelated()
    energy, params, context, sets = problem
    found = ms.suggest_step_size(*problem, key=KEY, momentum=momentum)

    def after(step_size):
        optimizer = optax.sgd(step_size, momentum=momentum or None, nesterov=momentum > 0)
        return ms.minimise(*problem, optimizer=optimizer, num_steps=20).energy

    before = energy(params, sets, context)
    assert len(found.tried) > 1
    assert bool((after(found.tried[0]) > before).any())
    assert bool((after(found.step_size) < before).all())
    assert found.step_size == found.tried[-1] == found.tried[0] / 2 ** (len(found.tried) - 1)
    assert found.momentum == momentum
    chex.assert_trees_all_close(found.energy_before, before, rtol=1e-6)
    chex.assert_trees_all_close(found.energy_after, after(found.step_size), rtol=1e-4)


def test_sets_at_their_minimum_are_no_error():
    energy = problems.quadratic(jnp.ones((3, 2)))
    context = ms.Context(jnp.ones((2, 3, 2)))
    found = ms.suggest_step_size(energy, {"scale": jnp.ones(())}, context, context.latent, key=KEY)
    np.testing.assert_array_equal(found.movement, 0)
    assert len(found.tried) == 1


def test_no_descent_is_an_error_in_words():
    @jax.custom_jvp
    def uphill(x):
        return x

    uphill.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))

    def energy(params, sets, context):
        return jnp.sum(uphill(sets**2), (1, 2))

    with pytest.raises(ValueError, match=r"energy: expected one that 20 steps .* got 2 of 2 sets"):
        ms.suggest_step_size(energy, {}, None, jnp.ones((2, 3, 1)), key=KEY)


def test_the_same_energy_is_traced_once_more_and_not_compiled_again():
    traces = []

    def energy(params, sets, context):
        traces.append(None)
        return 0.5 * jnp.sum((sets - context) ** 2, (1, 2))

    def suggest(**options):
        ms.suggest_step_size(
            energy, {}, jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1)), key=KEY, **options
        )

    suggest()
    first = len(traces)
    suggest(momentum=0.5, num_steps=5, safety=0.1)
    assert len(traces) == first + 1


class Unhashable:
    __hash__ = None

    def __call__(self, params, sets, context):
        return 0.5 * jnp.sum((sets - context) ** 2, (1, 2))


def test_energies_that_cannot_be_hashed_and_other_precisions():
    for dtype in (jnp.float32, jnp.bfloat16):
        found = ms.suggest_step_size(
            Unhashable(), {}, jnp.ones((2, 3, 1), dtype), jnp.zeros((2, 3, 1), dtype), key=KEY
        )
        np.testing.assert_allclose(found.step_size, 0.6786, rtol=0.02)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": jnp.zeros((3, 1))}, "sets: expected 3 axes"),
        ({"sets": jnp.zeros((0, 3, 1))}, "sets: expected every axis"),
        ({"sets": jnp.full((2, 3, 1), jnp.nan)}, "sets: expected finite"),
        ({"momentum": 1.0}, "momentum: expected a number in"),
        ({"safety": 0.0}, "safety: expected a number in"),
        ({"num_steps": 0}, "num_steps: expected an integer >= 1"),
        ({"num_iterations": 0}, "num_iterations: expected an integer >= 1"),
    ],
)
def test_errors(changes, message):
    arguments = {"params": {}, "context": jnp.ones((2, 3, 1)), "sets": jnp.zeros((2, 3, 1))}
    with pytest.raises(ValueError, match=message):
        ms.suggest_step_size(Unhashable(), **(arguments | {"key": KEY} | changes))


def test_traced_arguments_are_refused():
    with pytest.raises(ValueError, match="expected concrete arrays"):
        jax.jit(lambda sets: ms.suggest_step_size(Unhashable(), {}, sets, sets, key=KEY).movement)(
            jnp.ones((2, 3, 1))
        )
