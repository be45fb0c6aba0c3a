import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import problems
import pytest

import msdspn_jax as ms
from msdspn_jax.adjoints import FixedPoint, Linearised

KEY = jax.random.key(0)
LONG = {"optimizer": optax.sgd(0.5), "num_steps": 400}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def objective(problem, adjoint, projection=None, **settings):
    """A smooth function of the minimum, to be differentiated in (params, context)."""
    energy, _, _, start = problem

    def function(params, context):
        minimum = ms.minimise(
            energy, params, context, start, adjoint=adjoint, projection=projection,
            **(LONG | settings),
        )  # fmt: skip
        weights = jnp.cos(jnp.arange(start.size, dtype=start.dtype)).reshape(start.shape)
        return jnp.sum(jnp.sin(minimum.sets) * weights)

    return function


def grads_of(problem, adjoint, projection=None, **settings):
    function = objective(problem, adjoint, projection, **settings)
    return jax.jit(jax.grad(function, argnums=(0, 1)))(*problem[1:3])


def distance(a, b):
    a, b = (jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.usefixtures("float64")
class TestAgainstTheTruth:
    @pytest.mark.parametrize("projection", [None, ms.simplex])
    def test_exact_equals_finite_differences(self, projection):
        problem = problems.smooth_problem(KEY)
        function = jax.jit(objective(problem, ms.exact(), projection))
        grads = jax.jit(jax.grad(function, argnums=(0, 1)))(*problem[1:3])
        rng = np.random.default_rng(0)
        directions = jax.tree.map(lambda x: rng.normal(size=x.shape), problem[1:3])
        eps = 1e-5

        def shifted(sign):
            moved = jax.tree.map(lambda x, d: x + sign * eps * d, problem[1:3], directions)
            return function(*moved)

        numeric = (shifted(1) - shifted(-1)) / (2 * eps)
        analytic = sum(
            jnp.sum(g * d)
            for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(directions), strict=True)
        )
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6)

    @pytest.mark.parametrize("projection", [None, ms.simplex])
    def test_everything_exact_agrees(self, projection):
        problem = problems.smooth_problem(KEY)
        oracle = grads_of(problem, ms.exact(method="dense"), projection)
        others = {
            "cg": ms.exact(method="cg"),
            "conjugate_gradient": ms.conjugate_gradient(20),
            "neumann": ms.neumann(200),
        }
        for name, adjoint in others.items():
            assert distance(grads_of(problem, adjoint, projection), oracle) < 1e-7, name
        unrolled = grads_of(problem, ms.unrolled(), projection)
        assert distance(unrolled, oracle) < 1e-7

    def test_exact_equals_jaxopt(self):
        problem = problems.smooth_problem(KEY)
        energy, params, context, start = problem
        solver = jaxopt.GradientDescent(
            lambda sets, params, context: jnp.sum(energy(params, sets, context)),
            stepsize=0.5, acceleration=False, maxiter=400, tol=0, implicit_diff=True,
            implicit_diff_solve=functools.partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-12),
        )  # fmt: skip

        def function(params, context):
            sets = solver.run(start, params, context).params
            weights = jnp.cos(jnp.arange(start.size, dtype=start.dtype)).reshape(start.shape)
            return jnp.sum(jnp.sin(sets) * weights)

        expected = jax.jit(jax.grad(function, argnums=(0, 1)))(params, context)
        assert distance(grads_of(problem, ms.exact()), expected) < 1e-6

    def test_neumann_approaches_exact(self):
        problem = problems.smooth_problem(KEY)
        oracle = grads_of(problem, ms.exact())
        errors = [distance(grads_of(problem, ms.neumann(k)), oracle) for k in (0, 1, 2, 4, 8, 16)]
        assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors))

    def test_conjugate_gradient_approaches_exact(self):
        problem = problems.smooth_problem(KEY)
        oracle = grads_of(problem, ms.exact())
        errors = [distance(grads_of(problem, ms.conjugate_gradient(k)), oracle) for k in (1, 3, 6)]
        assert errors[0] > 10 * errors[1]
        assert errors[2] < 1e-6

    def test_damping_lies_between(self):
        problem = problems.smooth_problem(KEY)
        plain, damped, heavily = (
            grads_of(problem, ms.conjugate_gradient(20, damping=damping))
            for damping in (0, 0.1, 1e6)
        )
        assert 0 < distance(damped, plain) < 0.5
        assert distance(heavily, plain) > 0.99

    def test_unrolled_reaches_the_start_and_implicit_does_not(self):
        energy, params, context, start = problems.smooth_problem(KEY)

        def function(start, adjoint):
            sets = ms.minimise(energy, params, context, start, adjoint=adjoint, num_steps=2).sets
            return jnp.sum(sets**2)

        assert float(jnp.abs(jax.grad(function)(start, ms.unrolled())).max()) > 0
        chex.assert_trees_all_equal(jax.grad(function)(start, ms.identity()), jnp.zeros_like(start))


