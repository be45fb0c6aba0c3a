"""Command-line flags of a configuration, in groups that a reader can find their way in."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from functools import lru_cache
from typing import Annotated, Any

import tyro

from msdspn_jax.errors import UserError
from msdspn_jax.training.config import TrainConfig

# Flags of `TrainConfig` by what they are about; those that no group names come under "training".
GROUPS = {
    "run folder": (
        "run_dir",
        "resume",
        "allow_config_change",
        "checkpoint_every",
        "keep_checkpoints",
        "evaluate_every",
        "log_every",
        "figures_every",
        "tensorboard",
        "wandb",
        "progress",
    ),
    "safety": ("skip_bad_steps", "max_inner_energy"),
    "devices and machines": (
        "parallel",
        "steps_per_dispatch",
        "compilation_cache",
        "distributed",
        "coordinator",
        "num_processes",
        "process_id",
        "heartbeat_timeout",
    ),
}


def parse(
    config_type: type[TrainConfig], argv: list[str], *, prog: str, default: Any = None
) -> TrainConfig:
    """The configuration that ``argv`` asks for; shows help and exits where that is asked for.

    Args:
      config_type: a task's ``Config``.
      argv: the flags.
      prog: the command, for the help text.
      default: values of the flags that are not given. Default: those of ``config_type``.

    Raises:
      UserError: values that do not go together.
    """
    hints, helps = typing.get_type_hints(config_type), field_docs(config_type)
    members: dict[str, list[Any]] = {"this experiment": [], "training": []} | {
        group: [] for group in GROUPS
    }
    common = {f.name for f in dataclasses.fields(TrainConfig)}
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    for field in dataclasses.fields(config_type):
        own = field.name not in common
        group = "this experiment" if own else group_of.get(field.name, "training")
        hint = hints[field.name]
        note = tyro.conf.arg(help=helps.get(field.name, ""), metavar=_metavar(hint))
        value = field.default if default is None else getattr(default, field.name)
        members[group].append((field.name, Annotated[hint, note], dataclasses.field(default=value)))
    groups = []
    for title, fields in members.items():
        if fields:
            name = title.replace(" ", "_")
            group_type = dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)
            # An empty docstring would be replaced by the generated signature.
            group_type.__doc__ = " "
            groups.append((name, group_type, dataclasses.field(default_factory=group_type)))
    together = dataclasses.make_dataclass("Flags", groups)
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[together],  # type: ignore[valid-type]
        prog=prog,
        description=inspect.cleandoc(config_type.__doc__ or ""),
        args=argv,
    )
    values = {
        field.name: getattr(group, field.name)
        for group in (getattr(parsed, name) for name, *_ in groups)
        for field in dataclasses.fields(group)
    }
    try:
        return config_type(**values)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _metavar(hint: Any) -> str | None:
    """``INT`` for ``int | None``: that None is the default says the help."""
    if isinstance(hint, types.UnionType):
        names = [t for t in typing.get_args(hint) if t is not types.NoneType]
        if len(names) == 1 and isinstance(names[0], type):
            return names[0].__name__.upper()
    return None


@lru_cache
def field_docs(config_type: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of those it inherits from."""
    docs: dict[str, str] = {}
    for owner in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
