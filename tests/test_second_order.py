"""Derivatives of derivatives, forward mode, values, closures: what composing asks of an adjoint."""

import dataclasses
import functools
import gc
import pickle
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msdspn_jax as ms
from msdspn_jax import descent as descent_module

LONG = {"optimizer": optax.sgd(0.5), "num_steps": 400}
RIGHT_TO_ALL_ORDERS = [
    ms.exact(),
    ms.exact(method="cg"),
    ms.conjugate_gradient(10),
    ms.neumann(200),
    ms.unrolled(),
]
FAST = (ms.exact(), ms.conjugate_gradient(10))


def target():
    """Made anew for every test, in its precision."""
    return jnp.linspace(0.3, 1.2, 6).reshape(1, 3, 2)


def start():
    return jnp.zeros((1, 3, 2))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def energy(scale, sets, context):
    return jnp.sum(0.4 * (sets - scale * context) ** 2 + 0.1 * sets**4, (1, 2))


def value(adjoint, scale, **settings):
    minimum = ms.minimise(energy, scale, target(), start(), adjoint=adjoint, **(LONG | settings))
    return jnp.sum(jnp.sin(minimum.sets))


def derivatives(adjoint):
    """First and second derivative in reverse mode, and the finite difference of the first."""
    function = functools.partial(value, adjoint)
    first = jax.jit(jax.grad(function))
    difference = (first(1.1 + 1e-5) - first(1.1 - 1e-5)) / 2e-5
    return first(1.1), jax.jit(jax.grad(jax.grad(function)))(1.1), difference


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "adjoint",
    [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in RIGHT_TO_ALL_ORDERS],
    ids=str,
)
class TestRightToAllOrders:
    def test_second_derivative_is_that_of_the_first(self, adjoint):
        first, second, difference = derivatives(adjoint)
        np.testing.assert_allclose(second, difference, rtol=1e-8)
        truth = derivatives(ms.unrolled())
        np.testing.assert_allclose((first, second), truth[:2], rtol=1e-9)

    def test_forward_mode(self, adjoint):
        function = functools.partial(value, adjoint)
        first, second, _ = derivatives(adjoint)
        np.testing.assert_allclose(jax.jit(jax.jacfwd(function))(1.1), first, rtol=1e-9)
        np.testing.assert_allclose(jax.jit(jax.hessian(function))(1.1), second, rtol=1e-9)
        out, tangent = jax.jit(lambda s: jax.jvp(function, (s,), (2.0,)))(1.1)
        np.testing.assert_allclose((out, tangent), (function(1.1), 2 * first), rtol=1e-9)
        _, linear = jax.linearize(function, 1.1)
        np.testing.assert_allclose(linear(1.0), first, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_second_derivative_under_a_projection():
    """On the simplex, where the minimum lies inside and on the border."""

    def function(adjoint, scale):
        sets = ms.minimise(
            energy,
            scale,
            2 * target() - 0.8,
            start(),
            projection=ms.simplex,
            adjoint=adjoint,
            **LONG,
        ).sets
        return jnp.sum(jnp.sin(3 * sets))

    def second(adjoint):
        return jax.jit(jax.grad(jax.grad(functools.partial(function, adjoint))))(1.1)

    truth = second(ms.unrolled())
    for adjoint in (ms.exact(), ms.conjugate_gradient(10), ms.neumann(200)):
        np.testing.assert_allclose(second(adjoint), truth, rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_second_derivative_of_the_papers_rule():
    """What `identity` says: the derivative of ∂T/∂θ, the minimum moving as the rule says."""

    def step(scale, sets):
        return sets - jax.grad(lambda sets: jnp.sum(energy(scale, sets, target())))(sets)

    sets = ms.minimise(energy, 1.1, target(), start(), **LONG).sets
    moves = jax.jvp(lambda scale: step(scale, sets), (1.1,), (1.0,))[1]

    def first(scale, sets):
        tangent = jax.jvp(lambda scale: step(scale, sets), (scale,), (1.0,))[1]
        return jnp.sum(jnp.cos(sets) * tangent)

    expected = jax.jvp(first, (1.1, sets), (1.0, moves))[1]
    np.testing.assert_allclose(derivatives(ms.identity())[1], expected, rtol=1e-9)
    np.testing.assert_allclose(derivatives(ms.neumann(0))[1], expected, rtol=1e-9)


# --- values ---

ADJOINTS = [
    (ms.identity, ()),
    (ms.neumann, (3,)),
    (ms.conjugate_gradient, (5,)),
    (ms.exact, ()),
    (ms.unrolled, ()),
]


@pytest.mark.parametrize(("make", "arguments"), ADJOINTS)
def test_adjoints_are_values(make, arguments):
    one, other = make(*arguments), make(*arguments)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != (ms.neumann(7) if make is not ms.neumann else ms.neumann(4))


def test_settings_are_values():
    one, other = (ms.Inner(num_steps=3, adjoint="neumann:2", max_grad_norm=1.0) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.or_else(ms.published_inner("clevr", "idspn")) == other.or_else(
        ms.published_inner("clevr", "idspn")
    )


def test_equal_modules_are_traced_once():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model, params, sets):
        traced.append(model)
        return model.apply(params, sets).sets

    def build():
        inner = ms.Inner(num_steps=2, adjoint=ms.neumann(1), step_size=0.5)
        return ms.set_autoencoder(set_size=3, set_dim=2, hidden_dim=4, latent_dim=4, inner=inner)

    sets = jnp.ones((2, 3, 2))
    params = build().init(jax.random.key(0), sets)
    for _ in range(3):
        apply(build(), params, sets)
    assert len(traced) == 1


def test_eager_calls_share_one_program():
    programs = descent_module._program
    model = ms.set_autoencoder(
        set_size=3, set_dim=2, hidden_dim=4, latent_dim=4, inner=ms.Inner(num_steps=2)
    )
    sets = jnp.ones((2, 3, 2))
    params = model.init(jax.random.key(0), sets)
    model.apply(params, sets)
    before = programs.cache_info().misses
    for _ in range(5):
        model.apply(params, sets)
    assert programs.cache_info().misses == before


def test_programs_hold_neither_energies_nor_what_they_close_over(monkeypatch):
    small = functools.lru_cache(maxsize=4)(descent_module._program.__wrapped__)
    monkeypatch.setattr(descent_module, "_program", small)
    sets = jnp.ones((2, 3, 2))
    energies, arrays = [], []
    for number in range(6):
        weight = jnp.ones(2)

        def own(params, sets, context, weight=weight, number=number):
            return number * jnp.sum(weight * (sets - context) ** 2, (1, 2))

        ms.minimise(own, {}, sets, sets, num_steps=1)
        energies.append(weakref.ref(own))
        arrays.append(weakref.ref(weight))
    del own, weight
    gc.collect()
    assert [x() for x in energies + arrays] == [None] * 12
    assert small.cache_info().currsize == 4


def test_a_new_function_that_computes_the_same_finds_the_program():
    def minimum(weight):
        return ms.minimise(
            lambda p, s, c: jnp.sum(weight * (s - c) ** 2, (1, 2)) / 4, {}, target(), start(),
            num_steps=2, projection=lambda y: jnp.clip(y, 0, weight),
        ).sets  # fmt: skip

    first = minimum(jnp.ones(2))
    before = descent_module._program.cache_info().misses
    second = minimum(0.5 * jnp.ones(2))
    assert descent_module._program.cache_info().misses == before
    assert float(first.max()) > 0.5 >= float(second.max())


_CHANGING = {"scale": 1.0}


class _Model:
    def __init__(self):
        self.scale = 1.0

    def energy(self, params, sets, context):
        return 0.25 * jnp.sum((sets - self.scale * context) ** 2, (1, 2))


def _global_energy(params, sets, context):
    return 0.25 * jnp.sum((sets - _CHANGING["scale"] * context) ** 2, (1, 2))


def test_what_an_energy_uses_may_change_between_calls():
    ones, model, held = jnp.ones((1, 1, 1)), _Model(), [np.ones(1)]
    energies = {
        "method": model.energy,
        "global": _global_energy,
        "array": lambda p, s, c: 0.25 * jnp.sum((s - held[0] * c) ** 2, (1, 2)),
    }

    def ends():
        return [
            ms.minimise(energy, {}, ones, 0 * ones, num_steps=60).sets.item()
            for energy in energies.values()
        ]

    np.testing.assert_allclose(ends(), 1, rtol=1e-3)
    model.scale = _CHANGING["scale"] = 3.0
    held[0] = 3 * held[0]
    np.testing.assert_allclose(ends(), 3, rtol=1e-3)
    _CHANGING["scale"] = 1.0


def test_what_a_projection_uses_may_change_between_calls():
    ones, largest = jnp.ones((1, 1, 1)), [0.25, jnp.array(0.5)]

    def end():
        return ms.minimise(
            energy, 1.0, 9 * ones, 0 * ones, num_steps=60,
            projection=lambda y: jnp.clip(y, 0, largest[0]),
        ).sets.item()  # fmt: skip

    assert end() == 0.25
    largest[0] = largest[1]
    assert end() == 0.5


def test_the_suggested_step_size_is_that_of_the_energy_as_it_is_now():
    ones, held = jnp.ones((1, 1, 1)), [np.ones(1)]

    def curvature():
        found = ms.suggest_step_size(
            lambda p, s, c: 0.25 * jnp.sum(held[0] * (s - c) ** 2, (1, 2)), {}, ones, 0 * ones,
            key=jax.random.key(0),
        )  # fmt: skip
        return found.curvature.item()

    assert curvature() == pytest.approx(0.5)
    held[0] = 3 * held[0]
    assert curvature() == pytest.approx(1.5)


def test_what_cannot_be_compared_is_not_taken_for_the_same():
    ones = jnp.ones((1, 1, 1))

    def with_inner_jit(scale):
        scaled = jax.jit(lambda s: s * scale)
        return lambda p, s, c: 0.25 * jnp.sum((scaled(s) - c) ** 2, (1, 2))

    def with_own_derivative(scale):
        @jax.custom_jvp
        def same(x):
            return x

        same.defjvp(lambda primals, tangents: (primals[0], scale * tangents[0]))
        return lambda p, s, c: 0.25 * jnp.sum((same(s) - c) ** 2, (1, 2))

    def end(energy, num_steps):
        optimizer = ms.nesterov(0.5, 0.5)
        return ms.minimise(
            energy, {}, ones, 0 * ones, num_steps=num_steps, optimizer=optimizer
        ).sets.item()

    inner = [end(with_inner_jit(jnp.full((), scale)), 200) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(inner, [1, 0.5], rtol=1e-4)
    own = [end(with_own_derivative(scale), 1) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(own, [0.375, 0.75], rtol=1e-5)


# --- what an energy closes over, and what it is given ---


def test_closed_over_parameters_are_differentiated():
    def loss(scale, *, closed):
        function = (lambda p, sets, c: energy(scale, sets, c)) if closed else energy
        params = {} if closed else scale
        return jnp.sum(ms.minimise(function, params, target(), start(), **LONG).sets)

    expected = jax.grad(functools.partial(loss, closed=False))(1.1)
    closed = functools.partial(loss, closed=True)
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd):
        np.testing.assert_allclose(transform(closed)(1.1), expected, rtol=1e-5)
    mapped = jax.vmap(jax.grad(closed))(jnp.array([1.1, 1.1]))
    np.testing.assert_allclose(mapped, [expected] * 2, rtol=1e-5)


def test_what_a_scan_gives_may_be_closed_over_whatever_its_type():
    masks = jnp.array([[True, False, True], [True, True, True]])

    def end(mask, scale):
        def masked(params, sets, context):
            there = jnp.where(mask[None, :, None], (sets - scale * context) ** 2, sets**2)
            return 0.25 * jnp.sum(there, (1, 2))

        return jnp.sum(ms.minimise(masked, {}, target(), start(), **LONG).sets)

    def total(scale):
        return jax.lax.scan(lambda sum, mask: (sum + end(mask, scale), None), 0.0, masks)[0]

    expected = jax.grad(lambda scale: end(masks[0], scale) + end(masks[1], scale))(1.1)
    np.testing.assert_allclose(jax.grad(total)(1.1), expected, rtol=1e-5)
    kept = jax.checkpoint(lambda scale, masks: end(masks[0], scale) + end(masks[1], scale))
    np.testing.assert_allclose(jax.grad(kept)(1.1, masks), expected, rtol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_parameters_that_are_no_arrays_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"params\['activation'\]: expected an array.*partition"):
        ms.minimise(
            lambda p, s, c: energy(p["scale"], s, c), {"scale": 1.0, "activation": jnp.tanh},
            target(), start(), num_steps=2,
        )  # fmt: skip


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.polyak_sgd()], ids=["lbfgs", "polyak"])
def test_optimizers_that_ask_for_the_value_function(optimizer):
    def loss(scale):
        minimum = ms.minimise(energy, scale, target(), start(), optimizer=optimizer, num_steps=30)
        return jnp.sum(minimum.sets), minimum

    gradient, minimum = jax.jit(jax.grad(loss, has_aux=True))(1.1)
    assert bool((minimum.gradient_norm < 0.05).all())
    expected = jax.grad(lambda s: jnp.sum(ms.minimise(energy, s, target(), start(), **LONG).sets))(
        1.1
    )
    np.testing.assert_allclose(gradient, expected, rtol=0.02)


@pytest.mark.usefixtures("without_hook")
def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="optimizer: expected an optax transformation"):
        ms.minimise(energy, 1.0, target(), start(), optimizer=0.1, num_steps=2)


