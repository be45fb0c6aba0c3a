"""Validation loss of a trained run with other numbers of inner steps.

    python experiments/random_sets/more_steps.py RUN

Writes RUN/inner_steps.json, number of inner steps -> loss, which `msdspn report random-sets` shows.
"""

import dataclasses
import json
import sys
from pathlib import Path

from msdspn_jax import tasks
from msdspn_jax._files import write_text
from msdspn_jax.trained.run import load_run
from msdspn_jax.training.state import run_keys

INNER_STEPS = (10, 20, 40, 80)


def main(folder: Path) -> None:
    run = load_run(folder, checkpoint="latest")
    losses = {}
    for steps in INNER_STEPS:
        inner = dataclasses.replace(run.config.inner, num_steps=steps)
        task = tasks.build(run.task_name, dataclasses.replace(run.config, inner=inner))
        found = [
            # The initial sets of the run's own validation.
            float(task.evaluate(v, "val", run_keys(run.config.seed + i).evaluation)["loss"])
            for i, v in enumerate(run.variables)
        ]
        losses[str(steps)] = sum(found) / len(found)
        print(f"{steps} inner steps: {losses[str(steps)]:.5f}", flush=True)
    write_text(folder / "inner_steps.json", json.dumps(losses) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
