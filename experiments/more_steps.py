"""Scores of a trained run of iDSPN or DSPN with other numbers of inner steps.

    python experiments/more_steps.py RUN [--metric loss] [--split val] [--checkpoint latest]

Writes RUN/inner_steps.json, number of inner steps -> score (mean over replicates), which the
reports of random-sets and numbering show.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from msdspn_jax import tasks
from msdspn_jax._files import write_text
from msdspn_jax.trained.run import load_run
from msdspn_jax.training.state import run_keys

INNER_STEPS = (10, 20, 40, 80)


def main() -> None:
    """Evaluate the run with each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--metric", default="loss", help="which score; default: loss")
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--checkpoint", default="latest", choices=("latest", "best"))
    options = parser.parse_args()
    run = load_run(options.run, checkpoint=options.checkpoint)
    scores = {}
    for steps in INNER_STEPS:
        inner = dataclasses.replace(run.config.inner, num_steps=steps, eval_num_steps=steps)
        task = tasks.build(run.task_name, dataclasses.replace(run.config, inner=inner))
        found = [
            # The initial sets of the run's own evaluation.
            task.evaluate(v, options.split, run_keys(run.config.seed + i).evaluation)
            for i, v in enumerate(run.variables)
        ]
        values = [float(of[options.metric]) for of in found]
        scores[str(steps)] = sum(values) / len(values)
        print(f"{steps} inner steps: {options.metric} {scores[str(steps)]:.5f}", flush=True)
    write_text(options.run / "inner_steps.json", json.dumps(scores) + "\n")


if __name__ == "__main__":
    main()
