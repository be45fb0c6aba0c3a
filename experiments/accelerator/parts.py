"""The measurements of the day, one function a part: ``python parts.py NAME [--rehearse]``.

Prints one JSON object as its last line. `day.py` runs every part in a process of its own, with a
time limit, and keeps what it printed. ``--rehearse`` is the same code at tiny sizes.

Needs what msdspn_jax needs; no PyTorch (that is torch_part, in ../benchmarks/peer_torch.py), no
matplotlib.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import golden_files  # noqa: E402 (beside the tests)

import msdspn_jax as ms  # noqa: E402
from msdspn_jax import matching, ranks, tasks  # noqa: E402
from msdspn_jax.bench import layer  # noqa: E402
from msdspn_jax.training.parallel import StepRunner  # noqa: E402

REHEARSE = "--rehearse" in sys.argv
REPEAT = 2 if REHEARSE else 20
LAYERS = {"tiny": "tiny"} if REHEARSE else {k: k for k in layer.LAYER_CASES if k != "tiny"}
SIZES = (4,) if REHEARSE else (10, 32, 64, 256)
# "highest" is float32 throughout; "tensorfloat32" is what an NVIDIA GPU takes float32 for.
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
ADJOINTS = {
    "identity": ms.identity(),
    "neumann:3": ms.neumann(3),
    "unrolled": ms.unrolled(),
    "unrolled:remat": ms.unrolled(rematerialise=True),
}

PARTS: dict[str, Any] = {}


def part(*names: str):
    """Register a function that takes the part's name."""

    def register(function):
        PARTS.update({name: functools.partial(function, name) for name in names})
        return function

    return register


def seconds(function, *arguments) -> float:
    """Median of some runs of a function, compiled beforehand."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = layer.time_in_turn({"it": lambda: compiled(*arguments)}, REPEAT)["it"]
    return statistics.median(times)


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference of two trees, over that of the second."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return (difference / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


# --- is it right? ---


@part("device")
def device(name: str) -> dict:
    """What it ran on, and the two ceilings: matrix products and copies."""
    n = 256 if REHEARSE else 8192
    # Not zeros: they can run faster than numbers do.
    left, right = jax.random.normal(jax.random.key(0), (2, n, n))
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            rate = 2 * n**3 / seconds(jnp.matmul, left, right)
        found[f"matmul_{precision}_tflops"] = rate / 1e12
    half = [x.astype(jnp.bfloat16) for x in (left, right)]
    found["matmul_bfloat16_inputs_tflops"] = 2 * n**3 / seconds(jnp.matmul, *half) / 1e12
    long = jax.random.normal(jax.random.key(1), (2**20 if REHEARSE else 2**29,))
    found["copy_gb_per_second"] = 2 * long.nbytes / seconds(lambda x: x + 1, long) / 1e9
    stats = jax.devices()[0].memory_stats() or {}
    found["memory_bytes"] = stats.get("bytes_limit")
    return found | {
        "devices": jax.device_count(),
        "versions": {p.__name__: p.__version__ for p in (jax, np, optax, ms)},
    }


def golden_outputs(name: str, *, wide: bool):
    """Sets and gradients of a golden file here, and those of the authors' code."""
    arrays = golden_files.load(name)
    dtype = jnp.float64 if wide else jnp.float32
    model, relational = golden_files.build(golden_files.config(arrays))
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    params, expected = (
        golden_files.variables(golden_files.nested(arrays, f"{k}/"), relational)
        for k in ("param", "grad")
    )
    start = {"initial_sets": arrays["initial_set"]} if "initial_set" in arrays else {}
    inputs, cotangent, start = cast((arrays["input_set"], arrays["cotangent"], start))

    def objective(params):
        sets = model.apply(params, inputs, **start).sets
        return jnp.sum(sets * cotangent), sets

    gradients, sets = jax.jit(jax.grad(objective, has_aux=True))(cast(params))
    return (sets, gradients), (arrays["output_set"], expected)


MODEL_FILES = sorted(p.name for p in golden_files.FOLDER.glob("*dspn_*.npz"))
if REHEARSE:
    MODEL_FILES = ["idspn_random_sets.npz"]
# What the tests hold float64 to; in float32 the inner steps multiply the rounding.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}


