import dataclasses

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import msdspn_jax as ms
from msdspn_jax._closures import is_fixed
from msdspn_jax.descent import clip_per_set, per_set_norm

KEY = jax.random.key(0)


def by_hand(energy, params, context, sets, *, steps, momentum, clip, projection, lr=1.0):
    """The semantics in a plain loop: per-set clipping, Nesterov momentum, projection."""
    project = projection or (lambda x: x)
    buffer = jnp.zeros_like(sets)
    for _ in range(steps):
        grads = jax.grad(lambda sets: jnp.sum(energy(params, sets, context)))(sets)
        if clip is not None:
            norm = jnp.sqrt(jnp.sum(grads**2, (1, 2), keepdims=True))
            grads = grads * jnp.minimum(1, clip / (norm + 1e-6))
        buffer = momentum * buffer + grads
        sets = project(sets - lr * (grads + momentum * buffer if momentum else grads))
    return sets


@pytest.mark.parametrize(
    ("momentum", "clip", "projection"), [(0.9, 0.05, None), (0.0, None, ms.simplex)]
)
def test_steps_equal_a_plain_loop(momentum, clip, projection):
    energy, params, context, start = problems.fspool_problem(KEY)
    optimizer = optax.sgd(1.0, momentum=momentum or None, nesterov=momentum > 0)
    settings = {"optimizer": optimizer, "num_steps": 4, "projection": projection}
    minimum = ms.minimise(energy, params, context, start, max_grad_norm=clip, **settings)
    first = start if projection is None else projection(start)
    expected = by_hand(
        energy, params, context, first, steps=4, momentum=momentum, clip=clip, projection=projection
    )
    chex.assert_trees_all_close(minimum.sets, expected, atol=1e-5)
    chex.assert_trees_all_equal(minimum.num_steps, jnp.full(3, 4, jnp.int32))
    chex.assert_trees_all_close(minimum.energy, energy(params, minimum.sets, context), rtol=1e-5)


def test_unrolled_starts_from_the_initial_set_as_given():
    energy, params, context, start = problems.fspool_problem(KEY)
    settings = {"num_steps": 1, "projection": ms.simplex, "return_trajectory": True}
    for adjoint, first in ((ms.unrolled(), start), (ms.identity(), ms.simplex(start))):
        minimum = ms.minimise(energy, params, context, start, adjoint=adjoint, **settings)
        chex.assert_trees_all_close(minimum.trajectory.sets[0], first)


def test_trajectory():
    energy, params, context, start = problems.fspool_problem(KEY)
    minimum = ms.minimise(energy, params, context, start, num_steps=3, return_trajectory=True)
    trajectory = minimum.trajectory
    chex.assert_shape(trajectory.sets, (4, *start.shape))
    chex.assert_trees_all_equal(trajectory.sets[0], start)
    chex.assert_trees_all_equal(trajectory.sets[-1], minimum.sets)
    for step in range(4):
        expected = energy(params, trajectory.sets[step], context)
        chex.assert_trees_all_close(trajectory.energy[step], expected, rtol=1e-4)
    chex.assert_trees_all_equal(trajectory.gradient_norm[-1], minimum.gradient_norm)


@pytest.mark.parametrize("return_trajectory", [False, True])
def test_tolerance_stops_each_set_on_its_own(return_trajectory):
    energy = problems.quadratic(jnp.full((2, 2), 0.5))
    params, target = {"scale": jnp.ones(())}, jnp.ones((3, 2, 2))
    context = ms.Context(target)
    # Distances 2^-k · const: every step halves the gradient, so the counts can be told in advance.
    start = target + jnp.array([0.0, 0.01, 1.0])[:, None, None]
    minimum = ms.minimise(
        energy, params, context, start, optimizer=optax.sgd(1.0), num_steps=50, tolerance=1e-3,
        return_trajectory=return_trajectory,
    )  # fmt: skip
    np.testing.assert_array_equal(minimum.num_steps, [0, 4, 10])
    assert bool((minimum.gradient_norm <= 1e-3).all())


