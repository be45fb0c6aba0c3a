import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdspn_jax.descent import minimise
from msdspn_jax.energy import Context, latent_energy
from msdspn_jax.equivariance import best_matching, check_equivariance, example_sets, push_apart
from msdspn_jax.pooling import fspool, mean_pool, sum_pool
from msdspn_jax.set_encoder import SetEncoder

KEY = jax.random.key(0)
SET, EXCLUSIVE, NEITHER = (True, True), (False, True), (False, False)
WEIGHT = jax.random.normal(jax.random.key(1), (6, 2))


def ranks(x):
    return jnp.argsort(jnp.argsort(x[:, 0]))[:, None] + 0.0 * x


def gradient_of_pool(pool):
    def energy(x):
        features = x @ jnp.array([[1.0, -2.0], [0.5, 1.5]])
        return 0.5 * jnp.sum((pool(features) - 0.3) ** 2)

    return jax.grad(energy)


# What the definitions say, and not what the implementation happened to answer.
FUNCTIONS = {
    "identity": (lambda x: x, SET),
    "constant": (lambda x: jnp.ones((6, 1)), SET),
    "subtract the mean": (lambda x: x - x.mean(0), SET),
    "push_apart": (push_apart, EXCLUSIVE),
    "rank of every element": (ranks, EXCLUSIVE),
    "weights by rank": (lambda x: WEIGHT[jnp.argsort(jnp.argsort(x[:, 0]))], EXCLUSIVE),
    "gradient of FSPool": (gradient_of_pool(lambda h: fspool(h, WEIGHT)), EXCLUSIVE),
    "gradient of sum pool": (gradient_of_pool(sum_pool), SET),
    "gradient of mean pool": (gradient_of_pool(mean_pool), SET),
    # Permutation-*invariant*: the output does not follow the input's order.
    "sort in place": (lambda x: jnp.sort(x, axis=0), NEITHER),
    "add the position": (lambda x: x + jnp.arange(6.0)[:, None], NEITHER),
    "favour the first row": (lambda x: x.at[0].add(1e-3), NEITHER),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=0), NEITHER),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_verdicts(name):
    function, expected = FUNCTIONS[name]
    report = check_equivariance(function, key=KEY, name=name)
    assert (report.set_equivariant, report.multiset_equivariant) == expected, str(report)
    assert report.exclusively_multiset_equivariant == (expected == EXCLUSIVE)
    assert name in str(report)
    assert (report.set_counterexample is None) == expected[0]
    assert (report.multiset_counterexample is None) == expected[1]


def test_counterexamples_are_counterexamples():
    report = check_equivariance(lambda x: x + jnp.arange(6.0)[:, None], key=KEY)
    for example in (report.set_counterexample, report.multiset_counterexample):
        moved = example.set[example.permutation]
        chex.assert_trees_all_close(example.permuted_output, moved + np.arange(6.0)[:, None])
        gap = np.abs(example.permuted_output - example.expected).max()
        assert gap == pytest.approx(example.violation)
        assert example.violation > example.tolerance
    matching = report.multiset_counterexample.matching
    chex.assert_trees_all_equal(
        report.multiset_counterexample.set[matching],
        report.multiset_counterexample.set[report.multiset_counterexample.permutation],
    )
    assert "best P2" in str(report)


DISTINCT = jax.random.normal(jax.random.key(2), (5, 6, 2))


def test_set_equivariance_is_not_tested_without_equal_elements():
    for function in (push_apart, lambda x: x - x.mean(0)):
        report = check_equivariance(function, DISTINCT, key=KEY, name="f")
        assert report.set_equivariant is None
        assert report.multiset_equivariant is True
        assert report.exclusively_multiset_equivariant is None
        assert report.set_counterexample is None
        assert report.num_exchanging_equal == 0 < report.num_exchanging_different
        assert report.verdict == (
            "multiset-equivariant (set-equivariance not tested: no trial exchanges equal "
            "elements; give sets with equal rows)"
        )
        assert "set-equivariant: not tested; worst violation" in str(report)
        assert "multiset-equivariant: held in every trial" in str(report)
    # What is refuted is refuted on any sets.
    report = check_equivariance(lambda x: jnp.cumsum(x, 0), DISTINCT, key=KEY)
    assert (report.set_equivariant, report.multiset_equivariant) == NEITHER
    assert report.exclusively_multiset_equivariant is False


def test_the_multiset_property_is_not_tested_without_different_elements():
    report = check_equivariance(push_apart, jnp.ones((1, 6, 2)), key=KEY)
    assert (report.set_equivariant, report.multiset_equivariant) == (False, None)
    assert report.exclusively_multiset_equivariant is None
    assert report.verdict == (
        "not set-equivariant (multiset-equivariance not tested: no trial exchanges different "
        "elements; give sets with different rows)"
    )
    for sets in (jnp.ones((1, 6, 2)), DISTINCT[:, :1]):
        report = check_equivariance(lambda x: x, sets, key=KEY)
        assert (report.set_equivariant, report.multiset_equivariant) == (None, None)
        assert report.verdict.startswith("not tested: no trial exchanges different elements")
    # One set of each kind, and everything is tested.
    both = jnp.concatenate([DISTINCT[:1], jnp.ones((1, 6, 2))])
    assert check_equivariance(push_apart, both, key=KEY).exclusively_multiset_equivariant
    assert check_equivariance(lambda x: x, both, key=KEY).set_equivariant


