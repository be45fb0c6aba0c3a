"""Table and picture of the runs of run.sh.

    python experiments/digits/report.py [--runs runs/digits]

puts the table into README.md and writes summary.json beside this file, from the records in runs/
by default; from runs with their weights also digits.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax import _markdown, plots
from msdspn_jax.tasks.autoencoding.digits import load_point_sets, split_indices
from msdspn_jax.tasks.autoencoding.model import autoencoder
from msdspn_jax.tasks.summary import Result, put_into, write_results
from msdspn_jax.trained.run import load_run
from msdspn_jax.training.run_folder import read_metrics, training_hours

FOLDER = Path(__file__).parent
NAMES = {
    "idspn-muon": "iDSPN, Muon",
    "dspn-muon": "DSPN, Muon",
    "idspn-adam": "iDSPN, Adam",
    "dspn-adam": "DSPN, Adam",
}


def main():
    """Read the runs, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs")
    options = parser.parse_args()
    lines = []
    losses, hours, rows = {}, 0.0, {}
    for name, label in NAMES.items():
        losses[label] = read_metrics(options.runs / name, "val")[-1]["loss"]
        spent = training_hours(options.runs / name)
        hours += spent
        lines.append([label, f"{losses[label]:.4f}", f"{3600 * spent:.0f}"])
        if name.endswith("muon") and (options.runs / name / "checkpoints").exists():
            run = load_run(options.runs / name)
            config = run.config
            sets = load_point_sets(min_intensity=config.min_intensity).sets
            val = sets[split_indices(config.split_seed)["val"]][:10]
            model = autoencoder(config, *val.shape[1:])
            decode = jax.jit(
                lambda params, sets, model=model: model.apply({"params": params}, sets)
            )
            rows["target"] = val
            found = decode(run.variables[0]["params"], jnp.asarray(val))
            rows[label.split(",")[0]] = np.asarray(found.sets)
    head = ["800 steps", "Hungarian loss on validation images", "seconds of training"]
    text = _markdown.table(head, lines)
    put_into(FOLDER / "README.md", text, "report.py")
    print(text)
    if rows:
        plots.save(plots.digits(rows), FOLDER / "digits.png")
    results = [
        Result(
            "[digits](experiments/digits/README.md), validation loss",
            label,
            "",
            f"{loss:.4f}",
            "800 steps, 1 seed; not an experiment of the paper",
            f"{hours:.2f}",
            "experiments/digits/run.sh",
        )
        for label, loss in losses.items()
    ]
    write_results(FOLDER, results)


if __name__ == "__main__":
    main()