@part("golden")
def golden(name: str) -> dict:
    """The authors' numbers on this device, without tf32: float64 and float32."""
    found: dict[str, Any] = {"tolerances": TOLERANCES}
    for dtype, wide in (("float64", True), ("float32", False)):
        with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
            for file in MODEL_FILES:
                here, theirs = golden_outputs(file, wide=wide)
                found[f"{dtype}/{file}"] = [
                    relative(a, b) for a, b in zip(here, theirs, strict=True)
                ]
    for dtype, tolerance in TOLERANCES.items():
        worst = [max(v) for k, v in found.items() if k.startswith(f"{dtype}/")]
        found[f"{dtype}_within"] = sum(x <= tolerance for x in worst)
        found[f"{dtype}_files"] = len(worst)
    return found


@part("precision")
def precision(name: str) -> dict:
    """How far tf32 and bfloat16 products move outputs and gradients from float64's."""
    found = {}
    for file in MODEL_FILES:
        for kind in PRECISIONS[:1] if REHEARSE else PRECISIONS:
            with jax.default_matmul_precision(kind):
                here, theirs = golden_outputs(file, wide=False)
            found[f"{file}/{kind}"] = [relative(a, b) for a, b in zip(here, theirs, strict=True)]
    return found


@part(*(f"matching-{n}" for n in SIZES))
def matchings(name: str) -> dict:
    """Ways of matching 128 sets: cost above SciPy's, share of equal choices, seconds."""
    n, batch = int(name.split("-")[1]), 8 if REHEARSE else 128
    found: dict[str, Any] = {"n": n, "batch": batch}
    for kind in ("trained", "untrained", "random"):
        cost = layer.matching_costs(kind, batch, n)
        rows = [linear_sum_assignment(c)[1] for c in cost.astype(np.float64)]
        best = np.take_along_axis(cost, np.stack(rows)[..., None], -1).sum((1, 2), np.float64)
        on_device = jnp.asarray(cost)
        chosen = {}
        # optax at 256 takes longer than it is worth.
        for method in ("device", "optax") if n <= 64 else ("device",):
            solve = functools.partial(matching.assign, method=method)
            chosen[method] = np.asarray(jax.jit(solve)(on_device))
            took = np.take_along_axis(cost, chosen[method][..., None], -1).sum((1, 2), np.float64)
            found[f"{kind}/{method}/excess"] = float(np.max((took - best) / best))
            found[f"{kind}/{method}/as_scipy"] = float(np.mean(chosen[method] == np.stack(rows)))
            found[f"{kind}/{method}/seconds"] = seconds(solve, on_device)
        if len(chosen) == 2:
            same = chosen["device"] == chosen["optax"]
            found[f"{kind}/device_as_optax"] = float(np.mean(same))
        host = {"it": lambda c=on_device: matching.assign(c, method="host")}
        found[f"{kind}/host/seconds"] = statistics.median(layer.time_in_turn(host, 3)["it"])
    return found


# --- how fast is it? ---


@part(*(f"layer-{name}" for name in LAYERS))
def layers(name: str) -> dict:
    """Encoder and decoder, forward and step, as `msdspn bench layer`; tf32 and full float32."""
    case = name.removeprefix("layer-")
    found = {}
    for kind in PRECISIONS[1:2] if REHEARSE else PRECISIONS[:2]:
        with jax.default_matmul_precision(kind):
            found[kind] = layer.bench_layer(case, REPEAT)
    return found


@part(*(f"torch-{name}" for name in LAYERS))
def torch_layers(name: str) -> dict:
    """The same in PyTorch, eager and compiled, where there is PyTorch."""
    case = layer.LAYER_CASES[name.removeprefix("torch-")]
    script = str(ROOT / "experiments/benchmarks/peer_torch.py")
    found: dict[str, Any] = {}
    for peer in ("torch", "torch-compiled"):
        for kind in PRECISIONS[:2]:
            asked = ("forward\n" + "step\n") * (REPEAT + 3)
            done = subprocess.run(
                [sys.executable, script, peer, json.dumps(dataclasses.asdict(case)), kind],
                input=asked, capture_output=True, text=True, timeout=240, check=False,
            )  # fmt: skip
            if "No module named 'torch'" in done.stderr:
                return {"left_out": "no PyTorch here"}
            if done.returncode:
                found[f"{peer}/{kind}"] = {"error": done.stderr.strip().splitlines()[-1][:300]}
                continue
            first, *times = map(json.loads, done.stdout.splitlines())
            # The first three of each are for compiling and warming up.
            walls = [pair[0] for pair in times][6:]
            found[f"{peer}/{kind}"] = first | {
                "forward_seconds": statistics.median(walls[::2]),
                "training_step_seconds": statistics.median(walls[1::2]),
            }
    return found


