"""Everything composes: every option of `minimise` under every transformation, in both modes.

``python tests/test_composition.py`` prints the table that the documentation shows.
"""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from processes import environment

import msdspn_jax as ms

BATCH, N, D = 4, 3, 2

OPTIONS = {
    "identity": {"adjoint": ms.identity()},
    "neumann": {"adjoint": ms.neumann(3)},
    "conjugate gradient": {"adjoint": ms.conjugate_gradient(6)},
    "exact": {"adjoint": ms.exact()},
    "exact by cg": {"adjoint": ms.exact(method="cg")},
    "unrolled": {"adjoint": ms.unrolled()},
    "unrolled, remat": {"adjoint": ms.unrolled(rematerialise=True)},
    "tolerance": {"tolerance": 1e-2},
    "tolerance, unrolled": {"tolerance": 1e-2, "adjoint": ms.unrolled()},
    "clipping": {"max_grad_norm": 0.5},
    "simplex": {"projection": ms.simplex},
    "simplex, exact": {"projection": ms.simplex, "adjoint": ms.exact()},
    "anderson": {"optimizer": ms.anderson()},
    "adam": {"optimizer": optax.adam(0.1)},
    "trajectory": {"return_trajectory": True},
}


def energy(params, sets, context):
    """Smooth and contractive; sets see parameters and context."""
    encoding = jnp.mean(jnp.tanh(sets @ params["kernel"]), 1)
    distance = jnp.sum((encoding - context) ** 2, -1)
    return 0.5 * distance + 0.3 * jnp.sum((sets - 0.2) ** 2, (1, 2))


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"kernel": jax.random.normal(keys[0], (D, 5), dtype)}
    # The start is a constant, as a learned initial set is: the same for every set.
    return params, 0.5 * jax.random.normal(keys[1], (BATCH, 5), dtype)


def value(options, params, context):
    start = jnp.broadcast_to(jnp.linspace(-0.3, 0.5, N * D, dtype=context.dtype).reshape(N, D),
                             (context.shape[0], N, D))  # fmt: skip
    settings = {"optimizer": ms.nesterov(0.5, 0.5)} | options
    minimum = ms.minimise(energy, params, context, start, num_steps=8, **settings)
    return jnp.sum(jnp.sin(minimum.sets), (1, 2))


def reverse(options, params, context):
    """Value of every set, gradient for the parameters summed over the batch, and the context's."""

    def total(params, context):
        values = value(options, params, context)
        return jnp.sum(values), values

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, context)
    return values, *gradients


def forward(options, params, context):
    tangents = jax.tree.map(jnp.ones_like, (params, context))
    return jax.jvp(functools.partial(value, options), (params, context), tangents)


def both(name, params, context):
    """Value and derivatives in reverse mode, value and derivative in forward mode."""
    options = OPTIONS[name]
    return reverse(options, params, context), forward(options, params, context)


@functools.cache
def expected(name):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem())
        result = jax.jit(functools.partial(both, name))(*wide)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), result)


def close(name, result, tolerance=2e-3):
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected(name)), strict=True)
    for actual, desired in pairs:
        difference = np.linalg.norm(np.asarray(actual, np.float64) - desired)
        assert difference <= tolerance * np.linalg.norm(desired), (name, actual, desired)


# --- the transformations: name of the options -> None, or an assertion that fails ---


def in_jit(name):
    close(name, jax.jit(functools.partial(both, name))(*problem()))


def in_eager(name):
    close(name, both(name, *problem()))


def in_vmap(name):
    """Over the parameters of several energies."""
    params, context = problem()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params)
    mapped = jax.jit(jax.vmap(functools.partial(both, name), (0, None)))(stacked, context)
    close(name, jax.tree.map(lambda x: x[0], mapped))


def in_scan(name):
    params, context = problem()

    def body(carry, context):
        return carry, both(name, carry, context)

    _, results = jax.jit(lambda p, c: jax.lax.scan(body, p, c))(params, jnp.stack([context] * 2))
    close(name, jax.tree.map(lambda x: x[1], results))


def in_remat(name):
    """The minimum inside of `jax.checkpoint`."""
    value_of = jax.checkpoint(functools.partial(value, OPTIONS[name]))

    def total(params, context):
        values = value_of(params, context)
        return jnp.sum(values), values

    def run(params, context):
        gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, context)
        tangents = jax.tree.map(jnp.ones_like, (params, context))
        return (values, *gradients), jax.jvp(value_of, (params, context), tangents)

    close(name, jax.jit(run)(*problem()))


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def with_donation(name):
    close(name, jax.jit(functools.partial(both, name), donate_argnums=1)(*problem()))


def in_float64(name):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem())
        result = jax.jit(functools.partial(both, name))(*arguments)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(result))
        close(name, result, 1e-5)


def in_16_bits(dtype, name):
    arguments = jax.tree.map(lambda x: x.astype(dtype), problem())
    result = jax.jit(functools.partial(both, name))(*arguments)
    assert all(x.dtype == dtype for x in jax.tree.leaves(result))
    # bfloat16 has eight bits of mantissa: the shape of the answer, not its digits.
    close(name, result, 0.2 if dtype == jnp.bfloat16 else 0.05)


def in_shard_map(devices, name):
    """The batch over a mesh, parameters replicated, with shard_map's default checks."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    out = (P("data"), P(), P("data")), (P("data"), P("data"))
    mapped = jax.shard_map(
        functools.partial(both, name), mesh=mesh, in_specs=(P(), P("data")), out_specs=out
    )
    close(name, jax.jit(mapped)(*problem()))


HERE = {
    "jit": in_jit,
    "eager": in_eager,
    "vmap": in_vmap,
    "scan": in_scan,
    "remat": in_remat,
    "donate": with_donation,
    "float64": in_float64,
    "bfloat16": functools.partial(in_16_bits, jnp.bfloat16),
    "float16": functools.partial(in_16_bits, jnp.float16),
}
DEVICES = {f"shard_map, {k} devices": functools.partial(in_shard_map, k) for k in (2, 4)}
FAST = ("float64",)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "transformation", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in HERE]
)
def test_composes(transformation, name):
    HERE[transformation](name)


def outcomes(transformations, names=OPTIONS):
    """(option, transformation) -> "yes", or the error."""
    found = {}
    for name in names:
        for transformation, check in transformations.items():
            try:
                check(name)
                found[f"{name} | {transformation}"] = "yes"
            except Exception as error:
                found[f"{name} | {transformation}"] = f"{type(error).__name__}: {error}"[:500]
    return found


def on_four_devices(*arguments):
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment("--xla_force_host_platform_device_count=4"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "name",
    [n if n in ("tolerance",) else pytest.param(n, marks=pytest.mark.slow)
     for n in OPTIONS],
)  # fmt: skip
def test_composes_with_shard_map(name):
    assert {k: v for k, v in on_four_devices(name).items() if v != "yes"} == {}


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(outcomes(DEVICES, sys.argv[1:])))
    else:
        on_devices = on_four_devices(*OPTIONS)
        columns = [*HERE, *DEVICES]
        print("| option | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for name in OPTIONS:  # A row as soon as it is known: all take minutes.
            found = outcomes(HERE, [name]) | on_devices
            row = " | ".join(found[f"{name} | {t}"] for t in columns)
            print(f"| {name} | {row} |", flush=True)
