"""Vectors as tuples ``(x, y, z)`` of arrays rather than arrays with a last axis of three.

Every formula is then elementwise, and XLA fuses a whole intersection into one loop over rays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from msdspn_jax._check import AnyArray

Vec = tuple[Any, Any, Any]
"""x, y and z: arrays (or numbers) that broadcast."""


def add(a: Vec, b: Vec) -> Vec:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def sub(a: Vec, b: Vec) -> Vec:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def scale(a: Vec, s) -> Vec:
    return a[0] * s, a[1] * s, a[2] * s


def dot(a: Vec, b: Vec) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vec, b: Vec) -> Vec:
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


def normalise(a: Vec) -> Vec:
    return scale(a, jax.lax.rsqrt(jnp.maximum(dot(a, a), 1e-20)))


def where(condition, a: Vec, b: Vec) -> Vec:
    x, y, z = (jnp.where(condition, p, q) for p, q in zip(a, b, strict=True))
    return x, y, z


def vec(values) -> Vec:
    """Three values, or the rows of an array, as a vector."""
    x, y, z = values
    return x, y, z


def unstack(a: Float[AnyArray, "*batch 3"]) -> Vec:
    """An array with a last axis of three as a vector."""
    return a[..., 0], a[..., 1], a[..., 2]