def test_tolerance_keeps_the_implicit_gradient():
    energy, params, context, start = problems.smooth_problem(KEY)

    def loss(params, tolerance):
        minimum = ms.minimise(
            energy, params, context, start, optimizer=optax.sgd(0.5), num_steps=200,
            tolerance=tolerance, adjoint=ms.exact(),
        )  # fmt: skip
        return jnp.sum(jnp.sin(minimum.sets))

    full, early = (jax.grad(loss)(params, tolerance) for tolerance in (None, 1e-5))
    chex.assert_trees_all_close(full, early, atol=1e-4)


def test_permuting_the_batch_permutes_the_result():
    energy, params, context, start = problems.fspool_problem(KEY)
    order = jnp.array([2, 0, 1])
    plain = ms.minimise(energy, params, context, start, num_steps=3, max_grad_norm=0.1)
    mixed = ms.minimise(
        energy,
        params,
        jax.tree.map(lambda x: x[order], context),
        start[order],
        num_steps=3,
        max_grad_norm=0.1,
    )
    chex.assert_trees_all_close(mixed.sets, plain.sets[order], atol=1e-6)


def test_permuting_the_initial_set_permutes_the_result_where_no_two_are_equal():
    energy, params, context, start = problems.fspool_problem(KEY)
    order = jnp.array([3, 1, 4, 0, 2])
    plain = ms.minimise(energy, params, context, start, num_steps=3)
    moved = context._replace(initial_sets=context.initial_sets[:, order])
    mixed = ms.minimise(energy, params, moved, start[:, order], num_steps=3)
    chex.assert_trees_all_close(mixed.sets, plain.sets[:, order], atol=1e-5)


def test_equal_elements_are_separated_by_fspool_and_by_no_other_pool():
    for pool, separated in (("fspool", True), ("sum", False), ("mean", False)):
        energy, params, context, start = problems.fspool_problem(KEY, pool=pool, proximity=0)
        start = jnp.broadcast_to(start[:, :1], start.shape)
        sets = ms.minimise(energy, params, context, start, num_steps=3).sets
        assert bool(jnp.abs(sets[:, :1] - sets[:, 1:]).min() > 1e-6) == separated, pool


def test_any_optax_transformation():
    energy = problems.quadratic(jnp.linspace(0.1, 1.5, 6).reshape(3, 2))
    params, context = {"scale": jnp.ones(())}, ms.Context(jax.random.normal(KEY, (4, 3, 2)))
    start = jnp.zeros((4, 3, 2))
    for optimizer in (optax.adam(0.1), optax.sgd(1.0, momentum=0.5)):
        minimum = ms.minimise(energy, params, context, start, optimizer=optimizer, num_steps=300)
        assert bool((minimum.energy < 0.01 * energy(params, start, context)).all())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtype_is_kept(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        problem = problems.fspool_problem(jax.random.key(1))
        energy, *arrays = problem
        params, context, start = jax.tree.map(lambda x: x.astype(dtype), arrays)

        def loss(params):
            minimum = ms.minimise(energy, params, context, start, num_steps=3, max_grad_norm=1.0)
            return jnp.sum(minimum.sets**2), minimum

        grads, minimum = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert minimum.sets.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_norm_and_clipping_at_zero():
    zero = jnp.zeros((2, 3, 2))
    chex.assert_trees_all_equal(clip_per_set(zero, 1.0), zero)
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(per_set_norm(x)))(zero))
    grads = jnp.stack([jnp.full((3, 2), 10.0), jnp.full((3, 2), 0.01)])
    norms = per_set_norm(clip_per_set(grads, 1.0))
    np.testing.assert_allclose(norms, [1.0, 0.01 * 6**0.5], rtol=1e-5)


