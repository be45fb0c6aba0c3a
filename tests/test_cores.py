"""Sorts and convolutions use all cores of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import msdspn_jax as ms
from msdspn_jax import _cores


@pytest.mark.parametrize("cores", [1, 2, 3, 40])
def test_pieces_together_are_the_whole(monkeypatch, cores):
    monkeypatch.setattr(_cores, "num_cores", lambda: cores)
    rows = jax.random.normal(jax.random.key(0), (7, 5))
    text = str(jax.make_jaxpr(lambda x: _cores.split_over_cores(lax.sort, x))(rows))
    assert text.count("sort[") == min(cores, 7)
    np.testing.assert_array_equal(_cores.split_over_cores(jnp.sort, rows), jnp.sort(rows))


@pytest.mark.parametrize("cores", [1, 3])
def test_ranks_are_the_same_on_any_number_of_cores(monkeypatch, cores):
    monkeypatch.setattr(_cores, "num_cores", lambda: cores)
    features = jnp.round(jax.random.normal(jax.random.key(0), (2, 300, 3)), 1)  # Many ties.
    expected = np.argsort(np.argsort(features, axis=1, kind="stable"), axis=1)
    np.testing.assert_array_equal(ms.stable_ranks(features, method="sort"), expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option of XLA's CPU backend")
def test_convolutions_are_kept_from_the_library_of_one_core():
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fused(options):
        program = jax.jit(convolve, compiler_options=options).lower(images, kernel).compile()
        return "ynn" in program.as_text()

    images, kernel = jnp.ones((4, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    options = _cores.compiler_options()
    assert options is not None, "this version of XLA has lost the option"
    assert not fused(options)
    if not fused(None):
        pytest.skip("this version of XLA does not hand convolutions to YNNPACK")


def test_an_unknown_option_is_not_passed_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")

    monkeypatch.setattr(jax, "jit", refuse)
    assert _cores.compiler_options.__wrapped__() is None
