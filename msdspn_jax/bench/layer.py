"""Time and memory of the parts: ``msdspn bench``. Definitions of the cases, and how they are timed.

Every result is a flat dictionary, printed as one JSON object. Times are wall-clock seconds on
whatever `device` says: medians, with the fastest and slowest beside them, because a machine that
is also doing something else only ever makes a run slower.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax._cores import compiler_options
from msdspn_jax.adjoints import Adjoint, parse_adjoint
from msdspn_jax.errors import UserError
from msdspn_jax.matching import assignment as matching
from msdspn_jax.models.inner import PRODUCTS, Inner, Products
from msdspn_jax.models.set_predictor import SetDecoder, SetPredictor
from msdspn_jax.set_encoder import SetEncoder


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """An input encoder and a set decoder, forward and backward, without a loss.

    Sizes are the paper's: sections 4.3 (clevr-decoder, where the encoder of a random set stands in
    for that of an image), 4.2 (random) and 4.1 (numbering).
    """

    n: int
    d: int
    width: int
    num_steps: int
    momentum: float = 0.9
    max_grad_norm: float = math.inf
    classes: int | None = None
    """One-hot inputs of so many classes, seen by the energy too; elements on the simplex."""
    batch: int = 128

    @property
    def input_dim(self) -> int:
        """Dimension of the elements that the input encoder sees."""
        return self.classes or self.d

    @property
    def step_matmul_flops(self) -> float:
        """Floating-point operations in the matrix products of one inner step.

        Two products forward and two back to the sets; nothing else touches the wide features.
        """
        width_in = self.d + (self.classes or 0)
        return 4.0 * self.batch * self.n * self.width * (width_in + self.width)


LAYER_CASES = {
    "clevr-decoder": LayerCase(n=10, d=19, width=512, num_steps=40, max_grad_norm=10.0),
    "random-8x8": LayerCase(n=8, d=8, width=512, num_steps=20),
    "random-32x32": LayerCase(n=32, d=32, width=512, num_steps=20),
    "numbering": LayerCase(n=64, d=64, width=256, num_steps=20, max_grad_norm=40.0, classes=4),
    # A large set of small elements, as a cloud of points.
    "cloud": LayerCase(n=1024, d=3, width=128, num_steps=10, batch=16),
    # Seconds to compile and run: for tests, and to see the output.
    "tiny": LayerCase(n=3, d=2, width=8, num_steps=2, batch=4),
}

MATCHING_CASES = {str(n): n for n in (10, 32, 64, 256, 512, 1024)} | {"tiny": 4}


@dataclass(frozen=True)
class Layer:
    """A case made concrete."""

    forward: Callable[..., Any]
    """(params, inputs, keys) -> sets; of an image encoder, latents and statistics."""
    training_step: Callable[..., Any]
    """(params, inputs, keys, cotangent) -> (value, gradients of all parameters)."""
    arguments: tuple[Any, ...]


def build_layer(
    case: LayerCase,
    *,
    adjoint: Adjoint | None = None,
    rank_method: str = "auto",
    products: Products = "float32",
) -> Layer:
    """Random parameters, inputs and output cotangent for a case."""
    numbering = case.classes is not None
    model = SetPredictor(
        encoder=SetEncoder(
            case.width,
            case.width,
            case.n,
            rank_method=rank_method,
            dot_general=PRODUCTS[products],
        ),
        decoder=SetDecoder(
            case.n,
            case.d,
            case.width,
            inner=Inner(
                num_steps=case.num_steps,
                momentum=case.momentum,
                max_grad_norm=case.max_grad_norm,
                adjoint=adjoint,
                products=products,
                proximity=0.0 if numbering else 0.1,
                projection="simplex" if numbering else "none",
            ),
            initial_set="random" if numbering else "learned",
            rank_method=rank_method,
        ),
        condition_on_inputs=numbering,
    )
    random = np.random.default_rng(0)
    if case.classes is not None:
        inputs = np.eye(case.classes)[random.integers(0, case.classes, (case.batch, case.n))]
    else:
        inputs = random.normal(size=(case.batch, case.n, case.d))
    inputs = jnp.asarray(inputs, jnp.float32)
    cotangent = jnp.asarray(random.normal(size=(case.batch, case.n, case.d)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), case.batch)
    # Parameters do not depend on the batch, so a batch of one is enough to make them.
    params = jax.jit(model.init)(jax.random.key(0), inputs[:1], keys=keys[:1])

    def forward(params, inputs, keys):
        minimum: Any = model.apply(params, inputs, keys=keys)
        return minimum.sets

    def training_step(params, inputs, keys, cotangent):
        def objective(params):
            return jnp.sum(forward(params, inputs, keys) * cotangent)

        return jax.value_and_grad(objective)(params)

    return Layer(forward, training_step, (params, inputs, keys, cotangent))


def bench_layer(name: str, repeat: int = 5, *, adjoint: str = "identity") -> dict[str, Any]:
    """Forward and training step of one of `LAYER_CASES`.

    Returns, beside the settings of the case: ``forward_seconds`` and ``training_step_seconds``
    (medians) with ``_min`` and ``_max``; ``temp_bytes`` that the compiled training step allocates
    for itself; ``flops`` of a training step (XLA's count, which takes the loop's body once and, if
    implicit, the last step outside of it, plus the matrix products of the other inner steps);
    ``matmul_flops_per_second``, measured here and now on the largest product of the case;
    ``floor_seconds``, the inner steps' products at that rate, below which no arrangement of the
    rest can get; ``matmul_rate_share`` of the training step.
    """
    case = _lookup("case", name, LAYER_CASES)
    layer = build_layer(case, adjoint=parse_adjoint(adjoint))
    forward, forward_compile = _compile(layer.forward, *layer.arguments[:-1])
    step, step_compile = _compile(layer.training_step, *layer.arguments)
    # In turn, so that a slow moment of the machine meets all of them.
    width = case.width
    left, right = jnp.ones((case.batch * case.n, width)), jnp.ones((width, width))
    product, _ = _compile(jnp.matmul, left, right)
    times = time_in_turn(
        {
            "forward": lambda: forward(*layer.arguments[:-1]),
            "training_step": lambda: step(*layer.arguments),
            "matmul": lambda: product(left, right),
        },
        repeat,
    )
    rate = 2.0 * case.batch * case.n * width * width / min(times.pop("matmul"))
    floor_flops = case.num_steps * case.step_matmul_flops
    memory = step.memory_analysis()
    cost = step.cost_analysis() or {}
    steps_counted = 1 if adjoint.startswith("unrolled") else min(case.num_steps, 2)
    uncounted = (case.num_steps - steps_counted) * case.step_matmul_flops
    counted = float(cost.get("flops", 0.0)) + uncounted
    result = {
        "case": name,
        "device": device_name(),
        "adjoint": adjoint,
        **_summary(times),
        "forward_compile_seconds": forward_compile,
        "training_step_compile_seconds": step_compile,
        "temp_bytes": int(getattr(memory, "temp_size_in_bytes", 0)),
        "flops": counted,
        "matmul_flops_per_second": rate,
        "floor_seconds": floor_flops / rate,
    }
    seconds = result["training_step_seconds"]
    result["matmul_rate_share"] = counted / seconds / rate
    result["floor_share"] = result["floor_seconds"] / seconds
    return result | _environment(repeat) | asdict(case)


def matching_costs(kind: str, batch: int, n: int, seed: int = 0) -> np.ndarray:
    """Costs as they occur: smooth-l1 between targets and predictions.

    "trained": predictions near their targets; "untrained": all predictions nearly alike, the
    hardest case; "random": unrelated.
    """
    random = np.random.default_rng(seed)
    target = random.normal(size=(batch, n, 8))
    noise = random.normal(size=(batch, n, 8))
    prediction = {"trained": target + 0.1 * noise, "untrained": 0.1 * noise, "random": noise}[kind]
    target = random.permuted(target, axis=1) if kind == "random" else target[:, ::-1]
    distance = np.abs(prediction[:, :, None] - target[:, None])
    loss = np.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    return loss.mean(-1).astype(np.float32)


def bench_matching(name: str, repeat: int = 5, *, batch: int | None = None) -> dict[str, Any]:
    """Ways of matching a batch of sets, on three kinds of costs (see `matching_costs`).

    128 sets, of more than 64 elements fewer: 8,192 elements in all. optax's solver is left out
    from 512 on, where it takes minutes.

    ``seconds`` holds the median for every kind and method; ``forward_seconds`` is ours on the
    device, on untrained costs. The host's includes reaching it and back, but no callback.
    """
    n = _lookup("case", name, MATCHING_CASES)
    batch = min(128, 8192 // n) if batch is None else batch
    kinds = ("trained", "untrained", "random")
    runs = {}
    for kind in kinds:
        cost = jnp.asarray(matching_costs(kind, batch, n))
        methods: list[matching.Method] = ["device"] + ["optax"] * (n <= 256)
        for method in methods:
            solve, _ = _compile(functools.partial(matching.assign, method=method), cost)
            runs[f"{kind}/{method}"] = lambda solve=solve, cost=cost: solve(cost)
        runs[f"{kind}/host"] = lambda cost=cost: matching.assign(cost, method="host")
    times = time_in_turn(runs, repeat)
    return {
        "case": name,
        "device": device_name(),
        "forward_seconds": statistics.median(times["untrained/device"]),
        "seconds": {key: statistics.median(values) for key, values in times.items()},
        "seconds_min": {key: min(values) for key, values in times.items()},
        "n": n,
        "batch": batch,
    } | _environment(repeat)


def time_in_turn(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Wall-clock seconds of every run, `repeat` times round after one round of warming up."""
    if repeat < 1:
        raise UserError(f"--repeat: expected a number >= 1, got {repeat}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def device_name() -> str:
    """The first device, as a person would say it."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    import os
    import platform

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}"


def _compile(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(function, compiler_options=compiler_options()).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _summary(times: dict[str, list[float]]) -> dict[str, float]:
    out = {}
    for name, values in times.items():
        out[f"{name}_seconds"] = statistics.median(values)
        out[f"{name}_seconds_min"] = min(values)
        out[f"{name}_seconds_max"] = max(values)
    return out


def _environment(repeat: int) -> dict[str, Any]:
    return {"repeat": repeat, "jax": jax.__version__, "platform": jax.default_backend()}


def _lookup(name: str, key: str, table: dict[str, Any]) -> Any:
    if key not in table:
        raise UserError(f"--{name}: expected one of {', '.join(table)}, got {key!r}")
    return table[key]