def test_diverging_loop_is_seen():
    energy = problems.quadratic(jnp.full((2, 2), 5.0))
    minimum = ms.minimise(
        energy, {"scale": jnp.ones(())}, ms.Context(jnp.ones((1, 2, 2))), jnp.zeros((1, 2, 2)),
        optimizer=optax.sgd(1.0), num_steps=200,
    )  # fmt: skip
    assert not np.isfinite(minimum.gradient_norm).all()


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-3}, {"optimizer": ms.anderson()}])
def test_a_set_that_is_not_finite_is_nan_and_no_other(options):
    """However it is decoded: a set that stayed where it began would look like a result."""
    energy = problems.quadratic(jnp.full((2, 2), 0.5))
    latent = jnp.ones((3, 2, 2)).at[1].set(jnp.nan)

    @jax.jit
    def decode(latent):
        return ms.minimise(
            energy, {"scale": jnp.ones(())}, ms.Context(latent), jnp.zeros((3, 2, 2)),
            num_steps=5, **options,
        )  # fmt: skip

    minimum = decode(latent)
    assert np.isnan(minimum.sets).all((1, 2)).tolist() == [False, True, False]
    assert (np.asarray(minimum.status) == ms.Status.NOT_FINITE).tolist() == [False, True, False]


def call(**changes):
    energy, params, context, start = problems.fspool_problem(KEY)
    arguments = {"energy": energy, "params": params, "context": context, "initial_sets": start}
    return ms.minimise(**(arguments | {"num_steps": 2} | changes))


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_sets": jnp.ones((5, 3))}, r"initial_sets: expected 3 axes \[batch n d\]"),
        ({"initial_sets": jnp.ones((3, 0, 3))}, "initial_sets: expected every axis"),
        ({"initial_sets": jnp.ones((3, 5, 0))}, "initial_sets: expected every axis"),
        ({"initial_sets": jnp.ones((3, 5, 3), int)}, "initial_sets: expected a floating-point"),
        ({"initial_sets": jnp.full((3, 5, 3), jnp.nan)}, "initial_sets: expected finite values"),
        ({"initial_sets": jnp.ones((3, 4, 3))}, "sets: expected n = set_size = 5"),
        ({"context": ms.Context(jnp.full((3, 12), jnp.inf))}, r"context.latent: expected finite"),
        ({"context": ms.Context(jnp.ones((3, 11)))}, "context.latent: expected shape"),
        ({"context": ms.Context(jnp.ones((3, 12)))}, "context.initial_sets: expected an array"),
        (
            {"context": ms.Context(jnp.ones((3, 12)), jnp.ones((3, 5)))},
            "context.initial_sets: expected shape",
        ),
        (
            {"context": ms.Context(jnp.ones((3, 12)), mask=jnp.ones((3, 5)))},
            "context.mask: expected booleans",
        ),
        (
            {"context": ms.Context(jnp.ones((3, 12)), mask=jnp.ones((1, 5), bool))},
            "context.mask: expected shape",
        ),
        (
            {"energy": ms.latent_energy(lambda params, sets: sets)},
            r"encode: expected a function .* that returns \[batch, latent\]",
        ),
        ({"num_steps": 0}, "num_steps: expected an integer >= 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a number > 0"),
        ({"tolerance": 0.0}, "tolerance: expected a number > 0"),
        ({"adjoint": "identity"}, "adjoint: expected identity"),
        ({"gradient": ms.identity()}, "gradient: expected adjoint, the name here, got"),
        ({"maxiter": 5}, "maxiter: expected num_steps, the name here, got maxiter=5"),
        ({"step_size": 0.5}, r"step_size: expected optimizer=nesterov\("),
        ({"num_step": 5}, "num_step: expected one of energy, .*num_steps.*, the arguments"),
        ({"energy": lambda p, s, c: jnp.sum(s)}, "energy: expected one number per set"),
        ({"energy": lambda p, s, c: s}, "energy: expected one number per set"),
    ],
)
def test_errors(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changes)


def _quadratic(params, sets, context):
    return 0.25 * jnp.sum((sets - context) ** 2, (1, 2))


def test_norms_of_16_bits_neither_overflow_nor_vanish():
    for size, tolerance in ((100.0, None), (1e-4, 1e-6)):
        goal = jnp.full((1, 4, 2), size, jnp.float16)
        minimum = ms.minimise(
            _quadratic, {}, goal, 0 * goal, num_steps=60, max_grad_norm=10.0, tolerance=tolerance
        )
        np.testing.assert_allclose(minimum.sets, goal, rtol=0.05)


