"""Command lines of dataclasses: every field a flag, the text below it its help."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from msdspn_jax.errors import UserError

Options = TypeVar("Options")

REGISTRY = ConstructorRegistry()

_being_specified: set[Any] = set()


@REGISTRY.struct_rule
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
        instantiate=in_words(spec.instantiate), fields=tuple(map(_documented, spec.fields))
    )


def _documented(field: StructFieldSpec) -> StructFieldSpec:
    def text() -> str:
        found = field.helptext() if callable(field.helptext) else field.helptext
        return " ".join((found or "").split())

    kind = field.type
    if field.default is None or field.default == ():
        # What it stands for says the text.
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    return dataclasses.replace(field, helptext=text, type=kind)


def in_words(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but a wrong value is an error of the command line."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    return checked


def parse(
    kind: type[Options],
    argv: list[str],
    *,
    prog: str,
    description: str | None = None,
    default: Options | None = None,
) -> Options:
    """What ``argv`` asks for. Shows help, or which flag there is not, and exits where it must.

    Args:
        kind: a dataclass.
        argv: the flags.
        prog: the command, for the help text.
        description: of the help, its lines as they are. Default: the docstring of ``kind``, each
            paragraph filled.
        default: values of the flags that are not given. Default: those of ``kind``.

    Raises:
        UserError: values that do not go together.
    """
    return _cli(kind, argv, prog=prog, description=description, default=default)


def parse_one_of(kinds: Any, argv: list[str], *, prog: str, description: str) -> Any:
    """The same for a union of dataclasses, of which the first word names one."""
    return _cli(kinds, argv, prog=prog, description=description)


def parse_known(kind: type[Options], argv: list[str], *, prog: str) -> tuple[Options, list[str]]:
    """The same, and the words that are no flags of ``kind``."""
    return _cli(kind, argv, prog=prog, return_unknown_args=True)


def _cli(
    kind: Any, argv: list[str], *, prog: str, description: str | None = None, **settings: Any
) -> Any:
    with REGISTRY:
        return tyro.cli(
            kind,
            prog=prog,
            args=argv,
            description=None if description is None else inspect.cleandoc(description),
            # That None is the default says the help; nobody needs to type it.
            config=(tyro.conf.DisallowNone,),
            **settings,
        )
