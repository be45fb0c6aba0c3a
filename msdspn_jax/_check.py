"""Argument checks shared by the public functions.

Every message names the argument, says what was expected and what came. Shapes are static, so these
checks cost nothing inside `jax.jit`; values are looked at only where they are concrete.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

AnyArray = jax.Array | np.ndarray
"""What the public functions take, as in ``Float[AnyArray, "batch n d"]``; they return JAX's."""


def is_traced(array: Any) -> bool:
    """True while `array` is a tracer: its shape is known, its values are not."""
    return isinstance(array, jax.core.Tracer)


def _shape(name: str, array: Any) -> tuple[Any, ...]:  # Not always integers: jax.export.
    if isinstance(array, list | tuple):
        kind = type(array).__name__
        raise TypeError(f"{name}: expected an array, got a {kind}; jnp.asarray makes one of it")
    return jnp.shape(array)


def require_rank(name: str, array: Any, rank: int, axes: str) -> None:
    """Refuse an array whose number of axes is not `rank`; `axes` spells them, as in "batch n d"."""
    shape = _shape(name, array)
    if len(shape) != rank:
        raise ValueError(f"{name}: expected {rank} axes [{axes}], got shape {shape}")


def require_nonempty(name: str, array: Any, axes: str) -> None:
    """Refuse an array with an axis of length zero."""
    shape = _shape(name, array)
    if 0 in shape:
        raise ValueError(f"{name}: expected every axis of [{axes}] > 0, got shape {shape}")


def require_shape(name: str, array: Any, expected: tuple[Any, ...], axes: str) -> None:
    """Refuse an array whose shape is not `expected`."""
    shape = _shape(name, array)
    if shape != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} [{axes}], got {shape}")


def require_floating(name: str, array: Any) -> None:
    """Refuse integers and booleans where a derivative is to be taken."""
    _shape(name, array)
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating-point array, got dtype {dtype}")


def require_mask(name: str, array: Any, expected: tuple[Any, ...], axes: str) -> None:
    """Refuse a mask of another shape, and one that is not of booleans."""
    require_shape(name, array, expected, axes)
    dtype = jnp.result_type(array)
    if dtype != jnp.bool_:
        raise TypeError(f"{name}: expected booleans, got dtype {dtype}")


def require_finite(name: str, tree: Any) -> None:
    """Refuse NaN and infinity in concrete floating-point arrays; traced ones pass unseen."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf is None or is_traced(leaf) or not hasattr(leaf, "dtype"):
            continue
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            if isinstance(leaf, np.ndarray):
                bad = int(np.sum(~np.isfinite(leaf)))
            else:
                with jax.ensure_compile_time_eval():
                    bad = int(jnp.sum(~jnp.isfinite(leaf)))
            if bad:
                where = name + jax.tree_util.keystr(path)
                raise ValueError(
                    f"{where}: expected finite values, got {bad} non-finite of {leaf.size} "
                    f"in an array of shape {leaf.shape}"
                )


def require_arrays(name: str, tree: Any) -> None:
    """Refuse leaves that are no arrays or numbers, such as functions: JAX would trace them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, bool | int | float | complex) and not hasattr(leaf, "dtype"):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(
                f"{where}: expected an array, got {type(leaf).__name__}; split what is not an "
                "array off first (equinox.partition(model, equinox.is_array), nnx.split) and let "
                "the energy put it back"
            )


def require_steps(name: str, value: Any) -> None:
    """Refuse what is no number of steps: an integer ≥ 1, or an integer array without axes."""
    array = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer)
    if not (array and value.shape == () and (is_traced(value) or value >= 1)):
        require_integer(name, value, 1)


def require_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is no Python integer ≥ `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def require_number(name: str, value: Any, valid: Callable[[Any], bool], what: str) -> None:
    """Refuse what is no number, what is traced, and what is not `valid`, spelled by `what`."""
    if is_traced(value):
        raise TypeError(f"{name}: expected a Python number, got a traced one, {value}")
    scalar = isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    if isinstance(value, bool) or not (scalar or isinstance(value, int | float | np.number)):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if not valid(value):
        raise ValueError(f"{name}: expected {what}, got {value!r}")


def require_positive(name: str, value: Any) -> None:
    """Refuse what is no number > 0, such as NaN."""
    require_number(name, value, lambda x: x > 0, "a number > 0")


def require_nonnegative(name: str, value: Any) -> None:
    """Refuse what is no finite number ≥ 0."""
    require_number(name, value, lambda x: 0 <= x < float("inf"), "a number >= 0")


def require_momentum(value: Any) -> None:
    """Refuse what is no number in [0, 1)."""
    require_number("momentum", value, lambda x: 0 <= x < 1, "a number in [0, 1)")


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not among `choices`."""
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def lookup(name: str, value: Any, table: Mapping[str, T] | Mapping[str, Callable]) -> Any:
    """`table[value]`, or an error that lists what there is."""
    require_choice(name, value, table)
    return table[value]
