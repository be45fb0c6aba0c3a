"""Keep the record of a finished run, a few kilobytes, where a report finds it without the run.

    python experiments/keep_run.py RUN FOLDER

Copies settings, metrics and scores into FOLDER/NAME; the weights and the paths of the machine stay
behind. Reports take these folders as runs.
"""

import json
import shutil
import sys
from pathlib import Path

from msdspn_jax._files import write_text
from msdspn_jax.training.run_folder import is_finished

COPIED = (
    "metrics.jsonl",
    "evaluation.json",
    "numbering_scores.json",
    "decodings.json",
    "figures/inner_steps.json",
)


def keep(run: Path, folder: Path) -> None:
    if not is_finished(run):
        raise SystemExit(f"{run}: expected a finished run")
    out = folder / run.name
    out.mkdir(parents=True, exist_ok=True)
    record = json.loads((run / "config.json").read_text())
    record.pop("command", None)
    record["config"]["run"]["dir"] = None
    write_text(out / "config.json", json.dumps(record, indent=1) + "\n")
    for name in COPIED:
        if (run / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copy(run / name, out / name)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
