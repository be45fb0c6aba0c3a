"""Experiments by name, and tasks of one's own by file or module.

The module of each exports ``Config`` and ``build(config) -> Task``, and ``report(argv, runs)``
where its finished runs can be collected into the paper's tables. To load a task of one's own is to
run its code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from msdspn_jax.training.task import Task


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
    "clevr": Entry("clevr.task", "images to sets of objects (paper, section 4.3)"),
    "sets": Entry("sets.task", "sets of your own data: --data FILE.npz"),
}


def load(name: str) -> ModuleType:
    """The module of a task: ``load("random-sets").build``.

    Args:
        name: one of `TASKS`; or a Python file or the dotted name of a module, which is run.

    Raises:
        UserError: there is no such task, file or module, or it is no task's.
    """
    if name in TASKS:
        return importlib.import_module(f"{__name__}.{TASKS[name].module}")
    if name.endswith(".py"):
        module = _from_file(Path(canonical(name)))
    elif "." in name and all(part.isidentifier() for part in name.split(".")):
        module = _by_name(name)
    else:
        raise UserError(
            f"task: expected one of {', '.join(TASKS)}, a file such as boxes.py or a module such as"
            f" package.boxes, got {name!r}"
        )
    _check_own(name, module)
    return module


def canonical(name: str) -> str:
    """The name by which a run folder remembers a task: of a file its whole path."""
    return os.path.realpath(name) if name.endswith(".py") and name not in TASKS else name


def word(name: str) -> str:
    """A short name for folders and commands: boxes, for /home/me/boxes.py and package.boxes."""
    if name in TASKS:
        return name
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def build(name: str, config: Any) -> Task:
    """The task of a configuration, under the name by which it is found again."""
    return dataclasses.replace(load(name).build(config), name=canonical(name))


def _from_file(path: Path) -> ModuleType:
    # Two files of one name are two modules, and one file is one module, however often it is loaded:
    # its classes would be strangers to each other otherwise.
    tag = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"msdspn_task_{path.stem}_{tag}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UserError(
            f"{path}: expected the file of a task, got nothing there (the config.json of a run that"
            ' was trained with it can say, under "task", where it is now)'
        )
    _search(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _by_name(name: str) -> ModuleType:
    _search(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"task: expected a module that can be imported from here or from PYTHONPATH, got"
            f" {name!r} (there is no {error.name})"
        ) from error


def _search(folder: str) -> None:
    """Let modules of a folder be imported, after all others."""
    if folder not in sys.path:
        sys.path.append(folder)


def _check_own(name: str, module: ModuleType) -> None:
    from msdspn_jax.training.config import TrainConfig

    config_type = getattr(module, "Config", None)
    is_config = isinstance(config_type, type) and issubclass(config_type, TrainConfig)
    if not is_config or not callable(getattr(module, "build", None)):
        raise UserError(
            f"{name}: expected a class Config, derived from msdspn_jax.training.config.TrainConfig,"
            " and a function build(config) -> Task"
        )
