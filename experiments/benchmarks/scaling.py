"""Time and memory of the layer against its sizes and against replicates trained side by side,
and the time of the ways to find ranks against n.

    python experiments/benchmarks/scaling.py

Writes results/scaling.json and scaling.png beside this file. Times are the fastest of `--repeat`
runs: processor seconds in the figure, wall-clock seconds beside them in the file. Memory is what
XLA plans for a compiled training step.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import msdspn_jax as ms
from msdspn_jax.adjoints import parse_adjoint
from msdspn_jax.bench import layer as benchmarks

HERE = Path(__file__).parent
BASE = benchmarks.LayerCase(n=8, d=8, width=64, num_steps=10, batch=16)
SWEEPS = {
    "n": (4, 16, 64, 256, 1024),
    "d": (2, 8, 32, 128),
    "num_steps": (5, 20, 80),
    "batch": (4, 16, 64, 256),
}
MODES = ("identity", "neumann:3", "unrolled")
REPLICATES = (1, 2, 4, 8)
REPLICATE_WIDTHS = (32, 64, 128, 256, 512)
RANK_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def timed(function, arguments, repeat):
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeat):
        # Runs of at least 50 ms, because the processor clock ticks coarsely.
        runs, start, wall = 0, time.process_time(), time.perf_counter()
        while runs == 0 or time.perf_counter() - wall < 0.05:
            jax.block_until_ready(compiled(*arguments))
            runs += 1
        end = time.perf_counter()
        seconds.append(((time.process_time() - start) / runs, (end - wall) / runs))
    processor, wall = (min(values) for values in zip(*seconds, strict=True))
    return {
        "processor_seconds": processor,
        "wall_seconds": wall,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def layers(repeat):
    for axis, values in SWEEPS.items():
        for value in values:
            for mode in MODES:
                if axis == "n" and value > 256 and mode != "identity":
                    continue
                case = dataclasses.replace(BASE, **{axis: value})
                layer = benchmarks.build_layer(case, adjoint=parse_adjoint(mode))
                measured = timed(layer.training_step, layer.arguments, repeat)
                yield {"axis": axis, "value": value, "mode": mode} | measured


def replicates(repeat):
    """Seeds side by side by `vmap`, on random-8x8 made narrower."""
    for width in REPLICATE_WIDTHS:
        case = dataclasses.replace(benchmarks.LAYER_CASES["random-8x8"], width=width)
        layer = benchmarks.build_layer(case)
        params, *rest = layer.arguments
        for number in REPLICATES:
            copies = jax.tree.map(lambda x, number=number: jnp.stack([x] * number), params)
            step = jax.vmap(layer.training_step, in_axes=(0, None, None, None))
            measured = timed(step, (copies, *rest), repeat)
            yield {"axis": "replicates", "value": number, "mode": f"width {width}"} | measured


def ranks(repeat):
    for n in RANK_SIZES:
        features = jax.random.normal(jax.random.key(0), (16, n, 64))
        for method in ("compare", "sort"):
            if method == "compare" and n > 1024:
                continue  # Seconds, and known to lose from 512 on.
            function = partial(ms.stable_ranks, method=method)
            measured = timed(function, (features,), repeat)
            del measured["temp_bytes"]  # Of a single operation: nothing to see.
            yield {"axis": "ranks", "value": n, "mode": method} | measured


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [a for a in (*SWEEPS, "replicates", "ranks") if any(r["axis"] == a for r in rows)]
    figure, axes = plt.subplots(
        2, len(shown), figsize=(3.6 * len(shown), 6.5), layout="constrained", squeeze=False
    )
    for column, axis in enumerate(shown):
        for row, key in enumerate(("processor_seconds", "temp_bytes")):
            plot = axes[row, column]
            points = [r for r in rows if r["axis"] == axis and key in r]
            if not points:
                plot.axis("off")
                continue
            for mode in dict.fromkeys(r["mode"] for r in points):
                chosen = [r for r in points if r["mode"] == mode]
                xs, ys = zip(*[(r["value"], r[key]) for r in chosen], strict=True)
                plot.loglog(xs, ys, "o-", label=mode)
            sizes = sorted({r["value"] for r in points})
            plot.set_xticks(sizes[:: 1 + len(sizes) // 6], minor=False)
            plot.xaxis.set_major_formatter("{x:.0f}")
            plot.minorticks_off()
            plot.legend()
            plot.set_xlabel({"ranks": "n", "num_steps": "inner steps"}.get(axis, axis))
            plot.set_ylabel({"temp_bytes": "bytes"}.get(key, "processor seconds"))
        axes[0, column].set_title("finding ranks" if axis == "ranks" else "training step")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    rows = []
    for part in (ranks, replicates, layers):
        for row in part(repeat):
            rows.append(row | {"device": benchmarks.device_name()})
            print(json.dumps(row), flush=True)
            (HERE / "results").mkdir(exist_ok=True)
            (HERE / "results" / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, HERE / "scaling.png")


if __name__ == "__main__":
    main()
