"""The script of CLEVR's comparison asks for trainings that can begin."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from msdspn_jax.commands import train

SCRIPT = Path(__file__).parents[1] / "experiments" / "clevr" / "comparison.sh"
COSTS = "dspn slot-attention slot-attention-muon slot-mlp idspn-relation idspn-sum idspn-mean"


def test_every_training_of_the_comparison_parses(tmp_path):
    said = tmp_path / "said"
    noted = tmp_path / "msdspn"
    noted.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(said))}\n')
    python = tmp_path / "python"  # Arithmetic alone: there are no runs to keep or to draw.
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n')
    for file in (noted, python):
        file.chmod(0o755)
    for name in COSTS.split():  # Measured already.
        (tmp_path / f"{name}.pace").write_text("2.0")
    places = {"RUNS": tmp_path, "RECORDS": tmp_path / "none", "MSDSPN": noted, "PYTHON": python}
    environment = os.environ | {name: str(path) for name, path in places.items()}
    subprocess.run([str(SCRIPT)], env=environment, check=True, timeout=60)
    lines = [line.split() for line in said.read_text().splitlines()]
    configs = [train.parse("clevr", line[2:]) for line in lines if line[0] == "train"]
    steps = {Path(str(config.run.dir)).name: config.steps for config in configs}
    assert len(steps) == 10
    assert steps["idspn-0"] == steps["idspn-1"] == 2 * steps["dspn-0"] == 2300
    assert steps["idspn-mean"] == steps["idspn-sum"] == 580
    assert all(not config.remarks() for config in configs)
