"""Experiments by name.

The module of each exports ``Config`` and ``build(config) -> Task``, and ``report(argv)`` where its
finished runs can be collected into the paper's tables.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from msdspn_jax.errors import UserError


class Entry(NamedTuple):
    """A task: its module within this package, and one line of help."""

    module: str
    help: str


#: By the word on the command line.
TASKS = {
    "random-sets": Entry(
        "autoencoding.random_sets", "autoencode sets of normal vectors (paper, section 4.2)"
    ),
    "digits": Entry(
        "autoencoding.digits", "autoencode scikit-learn's handwritten digits as point sets"
    ),
    "numbering": Entry("numbering.task", "class-specific numbering (paper, section 4.1)"),
    "sets": Entry("sets.task", "sets of your own data: --data FILE.npz"),
    "clevr": Entry("clevr.task", "images to sets of objects (paper, section 4.3)"),
}


def load(name: str) -> ModuleType:
    """The module of a task: ``load("random-sets").build``."""
    if name not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{TASKS[name].module}")
