"""Time and memory of the layer against its sizes, and the time of the ways to find ranks.

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

import msdspn_jax as ms
from msdspn_jax import plots
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
    """Processor seconds (above) and bytes (below) of a training step; ranks: the last column."""
    figure = plots.new_figure(11, 5.2)
    axes = figure.subplots(2, len(SWEEPS) + 1)
    titles = {"num_steps": "inner steps", "batch": "sets", "ranks": "n"}
    for column, axis in enumerate((*SWEEPS, "ranks")):
        for row, key in enumerate(("processor_seconds", "temp_bytes")):
            plot = axes[row, column]
            points = [r for r in rows if r["axis"] == axis and key in r]
            if not points:
                plot.axis("off")
                continue
            modes = dict.fromkeys(r["mode"] for r in points)
            for mode, color in zip(modes, plots.SERIES, strict=False):
                chosen = [r for r in points if r["mode"] == mode]
                xs, ys = zip(*[(r["value"], r[key]) for r in chosen], strict=True)
                plot.loglog(xs, ys, "o-", ms=4, color=color, label=mode)
            sizes = sorted({r["value"] for r in points})
            plot.set_xticks(sizes[:: 1 + len(sizes) // 5], minor=False)
            plot.xaxis.set_major_formatter("{x:.0f}")
            plot.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            plot.set_xlabel(titles.get(axis, axis))
            plots.plain_axes(plot)
            if row == 0 and axis in ("n", "ranks"):
                plot.legend(frameon=False, fontsize=8)
                plot.set_title("training step" if axis == "n" else "finding ranks", fontsize=10)
    axes[0, 0].set_ylabel("processor seconds")
    axes[1, 0].set_ylabel("temporary memory, bytes")
    plots.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    rows = []
    for part in (ranks, layers):
        for row in part(repeat):
            rows.append(row | {"device": benchmarks.device_name()})
            print(json.dumps(row), flush=True)
            (HERE / "results").mkdir(exist_ok=True)
            (HERE / "results" / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, HERE / "scaling.png")


if __name__ == "__main__":
    main()
