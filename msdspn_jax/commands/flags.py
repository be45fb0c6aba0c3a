"""Command-line flags of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from msdspn_jax.adjoints import Adjoint, parse_adjoint
from msdspn_jax.errors import UserError
from msdspn_jax.training import legacy
from msdspn_jax.training.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _adjoint(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """An adjoint is one word, such as neumann:3."""
    if info.type is not Adjoint:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="ADJOINT",
        instance_from_str=_in_words(lambda words: parse_adjoint(words[0])),
        is_instance=lambda value: hasattr(value, "wrap"),
        str_from_instance=lambda value: [str(value)],
    )


_being_specified: set[Any] = set()


@_REGISTRY.struct_rule
def _group(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro takes it, except that help is a paragraph and an error a line."""
    if not dataclasses.is_dataclass(info.type) or info.type in _being_specified:
        return None
    _being_specified.add(info.type)
    try:
        spec: Any = ConstructorRegistry.get_struct_spec(info)
    finally:
        _being_specified.discard(info.type)
    return StructConstructorSpec(
        instantiate=_in_words(spec.instantiate), fields=tuple(map(_documented, spec.fields))
    )


def _documented(field: StructFieldSpec) -> StructFieldSpec:
    def text() -> str:
        found = field.helptext() if callable(field.helptext) else field.helptext
        return " ".join((found or "").split())

    kind = field.type
    if field.default is None:
        # What None stands for says the text.
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    return dataclasses.replace(field, helptext=text, type=kind)


def _in_words(make: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    return checked


def parse(config_type: type[Config], argv: list[str], *, prog: str, default: Any = None) -> Config:
    """The configuration that ``argv`` asks for.

    Shows help, or which flag there is not, and exits where there is reason to.

    Args:
        config_type: a task's ``Config``.
        argv: the flags.
        prog: the command, for the help text.
        default: values of the flags that are not given. Default: those of ``config_type``.

    Raises:
        UserError: values that do not go together, or a flag of version 0.1.0 that has another name
            now.
    """
    _refuse_renamed(config_type, argv)
    with _REGISTRY:
        return tyro.cli(
            config_type,
            prog=prog,
            args=argv,
            default=default,
            # That None is the default says the help; nobody needs to type it.
            config=(tyro.conf.DisallowNone,),
        )


def _refuse_renamed(config_type: type[Any], argv: list[str]) -> None:
    own = {field.name for field in dataclasses.fields(config_type)}
    for word in argv:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        now = legacy.flag_now(name)
        if word.startswith("--") and name not in own and now is not None:
            raise UserError(f"{word.split('=')[0]}: expected its name since version 0.2, {now}")
