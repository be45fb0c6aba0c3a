"""Recipes: settings of an experiment in a small file of plain values.

``msdspn train clevr --recipe fast`` reads ``recipes/fast.toml`` beside the task's module; a path
reads any other file. A recipe names fields of the task's ``Config``, groups as tables. Flags that
are given beside it win.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from msdspn_jax.errors import UserError
from msdspn_jax.training.config import with_values


def names(module: ModuleType) -> list[str]:
    """The recipes that come with a task."""
    return sorted(path.stem for path in _folder(module).glob("*.toml"))


def read(module: ModuleType, recipe: str, *, default: Any = None) -> Any:
    """The configuration of a recipe: what the file says, and for the rest the default.

    Args:
        module: of the task, see `msdspn_jax.tasks.load`.
        recipe: one of `names`, or the path of a file that ends in .toml.
        default: a configuration. Default: the task's.

    Raises:
        UserError: no such recipe, or it does not fit the task.
    """
    path = Path(recipe) if recipe.endswith(".toml") else _folder(module) / f"{recipe}.toml"
    if not path.is_file():
        known = ", ".join(names(module)) or "none"
        raise UserError(
            f"--recipe: expected one of this task's ({known}) or a .toml file, got {recipe!r}"
        )
    try:
        return with_values(default or module.Config(), tomllib.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--recipe {recipe}: {error}") from error


def _folder(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__).parent / "recipes"
