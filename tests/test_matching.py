"""The optimum's cost equals SciPy's, whatever the cost looks like; failures are loud."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import msdspn_jax as ms
from msdspn_jax.matching import (
    INVALID,
    UNMATCHED,
    assign,
    augmenting_paths,
    matched_cost,
)

METHODS = ("device", "optax", "host")
LARGEST = np.finfo(np.float32).max


def random_cost(seed, shape, kind):
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        cost = rng.random(shape)
    elif kind == "tied":
        cost = rng.integers(0, 3, shape)
    elif kind == "negative":
        cost = -100 * rng.random(shape) + 30
    elif kind == "rank-one":  # every row likes the same columns: long augmenting paths
        cost = rng.random((*shape[:-1], 1)) * rng.random((*shape[:-2], 1, shape[-1]))
    else:
        cost = np.zeros(shape)
    return cost.astype(np.float32)


def scipy_cost(cost, rows=None, columns=None):
    rows = np.ones(cost.shape[0], bool) if rows is None else rows
    columns = np.ones(cost.shape[1], bool) if columns is None else columns
    cost = cost[rows][:, columns]
    row, column = linear_sum_assignment(cost)
    return cost[row, column].sum(), len(row)


def check(cost, assignment, rows=None, columns=None):
    """A valid matching of as many pairs as there can be, at SciPy's cost."""
    for index, (matrix, columns_of) in enumerate(zip(cost, np.asarray(assignment), strict=True)):
        live = (
            np.ones(len(matrix), bool) if rows is None else rows[index],
            np.ones(matrix.shape[1], bool) if columns is None else columns[index],
        )
        matched = np.flatnonzero(columns_of != UNMATCHED)
        taken = columns_of[matched]
        assert len(set(taken.tolist())) == len(taken)
        assert live[0][matched].all()
        assert live[1][taken].all()
        best, pairs = scipy_cost(matrix, *live)
        assert len(matched) == pairs
        np.testing.assert_allclose(matrix[matched, taken].sum(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["uniform", "tied", "negative", "rank-one", "zero"])
@pytest.mark.parametrize("shape", [(7, 6, 6), (7, 4, 6)])
def test_optimal(method, kind, shape):
    cost = random_cost(0, shape, kind)
    assignment = assign(cost, method=method)
    chex.assert_shape(assignment, shape[:2])
    chex.assert_type(assignment, jnp.int32)
    check(cost, assignment)


# Few shapes, so that little is compiled; many values.
@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(7, 6, 6), (7, 4, 6), (7, 6, 4)]),
    st.sampled_from(["uniform", "tied", "negative", "rank-one", "zero"]),
    st.booleans(),
)
def test_ours_equals_scipy(seed, shape, kind, masked):
    cost = random_cost(seed, shape, kind)
    rng = np.random.default_rng(seed + 1)
    rows, columns = (rng.random((shape[0], size)) < 0.6 for size in shape[1:])
    mask = (rows, columns) if masked else None
    assignment = assign(cost, mask=mask)
    check(cost, assignment, *(mask or ()))


@pytest.mark.parametrize("method", METHODS)
def test_rows_come_in_order(method):
    """Asymmetric, so that the inverse permutation or unsorted pairs would show."""
    cost = np.ones((2, 4, 4), np.float32)
    best = np.array([[2, 0, 3, 1], [1, 2, 3, 0]])
    cost[np.arange(2)[:, None], np.arange(4), best] = 0
    np.testing.assert_array_equal(assign(cost, method=method), best)


@pytest.mark.parametrize("method", ["device", "host"])
def test_long_paths(method):
    """The classical worst case: every new row pushes all earlier ones along."""
    n = 12
    cost = (np.arange(1, n + 1)[:, None] * np.arange(1, n + 1)).astype(np.float32)[None]
    assignment = assign(cost, method=method)
    np.testing.assert_array_equal(assignment[0], np.arange(n)[::-1])


@pytest.mark.parametrize("method", ["device", "host"])
@pytest.mark.parametrize("shape", [(7, 6, 6), (7, 4, 6)])
def test_mask(method, shape):
    cost = random_cost(3, shape, "uniform")
    rng = np.random.default_rng(1)
    rows, columns = (rng.random((7, size)) < 0.5 for size in shape[1:])
    rows[0], columns[1] = False, False  # nothing to match
    # What does not take part may hold anything.
    cost[~(rows[:, :, None] & columns[:, None, :])] = np.nan
    assignment = np.asarray(assign(cost, mask=(rows, columns), method=method))
    assert (assignment[:2] == UNMATCHED).all()
    check(cost, assignment, rows, columns)