def test_identity_is_neumann_without_further_terms():
    problem = problems.fspool_problem(KEY)
    settings = {"optimizer": ms.DEFAULT_OPTIMIZER, "num_steps": 5}
    chex.assert_trees_all_close(
        grads_of(problem, ms.identity(), ms.simplex, **settings),
        grads_of(problem, ms.neumann(0), ms.simplex, **settings),
    )


def test_identity_is_the_written_rule():
    """θ̄ = −(∂²E/∂Y∂θ)ᵀ v at the iterate before the last step, by one explicit vjp."""
    energy, params, context, start = problems.fspool_problem(KEY)
    before_last = ms.minimise(energy, params, context, start, num_steps=3).sets

    def step(params, context):
        return before_last - jax.grad(lambda Y: jnp.sum(energy(params, Y, context)))(before_last)

    v = jax.random.normal(KEY, start.shape)
    expected = jax.jit(lambda *args: jax.vjp(step, *args)[1](v))(params, context)

    def function(params, context):
        return jnp.sum(ms.minimise(energy, params, context, start, num_steps=4).sets * v)

    grads = jax.jit(jax.grad(function, argnums=(0, 1)))(params, context)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)


def test_conjugate_gradient_falls_back_on_negative_curvature():
    concave = Linearised(lambda w: -w, lambda w: w)
    b = jax.random.normal(KEY, (2, 3, 2))
    chex.assert_trees_all_close(ms.conjugate_gradient(3).solve(concave, b), b)


def test_masks_and_integers_in_the_context_are_let_through():
    encoder = ms.SetEncoder(8, 6, 4)
    start = 0.1 * jax.random.normal(KEY, (2, 4, 3))
    mask = jnp.array([[True, True, False, False], [True] * 4])
    params = encoder.init(KEY, start, mask)
    energy = ms.latent_energy(encoder.apply)

    def function(params, latent, adjoint):
        context = ms.Context(latent, mask=mask)
        return jnp.sum(
            ms.minimise(energy, params, context, start, num_steps=3, adjoint=adjoint).sets ** 2
        )

    for adjoint in (ms.conjugate_gradient(2), ms.unrolled()):
        grad = jax.jit(jax.grad(functools.partial(function, adjoint=adjoint), argnums=(0, 1)))
        grads = grad(params, jnp.ones((2, 6)))
        chex.assert_tree_all_finite(grads)
        assert float(jnp.abs(grads[1]).max()) > 0


def test_composes_with_vmap_and_scan():
    problem = _, params, context, _ = problems.fspool_problem(KEY)
    settings = {"optimizer": ms.DEFAULT_OPTIMIZER, "num_steps": 3}
    single = grads_of(problem, ms.identity(), **settings)
    function = objective(problem, ms.identity(), **settings)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params, context))
    mapped = jax.jit(jax.vmap(jax.grad(function, argnums=(0, 1))))(*stacked)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], mapped), single, atol=1e-5)

    def body(carry, _):
        return carry, jax.grad(function)(carry, context)

    scanned = jax.jit(lambda p: jax.lax.scan(body, p, None, length=2)[1])(params)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], scanned), single[0], atol=1e-5)


def test_straight_through_teaches_what_lies_in_a_corner():
    """E = ½ ‖Y − θ t‖² on the simplex, t far beyond a corner: the projection holds Y there."""
    target = jnp.array([[[5.0, 0.0, 0.0], [0.0, 7.0, 1.0]]])
    weights = jnp.array([[[1.0, -2.0, 0.5], [0.25, -3.0, 2.0]]])
    energy = problems.quadratic(jnp.ones((2, 3)))

    def total(params, adjoint):
        minimum = ms.minimise(
            energy, params, ms.Context(target), jnp.full((1, 2, 3), 1 / 3), num_steps=10,
            projection=ms.simplex, adjoint=adjoint,
        )  # fmt: skip
        return jnp.sum(weights * minimum.sets), minimum.sets

    params, straight = {"scale": jnp.ones(())}, ms.identity(straight_through=True)
    (plain, sets), nothing = jax.value_and_grad(total, has_aux=True)(params, ms.identity())
    (value, _), grads = jax.value_and_grad(total, has_aux=True)(params, straight)
    assert sets.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    assert value == plain
    assert nothing["scale"] == 0
    np.testing.assert_allclose(grads["scale"], -14.0, rtol=1e-6)  # Σ weights · t
    _, forward = jax.jvp(lambda p: total(p, straight)[0], (params,), ({"scale": jnp.ones(())},))
    np.testing.assert_allclose(forward, grads["scale"], rtol=1e-6)


