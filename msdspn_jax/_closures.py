"""Functions that close over arrays, taken apart: what they compute, and those arrays."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.extend import core

from msdspn_jax import _check


@dataclass(frozen=True, eq=False)
class Opened:
    """A traced function whose closed-over arrays have become its first argument.

    Two are equal if they compute the same, whatever arrays they are given. So a program compiled
    for one of them serves the other, and does not hold on to arrays or to Python numbers of a
    moment when they were others.
    """

    jaxpr: Any
    spelling: str
    """What it computes: operations, shapes, Python numbers; no array."""
    function: Any = None
    """The function itself where its spelling does not say all, else None."""

    def __call__(self, hidden: Any, *args: Any) -> jax.Array:
        """The function's only result, with `hidden` as what it closes over."""
        closed = core.ClosedJaxpr(self.jaxpr, hidden)
        return core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opened) or self.spelling != other.spelling:
            return False
        return self.function is other.function or _equal(self.function, other.function)

    def __hash__(self) -> int:
        return hash(self.spelling)


def opened(function: Callable[..., jax.Array], *examples: Any) -> tuple[Opened, list[Any]]:
    """A function taken apart, for arguments like these: the rest of it, and what it closes over.

    It is traced anew at each call, since what it closes over may have changed.
    """
    closed = jax.make_jaxpr(lambda *args: function(*args))(*examples)
    return Opened(closed.jaxpr, "", function), closed.consts


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """A function with what it closes over as its first argument, and that."""
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*examples)
    tree = jax.tree.structure(shape)

    def explicit(hidden, *args):
        whole = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, hidden))
        return jax.tree.unflatten(tree, whole(*jax.tree.leaves(args)))

    return explicit, closed.consts


def spelled(function: Callable[..., jax.Array], *examples: Any) -> tuple[Opened, list[Any]] | None:
    """As `opened`, to be compared with others; None if that cannot be.

    A function that holds a `jax.jit` of its own with arrays in it cannot.
    """
    rest, hidden = opened(function, *examples)
    equations = list(_equations(rest.jaxpr))
    for equation in equations:
        inner = [x for x in _parts(equation.params) if isinstance(x, core.ClosedJaxpr)]
        arrays = [x for x in equation.invars if isinstance(x, core.Literal) and np.ndim(x.val)]
        if arrays or any(closed.consts for closed in inner):
            return None
    # The rule of a custom derivative, and what is called back on the host, are no part of it.
    names = [equation.primitive.name for equation in equations]
    unseen = ("custom", "callback", "linear_call")
    whole = not any(word in name for name in names for word in unseen)
    return Opened(rest.jaxpr, str(rest.jaxpr), None if whole else function), hidden


def holds_tracer(value: Any, *, depth: int = 8) -> bool:
    """Whether a tracer is in a value, or in what its functions close over."""
    if _check.is_traced(value):
        return True
    if depth == 0:
        return False
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, tuple | list):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    else:
        # Of a name that is not bound yet the cell is empty.
        cells = getattr(value, "__closure__", None) or ()
        parts = [cell.cell_contents for cell in cells if cell != types.CellType()]
    return any(holds_tracer(part, depth=depth - 1) for part in parts)


_LIBRARIES = {"flax", "jax", "jaxlib", "ml_dtypes", "msdspn_jax", "numpy", "optax"}
#: Functions of theirs check the types of another's arguments, and call it.
_CHECKERS = {"beartype", "jaxtyping"}
#: Classes in it are made of the user's own.
_TRANSFORMS = "flax.linen.transforms"


def is_fixed(value: Any, *, depth: int = 16) -> bool:
    """Whether something computes the same for ever, being made of values that do not change.

    True of numbers, words and dtypes, and of functions, frozen dataclasses and flax modules of the
    libraries, if all that they hold is fixed. What the user wrote may use what the user changes.
    """
    if value is None or isinstance(value, str | int | float | complex | enum.Enum | np.dtype):
        return True
    if depth == 0:
        return False
    module = getattr(value if isinstance(value, type) else type(value), "__module__", "")
    if isinstance(value, nn.Module):
        own = module == _TRANSFORMS or module.split(".")[0] not in _LIBRARIES
        # What it is a part of holds more than it, and is no part of what it does.
        names = {field.name for field in dataclasses.fields(value)} - {"parent"}
        parts = None if own else [getattr(value, name) for name in names]
    elif isinstance(value, tuple | list):
        parts = list(value)
    elif isinstance(value, dict | types.MappingProxyType):
        parts = list(value.values())
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__self__]
    elif dataclasses.is_dataclass(value) and module.startswith("msdspn_jax."):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif inspect.isfunction(value):
        # Where it was written, which a decorator does not hide.
        home = str(value.__globals__.get("__name__")).split(".")[0]
        checked = getattr(value, "__wrapped__", None) if home in _CHECKERS else None
        if checked is not None:
            parts = [checked]
        else:
            cells = value.__closure__ or ()
            held = [cell.cell_contents for cell in cells if cell != types.CellType()]
            parts = held if home in _LIBRARIES else None
    elif callable(value):  # A class too, such as jnp.float32; what jit made has its function's.
        library = str(getattr(value, "__module__", "")).split(".")[0] in _LIBRARIES
        parts = [] if library else None
    else:
        parts = None
    return parts is not None and all(is_fixed(part, depth=depth - 1) for part in parts)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for part in _parts(equation.params):
            yield from _equations(getattr(part, "jaxpr", part))


def _parts(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield part


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # A comparison of the user's, such as one of arrays.
        return False
