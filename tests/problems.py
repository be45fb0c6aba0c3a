"""Small energies on which every way to minimise and to differentiate is tried."""

import jax
import jax.numpy as jnp

import msdspn_jax as ms


def quadratic(curvature):
    """E = ½ Σ_i λ_i (Y − z θ)²_i: a minimum at z θ, and any spectrum λ [n, d] of the Hessian."""

    def energy(params, sets, context):
        return 0.5 * jnp.sum(curvature * (sets - context.latent * params["scale"]) ** 2, (1, 2))

    return energy


def smooth_encoder(params, sets):
    """A smooth, permutation-invariant encoder, so that finite differences are clean."""
    return jnp.mean(jnp.tanh(sets @ params["kernel"] + params["bias"]), 1)


def smooth_problem(key, *, batch=2, n=3, d=2, latent=8, proximity=1.0):
    """(energy, params, context, start) of a contractive smooth energy."""
    keys = jax.random.split(key, 4)
    params = {
        "kernel": jax.random.normal(keys[0], (d, latent)),
        "bias": jax.random.normal(keys[1], (latent,)),
    }
    start = 0.3 * jax.random.normal(keys[2], (batch, n, d))
    context = ms.Context(0.5 * jax.random.normal(keys[3], (batch, latent)), start)

    def energy(params, sets, context):
        # Sums in place of means: curvatures of order one, so that T contracts by a visible amount.
        value = ms.latent_energy(smooth_encoder)(params, sets, context._replace(initial_sets=None))
        distance = jnp.sum((sets - context.initial_sets) ** 2, (1, 2))
        return 2 * value + proximity * 0.4 * distance

    return energy, params, context, start


def fspool_problem(key, *, batch=3, n=5, d=3, hidden=16, latent=12, proximity=0.1, pool="fspool"):
    """(energy, params, context, start) of the paper's energy."""
    keys = jax.random.split(key, 3)
    encoder = ms.SetEncoder(hidden, latent, n, pool=pool)
    start = 0.1 * jax.random.normal(keys[0], (batch, n, d))
    params = encoder.init(keys[1], start)
    context = ms.Context(jax.random.normal(keys[2], (batch, latent)), start)
    return ms.latent_energy(encoder.apply, proximity=proximity), params, context, start