def test_one_mask_for_rows_and_columns():
    cost = random_cost(4, (7, 6, 6), "uniform")
    mask = np.array([1, 0, 1, 1, 1, 0], bool) & np.ones((7, 1), bool)
    np.testing.assert_array_equal(
        assign(cost, mask=mask, method="device"), assign(cost, mask=(mask, mask), method="host")
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_cost_that_is_not_finite_is_reported(method, value):
    cost = random_cost(5, (2, 4, 4), "uniform")
    cost[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"cost: expected finite numbers.*\(1, 2, 3\)"):
        assign(cost, method=method)


@pytest.mark.parametrize("method", ["device", "optax"])
def test_cost_that_is_not_finite_under_jit(method):
    cost = random_cost(6, (3, 6, 6), "uniform")
    sound = assign(cost, method=method)
    cost[1, 2, 3] = np.nan
    assignment = jax.jit(lambda cost: assign(cost, method=method))(cost)
    np.testing.assert_array_equal(assignment[1], INVALID)
    np.testing.assert_array_equal(assignment[::2], sound[::2])
    total = matched_cost(cost, assignment)
    np.testing.assert_array_equal(np.isnan(total), [False, True, False])
    gradient = jax.grad(lambda cost: matched_cost(cost, assignment).sum())(jnp.asarray(cost))
    assert np.isnan(gradient[1]).all()
    np.testing.assert_array_equal(gradient[::2].sum(2), 1)
    gathered = jnp.take_along_axis(jnp.asarray(cost), assignment[..., None], axis=-1)
    assert np.isnan(gathered[1]).all()


@pytest.mark.usefixtures("without_hook")
def test_an_assignment_to_columns_that_are_not_there_is_refused():
    cost = jnp.ones((2, 2, 3))
    for column in (3, -5):
        with pytest.raises(ValueError, match=f"assignment: expected columns 0 to 2.*got {column}"):
            matched_cost(cost, jnp.array([[0, 1], [0, column]]))
    with pytest.raises(TypeError, match="assignment: expected integers"):
        matched_cost(cost, jnp.ones((2, 2)))


def test_matched_cost_and_its_gradient():
    cost = jnp.asarray(random_cost(7, (2, 3, 5), "uniform"))
    assignment = assign(cost)
    total, gradient = jax.value_and_grad(lambda cost: matched_cost(cost, assign(cost)).sum())(cost)
    np.testing.assert_allclose(total, sum(scipy_cost(c)[0] for c in np.asarray(cost)), rtol=1e-6)
    np.testing.assert_array_equal(gradient, jax.nn.one_hot(assignment, 5))


def test_shapes_and_transformations():
    cost = random_cost(8, (2, 3, 4, 4), "uniform")
    batched = assign(cost)
    chex.assert_shape(batched, (2, 3, 4))
    np.testing.assert_array_equal(assign(cost[1, 2]), batched[1, 2])
    mapped = jax.jit(jax.vmap(lambda cost: assign(cost)))(cost)
    np.testing.assert_array_equal(mapped, batched)
    chex.assert_shape(assign(np.zeros((0, 4, 4))), (0, 4))
    chex.assert_shape(assign(np.zeros((2, 0, 4))), (2, 0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "tied", "zero"])
@pytest.mark.parametrize(("sets", "pieces"), [(8, 0), (9, 2), (16, 2), (31, 4), (32, 0), (5, 2)])
def test_sets_are_matched_alike_in_any_company(sets, pieces, kind, masked, monkeypatch):
    piece = 8
    if sets == 5:
        piece = 4
        monkeypatch.setattr(augmenting_paths, "_LARGE", 36)
        jax.clear_caches()
    cost = random_cost(11, (sets, 6, 6), kind)
    rng = np.random.default_rng(0)
    mask = tuple(rng.random((2, sets, 6)) < 0.7) if masked else None
    alone = [
        assign(cost[i : i + 1], mask=mask and tuple(part[i : i + 1] for part in mask))[0]
        for i in range(sets)
    ]
    np.testing.assert_array_equal(assign(cost, mask=mask), alone)
    text = jax.jit(lambda cost: assign(cost)).lower(cost).as_text()
    assert (f"tensor<{pieces}x{piece}x6" in text) == (pieces > 0)


def test_precisions():
    cost = random_cost(9, (4, 5, 5), "uniform")
    low = assign(jnp.asarray(cost, jnp.bfloat16))
    check(np.asarray(jnp.asarray(cost, jnp.bfloat16), np.float32), low)
    check(cost * np.float32(1e37), assign(cost * np.float32(1e37)))
    with jax.enable_x64():
        check(cost.astype(np.float64), assign(cost.astype(np.float64)))


@pytest.mark.parametrize("kind", ["uniform", "tied", "zero"])
def test_eager_and_jitted_calls_choose_the_same_among_equals(kind):
    for n in (5, 20):
        cost = random_cost(10, (3, n, n), kind)
        np.testing.assert_array_equal(assign(cost), jax.jit(assign)(cost))


def test_gradients_do_not_depend_on_jit_among_equals():
    prediction = jnp.tile(jax.random.normal(jax.random.key(0), (2, 5, 3)), (1, 4, 1))
    target = jnp.round(jax.random.normal(jax.random.key(1), (2, 20, 3)))
    gradient = jax.grad(lambda prediction: ms.hungarian_loss(prediction, target).sum())
    np.testing.assert_allclose(gradient(prediction), jax.jit(gradient)(prediction), rtol=1e-6)


# The whole range of float32 ----------------------------------------------------------------------


def wide_cost(seed, shape, kind):
    """Costs as no loss has them, but within float32."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], shape)
    if kind == "any bits":
        cost = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        cost = np.where(np.isfinite(cost), cost, 0).astype(np.float64)
    elif kind == "any magnitude":
        cost = 10 ** rng.uniform(-45, 38.5, shape)
    elif kind == "any magnitude and sign":
        cost = sign * 10 ** rng.uniform(-45, 38.5, shape)
    elif kind == "two magnitudes":
        cost = sign * rng.choice([1e-30, 1e30], shape) * rng.random(shape)
    elif kind == "denormal":
        cost = sign * 1e-39 * rng.random(shape)
    else:
        cost = sign * float(LARGEST) * (1 - rng.random(shape) * rng.choice([1e-3, 1]))
    return np.clip(cost, -LARGEST, LARGEST).astype(np.float32)


WIDE = (
    "any bits",
    "any magnitude",
    "any magnitude and sign",
    "two magnitudes",
    "denormal",
    "largest",
)


def check_bound(cost, assignment):
    """A matching, and no dearer than `assign` promises."""
    size, pairs = max(cost.shape[1:]), min(cost.shape[1:])
    for matrix, columns in zip(cost.astype(np.float64), np.asarray(assignment), strict=True):
        matched = np.flatnonzero(columns != UNMATCHED)
        assert len(matched) == len(set(columns[matched])) == pairs
        excess = matrix[matched, columns[matched]].sum() - scipy_cost(matrix)[0]
        assert excess <= size * 2.0**-23 * np.abs(matrix).max()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(7, 6, 6), (7, 4, 6), (7, 6, 4)]),
    st.sampled_from(WIDE),
)
def test_whole_range(seed, shape, kind):
    cost = wide_cost(seed, shape, kind)
    check_bound(cost, assign(cost))


@pytest.mark.slow
def test_three_thousand_assignments_over_the_whole_range():
    solve = jax.jit(assign)
    for shape in ((50, 6, 6), (50, 5, 12), (50, 12, 5), (50, 24, 24), (50, 40, 40)):
        for kind in WIDE:
            for seed in range(2):
                cost = wide_cost(seed, shape, kind)
                check_bound(cost, solve(cost))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sentinel", [1e30, 1e36, 8e37, 1e38, LARGEST])
def test_forbidden_pairs_cost_no_precision(method, sentinel):
    cost = np.array([[5, 1, sentinel], [1, 5, 2], [sentinel, 3, 4]], np.float32)
    np.testing.assert_array_equal(assign(cost, method=method), [1, 0, 2])
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 100, (7, 6, 6)).astype(np.float32)
    best = [scipy_cost(matrix)[0] for matrix in cost]
    row, column = np.stack([linear_sum_assignment(matrix) for matrix in cost], axis=1)
    keep = np.zeros(cost.shape, bool)
    keep[np.arange(7)[:, None], row, column] = True
    cost[(rng.random(cost.shape) < 0.5) & ~keep] = sentinel
    assert matched_cost(cost, assign(cost, method=method)).tolist() == best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-149, -140, -30, 90, 120])
def test_exact_on_multiples_of_a_power_of_two(method, power):
    whole = np.random.default_rng(power % 7).integers(-100, 101, (7, 6, 6))
    cost = np.ldexp(whole.astype(np.float64), power).astype(np.float32)
    chosen = np.asarray(assign(cost, method=method))
    for matrix, columns in zip(whole, chosen, strict=True):
        assert matrix[np.arange(6), columns].sum() == scipy_cost(matrix)[0]


def test_denormal_costs_in_sixteen_bits():
    for dtype, unit in ((jnp.float16, 2.0**-24), (jnp.bfloat16, 2.0**-133)):
        cost = jnp.asarray(np.array([[5, 1, 9], [1, 5, 2], [9, 3, 4]]) * unit, dtype)
        np.testing.assert_array_equal(assign(cost), [1, 0, 2])
        np.testing.assert_array_equal(jax.jit(assign)(cost), [1, 0, 2])


def test_whole_numbers_are_exact_or_refused():
    base = np.array([[5, 1, 9], [1, 5, 2], [9, 3, 4]])
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, bool):
        cost = base.astype(dtype) if dtype is not bool else base > 1
        check(cost.astype(np.float64)[None], assign(cost)[None])
    large = base + 2**24
    for cost in (large, large.astype(np.uint32), jnp.asarray(large), -large):
        with pytest.raises(ValueError, match=r"cost: expected whole numbers of at most 2\*\*24"):
            assign(cost)
        np.testing.assert_array_equal(assign(np.abs(cost), method="host"), [1, 0, 2])
    np.testing.assert_array_equal(jax.jit(assign)(jnp.asarray(large)), INVALID)
    # Where it takes no part, anything may stand.
    mask = np.array([True, True, False])
    cost = np.where(mask[:, None] & mask, base, 2**30)
    np.testing.assert_array_equal(assign(cost, mask=mask), [1, 0, UNMATCHED])
    with pytest.raises(ValueError, match=r"2\*\*53"):
        assign(base + 2**53, method="host")
    with jax.enable_x64():
        np.testing.assert_array_equal(assign(large), [1, 0, 2])


def test_float64_that_float32_cannot_hold_is_refused():
    cost = np.array([[1e300, 1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"finite numbers in float32, got 1e\+300"):
        assign(cost)
    np.testing.assert_array_equal(assign(cost, method="host"), [1, 0])
    with jax.enable_x64():
        np.testing.assert_array_equal(assign(cost), [1, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0), (3, 0, 2, 2)])
def test_nothing_to_match(method, shape):
    for solve in (
        (assign,) if method == "host" else (assign, jax.jit(assign, static_argnames="method"))
    ):
        result = solve(jnp.zeros(shape), method=method)
        chex.assert_shape(result, shape[:-1])
        assert (result == UNMATCHED).all()
    chex.assert_trees_all_equal(matched_cost(jnp.zeros(shape), result), jnp.zeros(shape[:-2]))


@pytest.mark.parametrize("method", ["device", "host"])
def test_masks_of_an_empty_batch(method):
    mask = (np.ones((0, 4), bool), np.ones((0, 5), bool))
    chex.assert_shape(assign(np.zeros((0, 4, 5)), mask=mask, method=method), (0, 4))
    mask = (np.ones((2, 0), bool), np.ones((2, 5), bool))
    chex.assert_shape(assign(np.zeros((2, 0, 5)), mask=mask, method=method), (2, 0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sets", [3, 9])
def test_under_shard_map_with_its_default_checks(masked, sets):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("sets",))
    cost = random_cost(12, (sets, 5, 4), "uniform")
    columns = np.arange(4) < np.resize([4, 2, 0], sets)[:, None]
    mask = (np.ones((sets, 5), bool), columns) if masked else None
    spec = jax.sharding.PartitionSpec("sets")
    solve = jax.shard_map(
        lambda cost, mask: assign(cost, mask=mask), mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    np.testing.assert_array_equal(jax.jit(solve)(cost, mask), assign(cost, mask=mask))


@pytest.mark.usefixtures("without_hook")
def test_wrong_arguments():
    cost = np.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="method: expected one of"):
        assign(cost, method="hungarian")
    with pytest.raises(ValueError, match=r"cost: expected shape \[\*batch, n, m\]"):
        assign(np.zeros(3))
    with pytest.raises(ValueError, match="cost: expected real"):
        assign(np.zeros((2, 2), complex))
    with pytest.raises(ValueError, match="mask: expected shape"):
        assign(cost, mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="mask: expected booleans"):
        assign(cost, mask=(np.ones((2, 3)), np.ones((2, 4))))
    with pytest.raises(ValueError, match="mask: expected one array or a pair"):
        assign(cost, mask=(np.ones((2, 3)),) * 3)
    with pytest.raises(ValueError, match="mask: expected None with method='optax'"):
        assign(cost, mask=(np.ones((2, 3), bool), np.ones((2, 4), bool)), method="optax")
    with pytest.raises(ValueError, match="expected concrete arrays with method='host'"):
        jax.jit(lambda cost: assign(cost, method="host"))(cost)


def test_bottleneck_works_under_shard_map():
    cost = jax.random.uniform(jax.random.key(0), (4, 3, 3))
    expected = ms.assign_bottleneck(cost, method="device")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(ms.assign_bottleneck, mesh=mesh, in_specs=spec, out_specs=spec)
    chex.assert_trees_all_equal(jax.jit(sharded)(cost), expected)