@part("ranks")
def rank_methods(name: str) -> dict:
    """Comparing against sorting: from which n on does sorting win?"""
    found = {}
    for n in (4, 8) if REHEARSE else (8, 16, 32, 64, 128, 256, 512, 1024):
        features = jax.random.normal(jax.random.key(n), (2, n, 4) if REHEARSE else (128, n, 256))
        for method in ("compare", "sort"):
            of = functools.partial(ranks.stable_ranks, method=method)
            found[f"{n}/{method}"] = seconds(of, features)
    return found


@part("memory")
def memory(name: str) -> dict:
    """Temporary bytes of a training step of the CLEVR decoder, by adjoint and inner steps."""
    case = layer.LAYER_CASES["tiny" if REHEARSE else "clevr-decoder"]
    found = {}
    for spelling, adjoint in ADJOINTS.items():
        for steps in (2,) if REHEARSE else (10, 40, 160):
            built = layer.build_layer(dataclasses.replace(case, num_steps=steps), adjoint=adjoint)
            compiled = jax.jit(built.training_step).lower(*built.arguments).compile()
            found[f"{spelling}/{steps}"] = compiled.memory_analysis().temp_size_in_bytes
    return found


@part("render")
def render(name: str) -> dict:
    """Images a second of the renderer, by quality."""
    from msdspn_jax.bench.render import bench_render

    if REHEARSE:
        return {"fast": bench_render(16, "fast", batch=2, repeat=1)}
    return {q: bench_render(128, q, batch=256, repeat=5) for q in ("fast", "default", "high")}


STEP_WAYS = {
    "float32": ("highest", "float32"),
    "tf32": ("tensorfloat32", "float32"),
    "bfloat16-encoder": ("tensorfloat32", "bfloat16"),
}
if REHEARSE:
    del STEP_WAYS["float32"], STEP_WAYS["tf32"]


@part(*(f"step-{way}" for way in STEP_WAYS))
def steps(name: str) -> dict:
    """A whole CLEVR training step and its parts, as `msdspn bench step`."""
    from msdspn_jax.bench import step

    kind, dtype = STEP_WAYS[name.removeprefix("step-")]
    case = step.CASES["tiny" if REHEARSE else "clevr-128"]
    step.CASES[name] = dataclasses.replace(case, compute_dtype=dtype)
    with jax.default_matmul_precision(kind):
        return step.bench_step(name, REPEAT)


@part("replicates")
def replicates(name: str) -> dict:
    """A training step of random sets (n = d = 8) with 1 to 32 seeds side by side."""
    module = tasks.load("random-sets")
    tiny = {"hidden_dim": 8, "latent_dim": 8, "batch_size": 4, "inner": ms.Inner(num_steps=2)}
    settings = tiny if REHEARSE else {"set_size": 8, "set_dim": 8}
    found = {}
    for number in (1, 2) if REHEARSE else (1, 2, 4, 8, 16, 32):
        config = module.Config(replicates=number, **settings)
        runner = StepRunner(module.build(config), config)
        state, count = runner.place(runner.init()), 2 if REHEARSE else 50
        times = []
        # The first dispatch compiles.
        for i in range(3):
            start = time_now()
            chunk = runner.run(state, i * count, count)
            state = jax.block_until_ready(chunk.state)
            times.append(time_now() - start)
        found[f"{number}/step_seconds"] = min(times[1:]) / count
    return found


def time_now() -> float:
    import time

    return time.perf_counter()


def main() -> None:
    name = sys.argv[1]
    if name == "list":
        print(*PARTS, sep="\n")
        return
    result = PARTS[name]()
    here = jax.devices()[0]
    about = {"device": layer.device_name(), "platform": here.platform, "jax": jax.__version__}
    print(json.dumps(about | {"result": result}), flush=True)


if __name__ == "__main__":
    main()