def test_number_of_steps_may_be_traced():
    @jax.jit
    def run(num_steps, scale):
        minimum = ms.minimise(energy, scale, target(), start(), num_steps=num_steps)
        return jnp.sum(minimum.sets), minimum.num_steps

    for steps in (1, 4):
        (total, taken), gradient = jax.value_and_grad(run, argnums=1, has_aux=True)(steps, 1.1)
        plain = lambda s, steps=steps: jnp.sum(  # noqa: E731
            ms.minimise(energy, s, target(), start(), num_steps=steps).sets
        )
        np.testing.assert_allclose((total, gradient), jax.value_and_grad(plain)(1.1), rtol=1e-5)
        assert taken.tolist() == [steps]
    with pytest.raises(ValueError, match="num_steps: expected a Python integer, because unrolling"):
        jax.jit(
            lambda n: (
                ms.minimise(energy, 1.1, target(), start(), num_steps=n, adjoint=ms.unrolled()).sets
            )
        )(3)


def test_status_of_every_set():
    # Curvatures: 1 arrives, 0.01 does not in 20 steps, 5 diverges.
    curvature = jnp.array([1.0, 0.01, 5.0])[:, None, None]

    def quadratic(params, sets, context):
        return 0.5 * jnp.sum(context * sets**2, (1, 2))

    minimum = jax.jit(
        lambda start: ms.minimise(
            quadratic, {}, curvature, start, optimizer=optax.sgd(1.0), num_steps=200, tolerance=1e-3
        )
    )(jnp.ones((3, 2, 2)))
    assert [ms.Status(int(s)).name for s in minimum.status] == [
        "CONVERGED", "OUT_OF_STEPS", "NOT_FINITE",
    ]  # fmt: skip
    without = ms.minimise(quadratic, {}, curvature[:2], jnp.ones((2, 2, 2)), num_steps=2)
    assert without.status.tolist() == [ms.Status.OUT_OF_STEPS] * 2


