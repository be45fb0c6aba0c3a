"""The scripts of the experiments ask for trainings that can begin."""

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from msdspn_jax.commands import train
from msdspn_jax.training.config import Run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CLEVR = EXPERIMENTS / "clevr"


def asked_for(script: Path, folder: Path, measured: Mapping[str, float] = MappingProxyType({})):
    """The configuration of every training that a script begins, by its name."""
    said = folder / "said"
    noted = folder / "msdspn"
    noted.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(said))}\n')
    python = folder / "python"  # Arithmetic alone: there are no runs to keep or to draw.
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n')
    for file in (noted, python):
        file.chmod(0o755)
    for name, cost in measured.items():
        (folder / f"{name}.pace").write_text(str(cost))
    places = {"RUNS": folder, "RECORDS": folder / "none", "MSDSPN": noted, "PYTHON": python}
    environment = os.environ | {name: str(path) for name, path in places.items()}
    subprocess.run([str(script)], env=environment, check=True, timeout=60)
    lines = [line.split() for line in said.read_text().splitlines()]
    configs = [train.parse(line[1], line[2:]) for line in lines if line[0] == "train"]
    assert all(not config.remarks() for config in configs)
    return {Path(str(config.run.dir)).name: config for config in configs}


@pytest.mark.parametrize(
    ("script", "num"),
    [
        ("class_specific_numbering/run.sh", 17),
        ("class_specific_numbering/inner.sh", 16),
        ("random_sets/run.sh", 42),
    ],
)
def test_every_training_parses(script, num, tmp_path):
    configs = asked_for(EXPERIMENTS / script, tmp_path)
    assert len(configs) == num
    alike = [dataclasses.replace(each, seed=0, run=Run()) for each in configs.values()]
    seeds = {name.rstrip("0123456789") for name in configs}
    assert len(set(map(repr, alike))) == len(seeds)


def test_every_training_of_the_comparison_parses(tmp_path):
    names = "dspn slot-attention slot-attention-muon slot-mlp idspn-relation idspn-sum idspn-mean"
    names += " idspn-adam dspn-adam slot-mlp-adam"
    configs = asked_for(CLEVR / "comparison.sh", tmp_path, dict.fromkeys(names.split(), 2.0))
    steps = {name: config.steps for name, config in configs.items()}
    assert len(steps) == 14
    assert steps["idspn-fspool"] == 1150
    assert steps["idspn-0"] == steps["idspn-1"] == 2 * steps["dspn-0"] == 2300
    assert steps["idspn-mean"] == steps["idspn-sum"] == 580


def test_every_training_of_the_search_parses(tmp_path):
    script = CLEVR / "recipes" / "search.sh"
    listed = script.read_text().partition("declare -A paid=(")[2].partition("\n)")[0]
    paid = [line.split("]")[0].strip(" [") for line in listed.strip().splitlines()]
    configs = asked_for(script, tmp_path, dict.fromkeys(paid, 2.0))
    base = configs["base-s0"]
    assert configs["base-s1"].seed == 1
    assert {configs[f"{name}-s0"].steps for name in paid} == {base.steps // 2}
    # Every change is one, and none is that of another.
    different = {
        repr(dataclasses.replace(config, steps=1, run=base.run)) for config in configs.values()
    }
    assert len(different) == len(configs)
