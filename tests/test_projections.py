import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import msdspn_jax as ms

jitted_simplex = jax.jit(ms.simplex)


def reference(points):
    """Duchi et al. (2008), by sorting, in float64."""
    u = -np.sort(-points, axis=-1)
    sums = np.cumsum(u, -1) - 1
    k = np.arange(1, points.shape[-1] + 1)
    rho = np.sum(u - sums / k > 0, -1, keepdims=True)
    tau = np.take_along_axis(sums, rho - 1, -1) / rho
    return np.maximum(points - tau, 0)


@given(hnp.arrays(np.float64, (4, 7), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=100, deadline=None)
def test_equals_the_sorting_algorithm(points):
    with jax.enable_x64(True):
        projected = jitted_simplex(points)
    np.testing.assert_allclose(projected, reference(points), atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 64, 1000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_lands_on_the_simplex(d, scale):
    points = scale * jax.random.normal(jax.random.key(d), (5, 3, d))
    projected = jax.jit(ms.simplex)(points)
    assert float(projected.min()) >= 0
    np.testing.assert_allclose(projected.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(ms.simplex(projected), projected, atol=1e-6)


def test_slowest_case_of_the_threshold_iteration():
    # Geometric entries drop out of the support one per round.
    points = 2.0 ** -np.arange(40)[None] * 0.99
    with jax.enable_x64(True):
        np.testing.assert_allclose(ms.simplex(points), reference(points), atol=1e-12)


def test_gradients():
    points = jax.random.normal(jax.random.key(0), (3, 5))
    with jax.enable_x64(True):
        points = jnp.asarray(points, jnp.float64)
        check_grads(ms.simplex, (points,), order=2, modes=("fwd", "rev"))


def test_vmap_and_nan():
    points = jax.random.normal(jax.random.key(1), (3, 4, 5))
    chex.assert_trees_all_close(jax.vmap(ms.simplex)(points), ms.simplex(points))
    broken = ms.simplex(points.at[0, 0, 0].set(jnp.nan))
    assert bool(jnp.isnan(broken[0, 0]).all())
    chex.assert_trees_all_close(broken[1:], ms.simplex(points)[1:])


@pytest.mark.usefixtures("without_hook")
def test_errors():
    with pytest.raises(ValueError, match="points: expected a last axis of length > 0"):
        ms.simplex(jnp.zeros((3, 0)))


@pytest.mark.parametrize("d", [99, 100, 128, 129])
def test_simplex_outside_of_jit_at_every_width(d):
    points = jax.random.normal(jax.random.key(0), (4, d))
    np.testing.assert_allclose(ms.simplex(points), jax.jit(ms.simplex)(points), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_16_bits_are_those_of_32(dtype):
    eps = float(jnp.finfo(dtype).eps)
    rows = np.random.default_rng(0).uniform(0, 0.01, (4, 300))
    for points in (jnp.full(64, -0.9, dtype).at[0].set(0), jnp.asarray(rows, dtype)):
        found = ms.simplex(points)
        assert found.dtype == dtype
        expected = reference(np.asarray(points, np.float64))
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=eps, atol=1e-6)
        seen = jax.jacobian(lambda x: ms.simplex(x).astype(jnp.float32))(points) != 0
        if points.ndim == 1:
            assert np.asarray(seen).all()