# --- steps and adjoints of one's own ---


def test_own_loop_of_steps_equals_minimise():
    descent = ms.Descent(energy, optimizer=ms.nesterov(0.5, 0.9), max_grad_norm=0.3)
    state = descent.init(1.1, target(), start())
    for _ in range(4):
        state, info = jax.jit(descent.step)(1.1, target(), state)
    minimum = ms.minimise(
        energy,
        1.1,
        target(),
        start(),
        optimizer=ms.nesterov(0.5, 0.9),
        max_grad_norm=0.3,
        num_steps=4,
    )
    chex.assert_trees_all_close(state.sets, minimum.sets, rtol=1e-6)
    assert bool((info.energy > minimum.energy).all())


@dataclasses.dataclass(frozen=True)
class LastSteps:
    """An adjoint of one's own: differentiate through the last k steps alone."""

    k: int

    def wrap(self, descent):
        def minimum(params, context, initial_sets):
            early = dataclasses.replace(descent, num_steps=descent.num_steps - self.k)
            state = descent.init(params, context, initial_sets)
            state = jax.lax.stop_gradient(early.run(params, context, state))
            for _ in range(self.k):
                state, _ = descent.step(params, context, state)
            return state

        return minimum


def test_an_adjoint_from_outside():
    settings = {"optimizer": optax.sgd(0.5), "num_steps": 30}
    one, many, exact = (
        jax.jit(jax.grad(functools.partial(value, adjoint, **settings)))(1.1)
        for adjoint in (LastSteps(1), LastSteps(25), ms.exact())
    )
    assert abs(many - exact) < 1e-3 < abs(one - exact)
    assert LastSteps(2) == LastSteps(2)


