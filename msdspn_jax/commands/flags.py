"""Command-line flags of a configuration."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from msdspn_jax import _options
from msdspn_jax.adjoints import Adjoint, parse_adjoint
from msdspn_jax.errors import UserError
from msdspn_jax.training import legacy
from msdspn_jax.training.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


@_options.REGISTRY.primitive_rule
def _adjoint(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """An adjoint is one word, such as neumann:3."""
    if info.type is not Adjoint:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="ADJOINT",
        instance_from_str=_options.in_words(lambda words: parse_adjoint(words[0])),
        is_instance=lambda value: hasattr(value, "wrap"),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    config_type: type[Config],
    argv: list[str],
    *,
    prog: str,
    description: str | None = None,
    default: Any = None,
) -> Config:
    """The configuration that ``argv`` asks for.

    Shows help, or which flag there is not, and exits where there is reason to.

    Args:
        config_type: a task's ``Config``.
        argv: the flags.
        prog: the command, for the help text.
        description: of the help. Default: the docstring of ``config_type``.
        default: values of the flags that are not given. Default: those of ``config_type``.

    Raises:
        UserError: values that do not go together, or a flag of version 0.1.0 that has another name
            now.
    """
    _refuse_renamed(config_type, argv)
    return _options.parse(config_type, argv, prog=prog, description=description, default=default)


def _refuse_renamed(config_type: type[Any], argv: list[str]) -> None:
    own = {field.name for field in dataclasses.fields(config_type)}
    for word in argv:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        now = legacy.flag_now(name)
        if word.startswith("--") and name not in own and now is not None:
            raise UserError(f"{word.split('=')[0]}: expected its name since version 0.2, {now}")
