"""Ours, and the same layer in plain JAX (`jnp.sort`, unrolled), with jaxopt and with Optimistix.

These two have an encoder with `jnp.sort` as well, or, as "jaxopt-fspool" and "optimistix-fspool",
our pooling. "ours-cg" is ours with as many conjugate gradients on the way back as jaxopt takes,
"ours-bfloat16" with products of bfloat16.

Run by compare.py; the protocol is that of peer_torch.py.
"""

import functools
import importlib.metadata
import json
import sys
import time

import jax
import jax.numpy as jnp
import optax

import msdspn_jax as ms
from msdspn_jax._cores import compiler_options
from msdspn_jax._memory import keep_freed_memory
from msdspn_jax.bench import layer as benchmarks
from msdspn_jax.bench.encoder import EncoderCase, build_encoder

CG_STEPS = 10


def sorting(features, weight):
    """FSPool as one would write it."""
    return jnp.sum(jnp.sort(features, axis=1) * weight, axis=1)


def plain(case, solver, pool):
    """The layer without this library, but for the pooling perhaps, on the same parameters."""
    project = optax.projections.projection_simplex
    project = jax.vmap(jax.vmap(project)) if case.classes else lambda sets: sets

    def encode(params, sets):
        hidden = jax.nn.relu(sets @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        features = hidden @ params["output"]["kernel"] + params["output"]["bias"]
        return pool(features, params["pool_weight"])

    def energy(sets, args):
        params, latent, start, inputs = args
        joined = jnp.concatenate([sets, inputs], -1) if case.classes else sets
        value = 0.5 * jnp.sum(jnp.mean((encode(params, joined) - latent) ** 2, -1))
        if not case.classes:
            value = value + 0.05 * jnp.sum(jnp.mean((sets - start) ** 2, (1, 2)))
        return value

    def forward(variables, inputs, keys):
        params = variables["params"]
        latent = encode(params["encoder"], inputs)
        shape = (case.batch, case.n, case.d)
        if case.classes:
            draw = functools.partial(jax.random.normal, shape=shape[1:])
            start = project(0.1 * jax.vmap(lambda key: draw(key))(keys))
        else:
            start = jnp.broadcast_to(params["decoder"]["initial_set"], shape)
        args = (params["decoder"]["energy_encoder"], latent, start, inputs)
        if solver == "jaxopt":
            import jaxopt

            options = {
                "stepsize": 1.0,
                "maxiter": case.num_steps,
                "tol": 0.0,
                "acceleration": False,
                "implicit_diff": True,
                "implicit_diff_solve": functools.partial(
                    jaxopt.linear_solve.solve_cg, maxiter=CG_STEPS
                ),
            }
            return jaxopt.GradientDescent(energy, **options).run(start, args).params

        if solver == "optimistix":
            import lineax
            import optimistix

            # No tolerance is ever met, so that all steps are taken, as elsewhere.
            return optimistix.fixed_point(
                lambda sets, args: project(sets - jax.grad(energy)(sets, args)),
                optimistix.FixedPointIteration(rtol=0.0, atol=0.0),
                start,
                args,
                max_steps=case.num_steps,
                adjoint=optimistix.ImplicitAdjoint(lineax.GMRES(rtol=1e-2, atol=1e-2)),
                throw=False,
            ).value

        def step(carry, _):
            sets, trace = carry
            grads = jax.grad(energy)(sets, args)
            if case.max_grad_norm:
                norm = jnp.sqrt(jnp.sum(grads**2, (1, 2), keepdims=True))
                grads = grads * jnp.minimum(1, case.max_grad_norm / (norm + 1e-6))
            trace = case.momentum * trace + grads
            return (project(sets - grads - case.momentum * trace), trace), None

        end, _ = jax.lax.scan(step, (start, jnp.zeros(shape)), None, length=case.num_steps)
        return end[0]

    return forward


def pool(n, sort):
    """FSPool alone, [16, n, 64]; the gradient is with respect to features and weight."""
    shapes = ((16, n, 64), (n, 64), (16, 64))
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

    def value(features, weight, cotangent):
        return jnp.sum((sorting if sort else ms.fspool)(features, weight) * cotangent)

    gradient = jax.value_and_grad(value, argnums=(0, 1))
    return {"forward": (jax.jit(value), arrays), "step": (jax.jit(gradient), arrays)}


def decode(case, peer):
    """The set decoder of a case, ours or by another library."""
    adjoint = ms.conjugate_gradient(CG_STEPS) if peer == "ours-cg" else None
    products = "bfloat16" if peer == "ours-bfloat16" else "float32"
    layer = benchmarks.build_layer(case, adjoint=adjoint, products=products)
    forward, training_step = layer.forward, layer.training_step
    if not peer.startswith("ours"):
        solver = peer.removesuffix("-fspool")
        forward = plain(case, solver, sorting if solver == peer else ms.fspool)

        def training_step(params, inputs, keys, cotangent):
            return jax.grad(lambda p: jnp.sum(forward(p, inputs, keys) * cotangent))(params)

    return compiled(benchmarks.Layer(forward, training_step, layer.arguments))


def compiled(layer):
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    return {
        "forward": (jit(layer.forward), layer.arguments[:-1]),
        "step": (jit(layer.training_step), layer.arguments),
    }


def main():
    keep_freed_memory()  # As the command line does.
    peer, settings = sys.argv[1], json.loads(sys.argv[2])
    if "pool" in settings:
        runs = pool(settings["pool"], sort=peer != "ours")
    elif "size" in settings:
        runs = compiled(build_encoder(EncoderCase(**settings)))
    else:
        runs = decode(benchmarks.LayerCase(**settings), peer)
    # What the processor can do in this minute: 2 · 4096 · 512² operations.
    wide = jnp.ones((4096, 512))
    runs["product"] = (jax.jit(jnp.matmul), (wide, wide[:512]))
    library = peer.split("-")[0]
    library = library if library in ("jaxopt", "optimistix") else "jax"
    print(json.dumps({"ready": peer, "version": importlib.metadata.version(library)}), flush=True)
    for line in sys.stdin:
        function, arguments = runs[line.strip()]
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(function(*arguments))
        print(
            json.dumps([time.perf_counter() - wall, time.process_time() - cpu]),
            flush=True,
        )


main()