# --- constraints, closures and masks, against finite differences ---


def unit_ball(sets):
    """Onto the ball of all entries of a set: its surface is curved, so P² ≠ P."""
    norm = jnp.sqrt(jnp.sum(sets**2, (1, 2), keepdims=True))
    return sets * jnp.minimum(1, 1 / norm)


@pytest.mark.parametrize("adjoint", [*RIGHT_TO_ALL_ORDERS], ids=str)
def test_the_curvature_of_a_constraint_counts(float64, adjoint):
    def of(scale):
        return value(adjoint, scale, projection=unit_ball)

    difference = (of(1.1 + 1e-5) - of(1.1 - 1e-5)) / 2e-5
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(jax.grad(of)(1.1), difference, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(of, (1.1,), (1.0,))[1], difference, rtol=1e-6)


IN_A_LOOP = {
    "grad": lambda function: function,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda function: (
        lambda x: jax.lax.scan(lambda total, _: (total + function(x), None), 0.0, None, length=1)[0]
    ),
}


@pytest.mark.parametrize("way", IN_A_LOOP)
@pytest.mark.parametrize("adjoint", FAST, ids=str)
def test_bounds_of_a_projection_are_differentiated(float64, adjoint, way):
    def of(bound):
        def project(sets):
            return jnp.clip(sets, -bound, bound)

        return value(adjoint, 1.1, projection=project)

    difference = (of(0.6 + 1e-5) - of(0.6 - 1e-5)) / 2e-5
    assert abs(difference) > 0.1
    np.testing.assert_allclose(jax.grad(IN_A_LOOP[way](of))(0.6), difference, rtol=1e-6)


@pytest.mark.parametrize("way", IN_A_LOOP)
def test_an_optimiser_may_hold_a_traced_rate(float64, way):
    def of(rate):
        return value(ms.identity(), 1.1, optimizer=optax.sgd(rate), num_steps=400)

    programs = descent_module._program.cache_info().currsize
    assert jax.grad(IN_A_LOOP[way](of))(0.5) == 0  # A minimum does not depend on it.
    assert descent_module._program.cache_info().currsize == programs


@pytest.mark.parametrize("adjoint", [*FAST, ms.exact(method="cg")], ids=str)
def test_elements_that_the_energy_does_not_see_leave_the_others_their_gradient(float64, adjoint):
    here = jnp.array([[[1.0], [1.0], [0.0]]])

    def of(scale):
        def masked(scale, sets, context):
            return energy(scale, here * sets, here * context)

        minimum = ms.minimise(masked, scale, target(), start(), adjoint=adjoint, **LONG)
        return jnp.sum(minimum.sets**2)

    difference = (of(1.1 + 1e-5) - of(1.1 - 1e-5)) / 2e-5
    assert abs(difference) > 1e-2
    np.testing.assert_allclose(jax.grad(of)(1.1), difference, rtol=1e-6)
