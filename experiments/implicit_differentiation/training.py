"""What a better gradient of the minimum buys: every adjoint at equal time, and its angle to exact.

Trains iDSPN on random sets (n = d = 8) and on numbering (n = 16, 4 classes), everything alike but
the adjoint, each for the same processor time, two seeds. On the way it measures the angle between
the parameter gradient of that adjoint and the exact one, at the parameters it has then, on a fixed
batch.

    python experiments/implicit_differentiation/training.py [--seconds 75] [--out FOLDER]

writes training.json and training.png beside this file, and the table of README.md. Finished runs
are kept in the JSON file and skipped: it may be stopped and started again. 26 runs of SECONDS each.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import PercentFormatter

import msdspn_jax as ms
from msdspn_jax import _markdown, plots
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.autoencoding import random_sets
from msdspn_jax.tasks.numbering import task as numbering
from msdspn_jax.tasks.summary import put_into
from msdspn_jax.training.config import Safety
from msdspn_jax.training.parallel import StepRunner
from msdspn_jax.training.state import run_keys

FOLDER = Path(__file__).parent
WAYS = {
    "identity": ms.identity(),
    # Past the projection, which random sets do not have.
    "identity(straight_through=True)": ms.identity(straight_through=True),
    "neumann(1)": ms.neumann(1),
    "neumann(3)": ms.neumann(3),
    "conjugate_gradient(3, damping=0.1)": ms.conjugate_gradient(3, damping=0.1),
    "exact": ms.exact(),
    "unrolled": ms.unrolled(),
}
SMALL = {
    "hidden_dim": 128, "latent_dim": 128, "fresh": True, "val_size": 1280,
    # Refused steps are counted, and the run goes on.
    "safety": Safety(skip_bad_steps=2**31 - 1),
}  # fmt: skip
TASKS = {
    "random sets": (
        random_sets,
        random_sets.Config(
            set_size=8, set_dim=8, batch_size=64, inner=Inner(num_steps=20), **SMALL
        ),
    ),
    "numbering": (
        numbering,
        numbering.Config(set_size=16, batch_size=64, inner=Inner(num_steps=20), **SMALL),
    ),
}
SCORES = {
    "random sets": ("loss", "validation loss"),
    "numbering": ("macro_accuracy", "sets with all right"),
}
CHUNK = 50


def with_adjoint(config, adjoint, seed):
    """The configuration with another way to differentiate, and nothing else changed."""
    inner = dataclasses.replace(config.resolved_inner(), adjoint=adjoint)
    model = "dspn" if adjoint == ms.unrolled() else "idspn"
    return dataclasses.replace(config, model=model, inner=inner, seed=seed)


def gradient_of(task, keys, batch_size):
    """The parameter gradient on a fixed batch, as one vector."""
    slots = jnp.arange(batch_size)
    noise = jax.vmap(lambda slot: jax.random.fold_in(keys.evaluation, slot))(slots)
    batch = task.sample(keys.evaluation, 0, slots)

    @jax.jit
    def gradient(params):
        loss = lambda params: task.loss(  # noqa: E731
            {"params": params}, batch, noise, stage=task.stage(0), axis_name=None
        )[0]
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(params))])

    return gradient


def run(name, way, seed, seconds):
    """Train for so many seconds; scores by step and time, angles in degrees on the way."""
    module, config = TASKS[name]
    config = with_adjoint(config, WAYS[way], seed)
    task, keys = module.build(config), run_keys(seed)
    exact = module.build(with_adjoint(config, ms.exact(), seed))
    runner = StepRunner(task, config)

    gradients = [gradient_of(t, keys, config.batch_size) for t in (task, exact)]
    state = runner.place(runner.init())
    runner.run(runner.place(runner.init()), 0, CHUNK)  # Compiled before the clock runs.
    lines, spent, next_look = [], 0.0, 0.0
    while True:
        if spent >= next_look or spent >= seconds:
            ours, true = (gradient(state.params) for gradient in gradients)
            length = float(jnp.linalg.norm(ours) * jnp.linalg.norm(true))
            # Where all sets of the batch are right to the last bit, there is no gradient, and where
            # the dense solve is singular, none to compare with.
            there = length and np.isfinite(length)
            cosine = np.clip(float(ours @ true) / length, -1, 1) if there else None
            scores = task.evaluate(state.variables, "val", keys.evaluation)
            lines.append(
                {
                    "step": int(state.step),
                    "seconds": spent,
                    "angle": None if cosine is None else float(np.degrees(np.arccos(cosine))),
                    "score": float(scores[SCORES[name][0]]),
                    "skipped": int(state.skipped),
                }
            )
            next_look += seconds / 12
        if spent >= seconds:
            return lines
        start = time.process_time()
        state = jax.block_until_ready(runner.run(state, int(state.step), CHUNK).state)
        spent += time.process_time() - start


def draw(runs):
    """Score and angle by time, a column a task."""
    figure = plots.new_figure(10, 5.6)
    axes = figure.subplots(2, len(TASKS), sharex="col")
    for column, name in enumerate(TASKS):
        for color, way in zip(plots.SERIES, WAYS, strict=False):
            found = [r["lines"] for r in runs if (r["task"], r["way"]) == (name, way)]
            for number, lines in enumerate(found):
                label = way if number == 0 else None
                at = [line["seconds"] for line in lines]
                for row, key in enumerate(("score", "angle")):
                    values = [np.nan if line[key] is None else line[key] for line in lines]
                    axes[row, column].plot(at, values, ".-", color=color, label=label, lw=1.4)
        axes[0, column].set(title=name, ylabel=SCORES[name][1])
        if name == "numbering":
            axes[0, column].yaxis.set_major_formatter(PercentFormatter(1))
        axes[1, column].set(xlabel="processor seconds", ylabel="angle to exact, degrees")
    axes[0, 0].set_yscale("log")
    axes[0, 1].legend(frameon=False, fontsize=7, loc="upper left")
    for axis in axes.flat:
        plots.plain_axes(axis)
    return figure


def shared_looks(runs, name):
    """The looks from the second on until some run of the task has no gradient, and so no angle.

    A mean over all looks would be one over the hard moments of some runs and all of others.
    """
    found = [r["lines"] for r in runs if r["task"] == name and r["way"] != "exact"]
    looks = range(1, min(map(len, found), default=0))
    missing = (i for i in looks if any(lines[i]["angle"] is None for lines in found))
    return looks[: next(missing, looks.stop) - 1]


def table(runs):
    """Every seed's score, means of steps and angles, as Markdown."""
    lines = []
    for way in WAYS:
        cells = [f"`{way}`"]
        for name in TASKS:
            found = [r["lines"] for r in runs if (r["task"], r["way"]) == (name, way)]
            form = "{:.1%}" if name == "numbering" else "{:.4f}"
            angles = [lines[i]["angle"] for lines in found for i in shared_looks(runs, name)]
            cells.append(", ".join(form.format(lines[-1]["score"]) for lines in found))
            cells.append(f"{np.mean([lines[-1]['step'] for lines in found]):,.0f}" if found else "")
            known = [angle for angle in angles if angle is not None]
            cells.append(f"{np.mean(known):.0f}°" if known else "")
        lines.append(cells)
    head = [x for name in TASKS for x in (f"{name}: {SCORES[name][1]}", "steps", "mean angle")]
    return _markdown.table(["adjoint", *head], lines)


def main():
    """Run what is not in the JSON file yet, then write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=75, 
                        help="processor time of each run; 0: no new runs")  # fmt: skip
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    options = parser.parse_args()
    path = options.out / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {"runs": []}
    if options.seconds:
        record |= {"jax": jax.__version__, "seconds": options.seconds}
    for seed in (0, 1):
        for name in TASKS:
            for way in WAYS:
                wanted = (name, way, seed)
                done = any((r["task"], r["way"], r["seed"]) == wanted for r in record["runs"])
                idle = "straight" in way and name == "random sets"
                if done or idle or not options.seconds:
                    continue
                lines = run(name, way, seed, options.seconds)
                record["runs"].append({"task": name, "way": way, "seed": seed, "lines": lines})
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(name, way, seed, lines[-1], flush=True)
    text = table(record["runs"])
    if options.out == FOLDER:
        put_into(FOLDER / "README.md", text, "training.py")
    plots.save(draw(record["runs"]), options.out / "training.png")
    print(text)


if __name__ == "__main__":
    main()