def test_a_trajectory_that_ends_early_ends_in_its_last_set():
    ones = jnp.ones((1, 1, 1))
    path = ms.minimise(
        _quadratic, {}, ones, 0 * ones, optimizer=ms.nesterov(1.0, 0.0), num_steps=8,
        tolerance=0.2, return_trajectory=True,
    ).trajectory  # fmt: skip
    assert path.sets.ravel().tolist() == [0, 0.5] + 7 * [0.75]
    assert path.energy.ravel().tolist() == [0.25, 0.0625] + 7 * [0.015625]


def test_running_again_takes_as_many_steps_with_a_tolerance():
    ones = jnp.ones((1, 1, 1))
    for tolerance in (None, 1e-9):
        descent = ms.Descent(
            _quadratic, num_steps=10, optimizer=ms.nesterov(0.1, 0.0), tolerance=tolerance
        )
        state = descent.run({}, ones, descent.init({}, ones, 0 * ones))
        assert descent.run({}, ones, state).num_steps.tolist() == [20]


def test_padding_does_not_weaken_the_pull_of_the_start():
    def encode(params, sets, mask):
        return jnp.where(mask[..., None], sets, 0).sum(1)

    energy, ends = ms.latent_energy(encode, proximity=1.0), []
    for padding in (0, 3):
        start = jnp.concatenate([jnp.arange(1.0, 4.0), jnp.zeros(padding)])[None, :, None]
        context = ms.Context(jnp.array([[9.0]]), start, mask=jnp.arange(3 + padding)[None] < 3)
        end = ms.minimise(
            energy, {}, context, start, num_steps=300, optimizer=ms.nesterov(0.1, 0.9)
        )
        ends.append(end.sets[0, :3, 0])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)
    np.testing.assert_allclose(ends[0], [1.9, 2.9, 3.9], rtol=1e-3)


def wells(params, sets, context):
    """Minima near +context and -context, one of them deeper by the sign of params."""
    return jnp.sum((sets**2 - context**2) ** 2 / 4 + params * sets, (1, 2))


def test_lowest_takes_for_every_set_the_start_that_ended_lowest():
    context = jnp.array([1.0, 1.5, 2.0]).reshape(3, 1, 1)
    tilt = jnp.array([0.1, -0.1, 0.1])[:, None, None]
    energy = lambda params, sets, context: wells(params * tilt, sets, context)  # noqa: E731
    starts = jnp.array([1.0, -1.0, 0.5]).reshape(3, 1, 1, 1) * context

    def descend(params, start):
        return ms.minimise(
            energy, params, context, start, optimizer=ms.nesterov(0.1, 0.0), num_steps=200,
            adjoint=ms.exact(), return_trajectory=True,
        )  # fmt: skip

    found = jax.jit(lambda: ms.lowest(jax.vmap(lambda y: descend(1.0, y))(starts)))()
    singly = [descend(1.0, start) for start in starts]
    for i, best in enumerate([1, 0, 1]):
        expected = jax.tree.map(lambda x, i=i: x[i], singly[best]._replace(trajectory=None))
        own = jax.tree.map(lambda x, i=i: x[i], found._replace(trajectory=None))
        chex.assert_trees_all_close(own, expected, atol=1e-5)
        expected = jax.tree.map(lambda x, i=i: x[:, i], singly[best].trajectory)
        own = jax.tree.map(lambda x, i=i: x[:, i], found.trajectory)
        chex.assert_trees_all_close(own, expected, atol=1e-5)

    # The derivative is that of the minimum which was taken.
    total = lambda params: jnp.sum(ms.lowest(jax.vmap(lambda y: descend(params, y))(starts)).sets)  # noqa: E731
    slope = (total(1.01) - total(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(total)(1.0), slope, rtol=2e-2)


def test_lowest_passes_over_descents_that_diverged():
    nan, inf, status = jnp.nan, jnp.inf, ms.Status
    minimum = ms.Minimum(
        sets=jnp.arange(9.0).reshape(3, 3, 1, 1),
        energy=jnp.array([[nan, nan, -inf], [2.0, nan, 0.0], [1.0, nan, 1.0]]),
        gradient_norm=jnp.ones((3, 3)),
        num_steps=jnp.ones((3, 3), int),
        status=jnp.full((3, 3), status.OUT_OF_STEPS).at[1, 2].set(status.NOT_FINITE),
    )
    found = ms.lowest(minimum)
    assert found.sets.ravel().tolist() == [6.0, 1.0, 8.0]
    assert found.energy[jnp.array([0, 2])].tolist() == [1.0, 1.0]
    assert jnp.isnan(found.energy[1])
    with pytest.raises(ValueError, match=r"minima\.sets: expected"):
        ms.lowest(jax.tree.map(lambda x: x[0], minimum))


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ("simplex", "projection: expected a function of sets"),
        (lambda sets: None, "projection: expected a function that returns sets of shape"),
        (lambda sets: sets.astype(jnp.bfloat16), "float32, as it is given"),
        (lambda sets: sets[:, :1], "projection: expected a function that returns sets of shape"),
    ],
)
def test_a_projection_that_is_none_is_named(projection, message):
    def energy(params, sets, context):
        return jnp.sum(sets**2, (1, 2))

    with pytest.raises((TypeError, ValueError), match=message):
        ms.minimise(energy, {}, None, jnp.ones((1, 2, 1)), num_steps=2, projection=projection)


