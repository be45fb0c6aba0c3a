import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import processes
import pytest

import msdspn_jax as ms

KEY = jax.random.key(0)


def test_anderson_needs_fewer_steps():
    energy = problems.quadratic(jnp.geomspace(0.02, 1.0, 6).reshape(3, 2))
    params, context = {"scale": jnp.ones(())}, ms.Context(jax.random.normal(KEY, (4, 3, 2)))

    def steps(optimizer):
        return ms.minimise(
            energy, params, context, jnp.zeros((4, 3, 2)), optimizer=optimizer, num_steps=1000,
            tolerance=1e-4,
        )  # fmt: skip

    fast, slow = steps(ms.anderson(1.0, history=6)), steps(optax.sgd(1.0))
    assert int(fast.num_steps.max()) < 40 < 200 < int(slow.num_steps.max())
    chex.assert_trees_all_close(fast.sets, context.latent, atol=0.01)


def test_anderson_stays_at_a_minimum():
    energy = problems.quadratic(jnp.ones((3, 2)))
    context = ms.Context(jnp.ones((2, 3, 2)))
    minimum = ms.minimise(
        energy, {"scale": jnp.ones(())}, context, context.latent, optimizer=ms.anderson(),
        num_steps=3,
    )  # fmt: skip
    chex.assert_trees_all_equal(minimum.sets, context.latent)


def test_equal_arguments_give_the_same_object():
    assert ms.anderson() is ms.anderson(1, history=5) is ms.anderson(learning_rate=1.0)
    assert ms.anderson() is not ms.anderson(0.5)


@pytest.mark.parametrize(
    ("dtype", "close"), [(jnp.bfloat16, 0.05), (jnp.float16, 0.01), (jnp.float64, 1e-4)]
)
@pytest.mark.parametrize("adjoint", [ms.identity(), ms.unrolled()], ids=str)
def test_precisions(dtype, close, adjoint):
    with jax.enable_x64(dtype == jnp.float64):
        energy = problems.quadratic(jnp.array([[0.25, 0.5], [0.5, 1.0]], dtype))
        context = ms.Context(jnp.asarray(jax.random.normal(KEY, (3, 2, 2)), dtype))
        params, start = {"scale": jnp.ones((), dtype)}, jnp.zeros((3, 2, 2), dtype)

        def loss(params):
            minimum = ms.minimise(
                energy, params, context, start, optimizer=ms.anderson(), num_steps=8,
                adjoint=adjoint,
            )  # fmt: skip
            return jnp.sum(minimum.sets), minimum

        grads, minimum = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert minimum.sets.dtype == grads["scale"].dtype == dtype
        chex.assert_tree_all_finite(grads)
        error = jnp.abs(minimum.sets - context.latent).astype(jnp.float32).max()
        assert float(error) < close


def test_float16_has_room_for_residuals_whose_squares_overflow():
    curvature = jnp.array([[0.5], [1.0]], jnp.float16)
    sets = jnp.full((1, 2, 1), 2000.0, jnp.float16)
    optimizer = ms.anderson()
    state = optimizer.init(sets)
    for _ in range(6):
        updates, state = optimizer.update(curvature * sets, state, sets)
        sets = optax.apply_updates(sets, updates)
    assert float(jnp.abs(sets).max()) < 20


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0"),
        ({"ridge": -1.0}, "ridge: expected a number > 0"),
        ({"history": 1}, "history: expected an integer >= 2"),
        ({"history": 2.5}, "history: expected an integer >= 2, got 2.5"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number > 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ms.anderson(**arguments)
    sets = jnp.ones((1, 2, 1))
    with pytest.raises(ValueError, match="params: expected the current sets"):
        ms.anderson().update(sets, ms.anderson().init(sets))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, msdspn_jax as ms
from jax.sharding import Mesh, PartitionSpec as P

assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("sets",))
target = jax.random.normal(jax.random.key(0), (4, 3, 2))
start = jax.random.normal(jax.random.key(1), (4, 3, 2))
curvature = jnp.linspace(0.2, 1.0, 6).reshape(3, 2)


def energy(params, sets, context):
    return 0.5 * jnp.sum(curvature * (sets - params * context) ** 2, (1, 2))


def losses(params, context, start, adjoint, tolerance):
    minimum = ms.minimise(
        energy, params, context, start, optimizer=ms.anderson(), num_steps=6, adjoint=adjoint,
        tolerance=tolerance,
    )
    return jnp.sum(jnp.sin(minimum.sets), (1, 2))


def own_loop(params, context, start, *_):
    optimizer = ms.anderson()

    def step(_, carry):
        sets, state = carry
        updates, state = optimizer.update(curvature * (sets - params * context), state, sets)
        return sets + updates, state

    return jax.lax.fori_loop(0, 6, step, (start, optimizer.init(start)))[0].sum((1, 2))


for function in (losses, own_loop):
    for adjoint in (ms.identity(), ms.exact(), ms.unrolled()):
        for tolerance in (None, 1e-3):
            if adjoint == ms.unrolled() and tolerance:
                continue

            def total(params, mapped):
                def each(params, context, start):
                    return function(params, context, start, adjoint, tolerance)

                if mapped:
                    specs = (P(), P("sets"), P("sets"))
                    each = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P("sets"))
                return jnp.sum(each(params, target, start))

            results = [
                jax.jit(jax.value_and_grad(total), static_argnums=1)(jnp.float32(1.1), mapped)
                for mapped in (False, True)
                if function is losses
            ] or [jax.jit(total, static_argnums=1)(jnp.float32(1.1), x) for x in (False, True)]
            np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_under_shard_map_with_its_default_checks():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=processes.environment("--xla_force_host_platform_device_count=2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]


def test_the_derivative_of_a_descent_that_begins_at_its_minimum():
    def minimum(p):
        def energy(p, sets, context):
            return jnp.sum((sets - p) ** 2, (1, 2)) / 2

        return ms.minimise(
            energy, p, None, jnp.ones((1, 2, 1)), optimizer=ms.anderson(0.5), num_steps=10,
            adjoint=ms.unrolled(),
        ).sets.sum()  # fmt: skip

    for p in (1.0, 1.01):
        np.testing.assert_allclose(jax.grad(minimum)(p), 2, rtol=2e-3)
