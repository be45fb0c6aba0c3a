"""That each trick of `msdspn_jax.ranks` still does what it is there for, read off compiled text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import msdspn_jax as ms
from msdspn_jax import _cores, projections, ranks

N = 32
FEATURES = jax.ShapeDtypeStruct((4, N, 8), jnp.float32)
WEIGHT = jax.ShapeDtypeStruct((N, 8), jnp.float32)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def computations(text):
    """Names and bodies of the computations (fused kernels among them) of an HLO module."""
    return re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)


def count(operation, text):
    return len(re.findall(rf" {operation}\(", text))


def kernels_with_both(text, one, other):
    """Computations that hold `one` and several `other`."""
    return [
        name for name, body in computations(text) if count(one, body) and count(other, body) > 3
    ]


def pooled(features, weight):
    return ms.fspool(features, weight)


# --- the path is chosen when a program is lowered ---


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("function", [pooled, lambda features, weight: ms.simplex(features)])
def test_an_exported_program_carries_the_path_of_its_platform(platform, function):
    exported = jax.export.export(jax.jit(function), platforms=[platform])(FEATURES, WEIGHT)
    module = exported.mlir_module()
    # The CPU's fence; no other platform has use for it.
    assert ("optimization_barrier" in module) == (platform == "cpu")


def test_ranks_elsewhere_equal_those_on_cpu():
    features = np.random.default_rng(0).integers(-2, 3, (3, N, 5)).astype(np.float32)
    expected = np.argsort(np.argsort(features, 1, kind="stable"), 1, kind="stable")
    for function in (ranks._ranks_by_comparison, ranks._ranks_by_keys, ranks._ranks_by_sorting):
        np.testing.assert_array_equal(jax.jit(function)(features), expected)


LIMITS = dict.fromkeys(["float32", "float64", "bfloat16"], (-np.inf, np.inf))
LIMITS["float16"] = (-6e4, 6e4)
ODD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 1e38]


@pytest.mark.parametrize("n", [1, 2, 300, 1024])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_ranks_of_large_sets_equal_a_stable_argsort(n, dtype):
    random = np.random.default_rng(n)
    values = np.concatenate([random.normal(size=50), ODD])
    with jax.enable_x64(dtype == "float64"):
        # Many ties, and every kind of number.
        features = jnp.asarray(random.choice(values, (2, n, 3)).clip(*LIMITS[dtype]), dtype)
        found = jax.jit(ranks._ranks_by_packed_sort)(features)
        plain = np.asarray(features, "float64")
    if dtype != "float64":
        # To XLA on a CPU, numbers below the normal ones are zero.
        plain = np.where(np.abs(plain) < np.finfo("float32").tiny, 0, plain)
    expected = np.argsort(np.argsort(plain, 1, kind="stable"), 1, kind="stable")
    np.testing.assert_array_equal(found, expected)


def test_large_sets_under_transformations():
    features = jax.random.normal(jax.random.key(0), (3, 2, 300, 2))
    expected = np.argsort(np.argsort(features, 2), 2)
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    sharded = jax.shard_map(ms.stable_ranks, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    for function in (ms.stable_ranks, jax.vmap(ms.stable_ranks), jax.jit(sharded)):
        found = function(features)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_gradient_of_a_large_set_is_the_weight_of_the_rank():
    features = jax.random.normal(jax.random.key(0), (2, 300, 2))
    weight = jnp.arange(600.0).reshape(300, 2)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(pooled(x, weight))))(features)
    order = np.argsort(np.argsort(features, 1), 1)
    np.testing.assert_array_equal(gradient, np.take_along_axis(np.asarray(weight)[None], order, 1))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_large_set_is_sorted_as_single_integers(cores, monkeypatch):
    monkeypatch.setattr(_cores, "num_cores", lambda: cores)
    features = jax.ShapeDtypeStruct((2, 300, 4), jnp.float32)
    # A function of its own each time: `jax.jit` would answer with the program of other cores.
    text = compiled(lambda x: ranks._ranks_by_packed_sort(x), features)
    assert re.search(rf"s64\[{8 // cores},300\]\S* sort\(", text)
    assert count("sort", text) == cores


def test_simplex_elsewhere_equals_that_on_cpu():
    rows = jax.random.normal(jax.random.key(0), (50, 7))
    for ours, other in zip(
        jax.jit(projections._threshold_on_cpu)(rows),
        jax.jit(projections._threshold)(rows),
        strict=True,
    ):
        np.testing.assert_allclose(ours, other, atol=1e-6)


# --- the tricks of the CPU ---


def test_fence_keeps_the_comparisons_out_of_the_gather(monkeypatch):
    assert not kernels_with_both(compiled(pooled, FEATURES, WEIGHT), "gather", "compare")
    monkeypatch.setattr(ranks, "computed_once", lambda values, impossible: values)

    def without_fence(features, weight):
        chosen = ranks.select_by_rank(weight, ranks._ranks_by_keys(features))
        return jnp.sum(features * chosen, -2)

    assert kernels_with_both(compiled(without_fence, FEATURES, WEIGHT), "gather", "compare")


def test_keys_take_one_comparison_for_a_pair():
    keys = count("compare", compiled(ranks._ranks_by_keys, FEATURES))
    floats = count("compare", compiled(ranks._ranks_by_comparison, FEATURES))
    # One of them, in either, tells which of the two comes first in the set.
    assert keys < 2.2 * N < 2.8 * N < floats


def test_rows_are_padded_in_memory():
    """The padded keys are an array of their own, which the comparisons read."""
    text = compiled(ranks._ranks_by_keys, FEATURES)
    padded = f"s32[4,{N},{8 + 16}]"
    assert any(
        padded in line and ("fusion(" in line or " pad(" in line) for line in text.splitlines()
    )
    assert not kernels_with_both(text, "pad", "compare")


def test_gather_has_no_arithmetic_for_negative_indices():
    places = jax.ShapeDtypeStruct((4, N, 8), jnp.int32)
    ours = compiled(ranks.select_by_rank, WEIGHT, places)
    plain = compiled(lambda w, r: w.ravel()[r * 8 + jnp.arange(8)], WEIGHT, places)
    assert count("select", ours) == 0 < count("select", plain)


def test_sums_of_the_simplex_are_elementwise():
    rows = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    # What is left is the question whether any row's support still shrinks.
    assert count("reduce", compiled(projections._threshold_on_cpu, rows)) <= 2
    assert count("reduce", compiled(projections._threshold, rows)) > 2


def test_computed_once_changes_nothing():
    values = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(ranks.computed_once(values, lambda v: v > jnp.inf), values)
    empty = jnp.zeros((0, 3))
    assert ranks.computed_once(empty, lambda v: v > jnp.inf).shape == (0, 3)


@pytest.mark.parametrize("shape", [(0, 20, 2), (3, 0, 2), (3, 20, 0)])
def test_nothing_to_rank(shape):
    assert ms.stable_ranks(jnp.zeros(shape)).shape == shape


def test_nothing_to_project():
    assert ms.simplex(jnp.zeros((0, 3))).shape == (0, 3)


def test_nan_ranks_stay_in_range():
    features = jnp.array([jnp.nan, 1.0, -jnp.nan, 0.0] * 8)[:, None]
    for method in ranks.RANK_METHODS:
        found = ms.stable_ranks(features, method=method)
        assert bool(((found >= 0) & (found < N)).all())


def test_select_by_rank_is_linear_in_the_weight():
    places = ms.stable_ranks(jax.random.normal(jax.random.key(0), (N, 8)))
    transposed = jax.linear_transpose(lambda w: ranks.select_by_rank(w, places), WEIGHT)
    (cotangent,) = transposed(jnp.ones((N, 8)))
    np.testing.assert_array_equal(cotangent, jnp.ones((N, 8)))
    assert lax.stop_gradient(places).dtype == jnp.int32