def test_ties_of_entries_in_different_rows_break_featurewise_sorting():
    sets = example_sets(KEY, repeated_entries=True)
    by_column = jax.grad(lambda x: fspool(x, WEIGHT).sum())
    report = check_equivariance(by_column, sets, key=KEY)
    assert not report.multiset_equivariant
    assert check_equivariance(push_apart, sets, key=KEY).exclusively_multiset_equivariant


@pytest.mark.parametrize(("pool", "expected"), [("fspool", EXCLUSIVE), ("sum", SET), ("mean", SET)])
def test_decoding_is_as_equivariant_as_its_pool(pool, expected):
    encoder = SetEncoder(8, 8, 6, pool=pool)
    params = encoder.init(KEY, jnp.zeros((1, 6, 2)))
    latent = jax.random.normal(KEY, (1, 8))

    def decode(sets):
        context = Context(jnp.broadcast_to(latent, (len(sets), 8)))
        return minimise(latent_energy(encoder.apply), params, context, sets, num_steps=3)

    report = check_equivariance(decode, key=KEY, batched=True, num_permutations=4)
    assert (report.set_equivariant, report.multiset_equivariant) == expected, str(report)


def test_rows_that_are_equal_in_some_columns_may_be_exchanged():
    def forget_who_was_who(x):
        # Elements of a class (first column) are numbered by position, whatever their noise.
        same = x[:, :1] == x[:, 0]
        return jnp.sum(jnp.tril(same, -1), axis=1)[:, None] + 0.0 * x

    noise = jax.random.normal(KEY, (4, 6, 1))
    sets = jnp.concatenate(
        [jnp.tile(jnp.array([0.0, 1, 0, 1, 1, 2])[:, None], (4, 1, 1)), noise], -1
    )
    strict = check_equivariance(forget_who_was_who, sets, key=KEY)
    assert not strict.multiset_equivariant
    by_class = check_equivariance(forget_who_was_who, sets, key=KEY, equal_by=slice(1))
    assert by_class.exclusively_multiset_equivariant


def test_functions_that_jax_cannot_trace():
    def numpy_push_apart(x):
        order = np.argsort(x[:, 0], kind="stable")
        out = np.array(x)
        out[order[0]] -= 1
        out[order[-1]] += 1
        return out

    report = check_equivariance(numpy_push_apart, key=KEY)
    assert report.exclusively_multiset_equivariant
    report = check_equivariance(lambda x: np.flip(np.asarray(x), 1), key=KEY, batched=True)
    assert not report.multiset_equivariant
    with pytest.raises(jax.errors.TracerArrayConversionError):
        check_equivariance(lambda x: np.sort(x, 0), key=KEY, jit=True)


def test_stochastic_functions_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="different outputs for the same set"):
        check_equivariance(lambda x: np.asarray(x) + generator.normal(size=x.shape), key=KEY)
    with pytest.raises(ValueError, match="different outputs for the same set"):
        # Members of the batch influence each other: the first wins.
        check_equivariance(lambda x: x + jnp.arange(len(x))[:, None, None], key=KEY, batched=True)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda x: x[:-1], {}, "function: expected .* one row for every row"),
        (lambda x: x.sum(), {}, "function: expected .* one row for every row"),
        (lambda x: jnp.log(x), {}, "not finite"),
        (lambda x: x, {"sets": jnp.ones((3, 2))}, "sets: expected shape"),
        (lambda x: x, {"num_permutations": 0}, "num_permutations: expected"),
        (lambda x: x, {"sets": jnp.ones((0, 4, 2))}, "sets: expected shape"),
    ],
)
def test_bad_input(function, options, message):
    with pytest.raises(ValueError, match=message):
        check_equivariance(function, key=KEY, **options)


def test_push_apart_worked_example():
    for x, y in (([1, 2], [0, 3]), ([2, 1], [3, 0]), ([1, 1], [0, 2])):
        out = push_apart(jnp.array(x, jnp.float32)[:, None])
        chex.assert_trees_all_close(out[:, 0], jnp.array(y, jnp.float32))
    chex.assert_trees_all_equal(push_apart(jnp.ones((1, 3))), jnp.ones((1, 3)))


@pytest.mark.usefixtures("without_hook")
def test_push_apart_wants_a_set():
    with pytest.raises(ValueError, match="sets"):
        push_apart(jnp.ones(3))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 3))
def test_best_matching_is_the_best_of_all(seed, n, num_values):
    import itertools

    generator = np.random.default_rng(seed)
    x = generator.integers(0, num_values, (n, 1)).astype(float)
    permutation = generator.permutation(n)
    output, permuted = generator.normal(size=(2, n, 2))
    found = best_matching(x, permutation, output, permuted)
    chex.assert_trees_all_equal(x[found], x[permutation])
    assert sorted(found) == list(range(n))

    def worst(order):
        return np.abs(permuted - output[list(order)]).max()

    allowed = [p for p in itertools.permutations(range(n)) if (x[list(p)] == x[permutation]).all()]
    assert worst(found) == pytest.approx(min(map(worst, allowed)))


@pytest.mark.usefixtures("without_hook")
def test_example_sets_need_room():
    for name in ("num_sets", "n", "d"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= "):
            example_sets(KEY, **{name: 0})


def test_a_function_that_is_zero_without_tolerance():
    assert check_equivariance(lambda x: 0 * x, key=KEY, atol=0.0).multiset_equivariant