def test_straight_through_is_the_identity_without_a_projection():
    problem = problems.fspool_problem(KEY)
    found = grads_of(problem, ms.identity(straight_through=True))
    chex.assert_trees_all_equal(found, grads_of(problem, ms.identity()))


def temp_bytes(adjoint, num_steps):
    problem = problems.fspool_problem(KEY, batch=16, n=8, d=4, hidden=64, latent=64)
    settings = {"optimizer": ms.DEFAULT_OPTIMIZER, "num_steps": num_steps}
    function = jax.jit(jax.grad(objective(problem, adjoint, **settings), argnums=(0, 1)))
    return function.lower(*problem[1:3]).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "adjoint", [ms.identity(), ms.neumann(2), ms.conjugate_gradient(2)], ids=str
)
def test_memory_of_implicit_adjoints_does_not_grow_with_steps(adjoint):
    few, many = temp_bytes(adjoint, 10), temp_bytes(adjoint, 160)
    assert abs(many - few) < 0.05 * few


@pytest.mark.slow
def test_memory_of_unrolling_grows_linearly():
    few, more, many = (temp_bytes(ms.unrolled(), steps) for steps in (10, 85, 160))
    assert many > 5 * few
    np.testing.assert_allclose((many - more) / (more - few), 1, rtol=0.1)
    assert temp_bytes(ms.unrolled(rematerialise=True), 160) < many / 4


def test_backward_pass_shares_the_last_gradient_of_the_descent():
    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    energy, params, context, start = problems.fspool_problem(KEY, n=4, hidden=64, latent=64)
    fixed_point = FixedPoint(energy)

    def descend(params, context):
        return ms.minimise(energy, params, context, start, num_steps=3).sets

    def train(params, context, cotangent):
        sets, pull_back = jax.vjp(descend, params, context)
        return sets, pull_back(cotangent)

    def pull_back(params, context, sets, cotangent):
        return jax.vjp(lambda p, c: fixed_point.step(p, c, sets), params, context)[1](cotangent)

    apart = flops(descend, params, context) + flops(pull_back, params, context, start, start)
    gradient = flops(fixed_point.gradient, params, context, start)
    assert flops(train, params, context, start) < apart - 0.9 * gradient


