"""Experiments by name. A module here exports ``Config`` and ``build(config) -> Task``."""

from __future__ import annotations

import importlib
from types import ModuleType

# Name on the command line: one line of help. The module is the name with underscores.
TASKS = {
    "random-sets": "autoencode sets of normal vectors (paper, section 4.2)",
    "digits": "autoencode scikit-learn's handwritten digits as point sets",
    "numbering": "class-specific numbering (paper, section 4.1)",
    "clevr": "images to sets of objects (paper, section 4.3)",
}

_MODULES = {
    "random-sets": "autoencoding.random_sets",
    "digits": "autoencoding.digits",
    "numbering": "numbering.task",
    "clevr": "clevr.task",
}


def load(name: str) -> ModuleType:
    """The module of a task: ``load("random-sets").build``."""
    from msdspn_jax.errors import UserError

    if name not in TASKS:
        raise UserError(f"no task {name!r}; choose one of {', '.join(TASKS)}")
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")