def test_what_the_user_wrote_may_use_what_changes():
    factor = [1.0]

    @dataclasses.dataclass(frozen=True)
    class Energy:
        def __call__(self, params, sets, context):
            return jnp.sum(factor[0] * (sets - 1) ** 2, (1, 2)) / 4

    class Encoder(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, sets, mask=None):
            return factor[0] * sets.sum(1)

    context = ms.Context(jnp.ones((1, 1)))
    for energy in (Energy(), ms.latent_energy(Encoder().apply)):
        found = []
        for factor[0] in (1.0, 3.0):
            minimum = ms.minimise(energy, {}, context, jnp.zeros((1, 1, 1)), num_steps=1,
                                  optimizer=ms.nesterov(0.1))  # fmt: skip
            found.append(minimum.sets.item())
        assert found[0] != found[1]


# --- what changes between calls ---


class Scaled(nn.Module):
    """Reads a number that may be changed."""

    @nn.compact
    def __call__(self, x):
        return factor["now"] * x.sum(1)


factor = {"now": 1.0}
HOLDERS = {
    "a function": lambda: nn.Sequential([lambda x: factor["now"] * x, lambda h: h.sum(1)]),
    "a module": lambda: nn.Sequential([Scaled()]),
    "remat": lambda: nn.remat(Scaled)(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_modules_that_hold_what_changes_are_seen_as_they_are(name):
    energy = ms.latent_energy(HOLDERS[name]().apply)
    context, start = ms.Context(jnp.ones((1, 1))), jnp.zeros((1, 1, 1))

    def minimum():
        optimizer = ms.nesterov(0.1, 0.0)
        found = ms.minimise(energy, {}, context, start, optimizer=optimizer, num_steps=200)
        return found.sets.item()

    for factor["now"] in (1.0, 2.0, 4.0):
        assert minimum() == pytest.approx(1 / factor["now"], rel=1e-4)
        curvature = ms.suggest_step_size(
            energy, {}, context, start, key=jax.random.key(0)
        ).curvature
        assert curvature == pytest.approx(factor["now"] ** 2, rel=1e-2)
    factor["now"] = 1.0


def test_optimisers_that_hold_what_changes_are_seen_as_they_are():
    rate = {"now": 0.1}
    by_rate = lambda grads, _: jax.tree.map(lambda g: -rate["now"] * g, grads)  # noqa: E731
    optimizer, ones = optax.stateless(by_rate), jnp.ones((1, 1, 1))

    def energy(params, sets, context):
        return 0.5 * jnp.sum((sets - 1) ** 2, (1, 2))

    for rate["now"] in (0.1, 0.5):
        found = ms.minimise(energy, {}, None, 0 * ones, optimizer=optimizer, num_steps=1)
        assert found.sets.item() == pytest.approx(rate["now"])


@pytest.mark.parametrize("value", [
    tuple(ms.nesterov()), tuple(ms.anderson()), tuple(optax.sgd(0.1, momentum=0.9)),
    tuple(optax.adam(1e-3)), tuple(optax.sgd(optax.linear_schedule(1.0, 0.1, 10))), ms.simplex,
    ms.latent_energy(ms.SetEncoder(8, 8, 4, dtype=jnp.bfloat16).apply, proximity=0.1),
    nn.Sequential([nn.Dense(3), nn.relu, jnp.tanh]).apply,
])  # fmt: skip
def test_what_the_libraries_make_is_kept_compiled(value):
    assert is_fixed(value)


def test_no_steps_leave_the_sets_where_they_are():
    descent = ms.Descent(lambda p, y, c: jnp.sum(y**2, (1, 2)), 5)
    start = descent.init({}, None, jnp.ones((1, 1, 1)))
    for count in (0, -3):
        np.testing.assert_array_equal(descent.run({}, None, start, count).sets, 1)
        run = jax.jit(lambda count: descent.run({}, None, start, count).sets)
        np.testing.assert_array_equal(run(count), 1)
    assert descent.run({}, None, start, 1).num_steps.item() == 1


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ms.nesterov("1"), "step_size: expected a number > 0, got '1'"),
        (lambda: ms.nesterov(momentum="0.9"), "momentum: expected a number in"),
        (lambda: ms.anderson(history=2.5), "history: expected an integer >= 2, got 2.5"),
        (lambda: ms.neumann(True), "num_terms: expected an integer >= 0, got True"),
        (lambda: ms.conjugate_gradient(damping="0.1"), "damping: expected a number >= 0"),
        (lambda: jax.jit(lambda x: ms.conjugate_gradient(damping=x))(0.1), "damping: .* traced"),
        (lambda: ms.parse_adjoint(None), "adjoint: expected .* got None"),
        (lambda: ms.latent_energy(ms.SetEncoder(2, 2, 2)), "encode: expected a function"),
        (lambda: descend(energy=None), "energy: expected a function"),
        (lambda: descend(adjoint=ms.Unrolled), "adjoint: expected identity"),
        (lambda: descend(tolerance="small"), "tolerance: expected a number > 0"),
        (lambda: descend(context=jnp.ones((2, 1))), r"context: expected a Context.*\(2, 1\)"),
    ],
)
def test_an_argument_of_another_kind_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def descend(**changes):
    energy = ms.latent_energy(lambda params, sets: sets.sum(1))
    given = {"energy": energy, "context": ms.Context(jnp.ones((2, 1)))} | changes
    return ms.minimise(params={}, initial_sets=jnp.zeros((2, 3, 1)), num_steps=2, **given)


