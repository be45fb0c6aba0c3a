"""Random sets: n vectors from N(0, I_d) (paper, section 4.2).

A fixed data set is never stored: set i is drawn from ``fold_in(key, i)`` whenever it is needed.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int, Key


def draw_sets(keys: Key[Array, " batch"], *, n: int, d: int) -> Float[Array, "batch n d"]:
    """One set a key; the same key gives the same set."""
    if n < 1 or d < 1:
        raise ValueError(f"n and d must be at least 1, got {n} and {d}")
    return jax.vmap(lambda key: jax.random.normal(key, (n, d)))(keys)


def indexed_sets(
    key: Key[Array, ""], indices: Int[Array, " batch"], *, n: int, d: int
) -> Float[Array, "batch n d"]:
    """The sets at ``indices`` of the endless data set that ``key`` stands for."""
    return draw_sets(jax.vmap(lambda i: jax.random.fold_in(key, i))(indices), n=n, d=d)
