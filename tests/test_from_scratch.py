"""The page of plain JAX computes what the package computes."""

import importlib.util
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import msdspn_jax as ms

FILE = Path(__file__).parents[1] / "experiments" / "from_scratch.py"
N, D, WIDTH = 4, 2, 8


@pytest.fixture(scope="module")
def scratch():
    spec = importlib.util.spec_from_file_location("from_scratch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_flax(parameters):
    return {
        "params": {
            "hidden": {"kernel": parameters["W1"], "bias": parameters["b1"]},
            "output": {"kernel": parameters["W2"], "bias": parameters["b2"]},
            "pool_weight": parameters["w"],
        }
    }


def test_decoder_and_its_gradient_equal_the_packages(scratch):
    θ = scratch.init(jax.random.key(0), N, D, WIDTH)["decoder"]
    z = jax.random.normal(jax.random.key(1), (3, WIDTH))
    v = jax.random.normal(jax.random.key(2), (3, N, D))
    energy = ms.latent_energy(ms.SetEncoder(WIDTH, WIDTH, N).apply, proximity=0.1)

    def by_hand(z, θ):
        sets = jax.vmap(scratch.decode, (0, None))(z, θ)
        return jnp.sum(sets * v), sets

    def by_package(z, θ):
        start = jnp.broadcast_to(θ["Y0"], (3, N, D))
        sets = ms.minimise(energy, as_flax(θ), ms.Context(z, start), start, num_steps=10).sets
        return jnp.sum(sets * v), sets

    grad = lambda function: jax.jit(jax.grad(function, argnums=(0, 1), has_aux=True))(z, θ)  # noqa: E731
    chex.assert_trees_all_close(grad(by_hand), grad(by_package), atol=1e-5)


def test_it_is_short_and_it_learns(scratch):
    losses = scratch.train(steps=60, width=64, batch=32)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    method = FILE.read_text().split("def loss")[0]
    code = [line for line in method.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) < 70