def test_a_state_at_rest_descends_again_in_another_context():
    def energy(p, sets, context):
        return jnp.sum((sets - context) ** 2, (1, 2)) / 2

    optimizer = ms.nesterov(0.5, 0.0)
    descent = ms.Descent(energy, num_steps=50, optimizer=optimizer, tolerance=1e-4)
    one = jnp.ones((1, 2, 1))
    state = descent.run({}, one, descent.init({}, one, 0 * one))
    assert not state.going.any()
    chex.assert_trees_all_close(descent.run({}, 3 * one, state).sets, 3 * one, atol=1e-3)
    assert int(descent.run({}, one, state).num_steps[0]) == int(state.num_steps[0])


def test_energies_that_differ_in_a_transpose_alone_are_told_apart():
    def moved(factor):
        def double(y):
            return jax.custom_derivatives.linear_call(
                lambda r, x: x * 2.0, lambda r, x: x * factor, (), y
            )

        def energy(p, y, c):
            return jnp.sum((double(y) - 1) ** 2, (1, 2)) / 2

        return ms.minimise(
            energy, {}, None, jnp.zeros((1, 1, 1)), optimizer=ms.nesterov(0.1, 0.0), num_steps=1
        ).sets.item()

    np.testing.assert_allclose([moved(2.0), moved(0.0)], [0.2, 0.0], rtol=1e-6)