@pytest.mark.parametrize(
    ("text", "adjoint"),
    [
        ("identity", ms.identity()),
        ("identity:straight-through", ms.identity(straight_through=True)),
        ("unrolled", ms.unrolled()),
        ("unrolled:remat", ms.unrolled(rematerialise=True)),
        ("exact", ms.exact()),
        ("exact:cg", ms.exact(method="cg")),
        ("neumann:3", ms.neumann(3)),
        ("conjugate_gradient:10", ms.conjugate_gradient()),
        ("conjugate_gradient:5:0.01", ms.conjugate_gradient(5, damping=0.01)),
    ],
)
def test_parse(text, adjoint):
    assert ms.parse_adjoint(text) == adjoint
    assert str(adjoint) == text
    assert ms.parse_adjoint("conjugate-gradient") == ms.conjugate_gradient()


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "newton",
        "identity:1",
        "identity:straight-through:1",
        "neumann:x",
        "neumann:-1",
        "conjugate_gradient:1:2:3",
    ],
)
def test_parse_errors(text):
    with pytest.raises(ValueError, match="adjoint: expected"):
        ms.parse_adjoint(text)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ms.neumann(-1), "num_terms: expected"),
        (lambda: ms.conjugate_gradient(0), "max_steps: expected"),
        (lambda: ms.conjugate_gradient(damping=-1), "damping: expected"),
        (lambda: ms.exact(method="lu"), "method: expected one of"),
        (lambda: ms.neumann(1.5), "num_terms: expected an integer >= 0, got 1.5"),
        (lambda: ms.conjugate_gradient(2.5), "max_steps: expected an integer >= 1, got 2.5"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.usefixtures("without_hook")
def test_numpys_integers_count_as_integers():
    energy, params, context, start = problems.fspool_problem(KEY)
    one, two = np.int64(1), np.int32(2)
    for adjoint, same in (
        (ms.neumann(two), ms.neumann(2)),
        (ms.conjugate_gradient(two), ms.conjugate_gradient(2)),
    ):
        assert str(adjoint) == str(same)
        settings = {"num_steps": one, "adjoint": adjoint}
        found = ms.minimise(energy, params, context, start, **settings).sets
        expected = ms.minimise(energy, params, context, start, num_steps=1).sets
        chex.assert_trees_all_equal(found, expected)


def test_conjugate_gradients_of_float16_do_not_overflow():
    """Squares of the cotangent leave the range of float16, 65,504; the solution does not."""
    curvature = jnp.array([1.0, 2.0, 4.0], jnp.float16).reshape(1, 3, 1)

    def energy(params, sets, context):
        return jnp.sum(curvature * (sets - params * context) ** 2, (1, 2)) / 2

    start = jnp.zeros((1, 3, 1), jnp.float16)
    context = jnp.ones((1, 3, 1), jnp.float16)

    def loss(params):
        minimum = ms.minimise(
            energy, params, context, start, optimizer=ms.nesterov(0.4, 0.0), num_steps=60,
            adjoint=ms.conjugate_gradient(3),
        )  # fmt: skip
        return jnp.sum(minimum.sets * jnp.float16(400))

    # Y* = params * context, so each of the three entries adds 400.
    np.testing.assert_allclose(jax.grad(loss)(jnp.float16(1)), 1200, rtol=1e-2)


def test_exact_by_cg_solves_sets_of_small_cotangents_beside_large_ones():
    energy, params, context, start = problems.fspool_problem(KEY)

    cotangent = jnp.ones_like(start).at[0].set(1e6)

    def gradient(adjoint):
        def descend(context):
            return ms.minimise(energy, params, context, start, adjoint=adjoint, num_steps=3).sets

        return jax.vjp(descend, context)[1](cotangent)[0].latent

    by_cg, dense = (gradient(ms.exact(method=method)) for method in ("cg", "dense"))
    chex.assert_trees_all_close(by_cg[1:], dense[1:], rtol=1e-2, atol=1e-5)


@pytest.mark.usefixtures("without_hook")
def test_the_spelling_of_a_damping_keeps_all_digits():
    adjoint = ms.conjugate_gradient(10, damping=0.12345678)
    assert ms.parse_adjoint(str(adjoint)) == adjoint


# --- curvatures and cotangents of any size ---


@pytest.mark.parametrize("name", ["exact:dense", "exact:cg", "conjugate_gradient:4"])
@pytest.mark.parametrize(
    ("curvature", "dtype", "atol"),
    [(1e-6, jnp.float32, 1e-5), (1e-10, jnp.float32, 1e-5), (1e-2, jnp.bfloat16, 1e-2)],
)
def test_small_curvatures_are_not_lost(name, curvature, dtype, atol):
    def energy(params, sets, context):
        return (0.5 * curvature * jnp.sum((sets - context) ** 2, (1, 2))).astype(dtype)

    def entry(context):
        adjoint = ms.parse_adjoint(name)
        return ms.minimise(energy, {}, context, y, num_steps=1, adjoint=adjoint).sets[0, 0, 0]

    y = jnp.ones((1, 2, 2), dtype)
    reverse, (_, forward) = jax.grad(entry)(y)[0, 0, 0], jax.jvp(entry, (y,), (jnp.ones_like(y),))
    np.testing.assert_allclose([float(reverse), float(forward)], 1, atol=atol)


def test_sets_of_a_batch_are_solved_each_by_itself():
    # Condition number 5 in each, curvatures of 1e-4 to 5 over the batch.
    size = np.array([1.0, 1e-2, 1e-4]).reshape(3, 1, 1)
    curvature = jnp.asarray(np.linspace(1.0, 5.0, 12).reshape(1, 4, 3) * size, jnp.float32)

    def energy(params, sets, context):
        return jnp.sum(0.5 * context * sets**2 - params * sets, (1, 2))

    def scaled(params):
        adjoint = ms.exact(method="cg")
        start = 1 / curvature
        found = ms.minimise(energy, params, curvature, start, num_steps=1, adjoint=adjoint)
        return found.sets * curvature

    _, tangent = jax.jvp(scaled, (jnp.ones((3, 1, 1)),), (jnp.ones((3, 1, 1)),))
    np.testing.assert_allclose(tangent, np.ones((3, 4, 3)), rtol=1e-4)
    gradient = jax.grad(lambda params: jnp.sum(scaled(params)))(jnp.ones((3, 1, 1)))
    np.testing.assert_allclose(gradient.ravel(), [12, 12, 12], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e20])
def test_conjugate_gradient_takes_cotangents_of_any_size(size):
    curvature = jnp.array([0.5, 1.5]).reshape(1, 1, 2)

    def loss(params):
        energy = lambda p, y, _: 0.5 * jnp.sum(curvature * y**2 - 2 * p * y, (1, 2))  # noqa: E731
        adjoint = ms.conjugate_gradient(4)
        found = ms.minimise(energy, params, None, 1 / curvature, num_steps=1, adjoint=adjoint)
        return size * jnp.sum(found.sets)

    assert jax.grad(loss)(1.0) / size == pytest.approx(2 + 2 / 3, rel=1e-5)
