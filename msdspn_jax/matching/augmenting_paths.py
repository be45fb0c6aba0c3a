"""Shortest augmenting paths made of array operations: a whole batch of sets in lock-step."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

UNMATCHED = -1
"""The assignment of a row that takes no part, or for which there are not enough columns."""

# On a CPU some numbers of sets are slow in lock-step: 16 of 64 to 512 elements take twice as long
# as two lots of 8, in arrays of the same layout, and from 512 elements on lots of 4 are fastest.
# Measured (experiments/benchmarks/NOTES.md); why is not known.
_PIECE, _WHOLE_FROM = 8, 32
_LARGE, _PIECE_OF_LARGE = 512 * 512, 4


def shortest_augmenting_paths(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
) -> Int[Array, "batch m"]:
    """Return the row of every column, or -1; no more rows than columns may take part.

    Jonker and Volgenant's algorithm (Computing 38, 1987; in the form of Crouse, IEEE TAES 52,
    2016): rows enter one by one, each along the shortest path (Dijkstra, on costs reduced by the
    columns' prices v) to a free column, after which the rows on the path change columns. Costs must
    be finite, and so small that 8 max(n, m) times the largest is: with an infinite price the loop
    might not end.

    Every set runs through this as a machine of its own: in one turn of the loop it either scans
    one row (search) or changes one row's column (walk back). So the loop takes as many turns as the
    slowest *set* needs in all, not the sum over rows of the slowest set's turns for each row. The
    batch is the last axis, which makes minima over columns elementwise operations.
    """
    piece = _piece(*cost.shape)
    if piece is None:
        return _in_lock_step(cost, row_mask, column_mask)
    return jax.lax.platform_dependent(
        cost, row_mask, column_mask, cpu=partial(_in_pieces, piece), default=_in_lock_step
    )


def _piece(batch: Any, n: Any, m: Any) -> int | None:
    """How many sets to take at once on a CPU; None for all."""
    # A batch of unknown size, as in `jax.export`, has no pieces of known size.
    if not isinstance(batch, int):
        return None
    if n * m >= _LARGE:
        return _PIECE_OF_LARGE if batch > _PIECE_OF_LARGE else None
    return _PIECE if _PIECE < batch < _WHOLE_FROM else None


def _in_pieces(piece: int, *arrays: Any) -> Int[Array, "batch m"]:
    batch, _, m = arrays[0].shape

    def cut(array: Array) -> Array:
        # What is filled up with has costs of zero, or takes no part.
        filled = jnp.pad(array, [(0, -batch % piece)] + [(0, 0)] * (array.ndim - 1))
        return filled.reshape(-1, piece, *array.shape[1:])

    found = jax.lax.map(lambda piece: _in_lock_step(*piece), jax.tree.map(cut, arrays))
    return found.reshape(-1, m)[:batch]


def _in_lock_step(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
) -> Int[Array, "batch m"]:
    batch, n, m = cost.shape
    # Rows of costs are fetched from memory where each is in one piece.
    rows_of_all = cost.reshape(batch * n, m)
    column_index = jnp.arange(m, dtype=jnp.int32)[:, None]
    batch_index = jnp.arange(batch)
    infinity = jnp.asarray(jnp.inf, cost.dtype)
    closed = jnp.zeros((m, batch), bool) if column_mask is None else ~column_mask.T
    waiting = jnp.ones((n, batch), bool) if row_mask is None else row_mask.T
    price = jnp.zeros_like(cost[:, 0].T)
    row_of = jnp.full_like(price, UNMATCHED, dtype=jnp.int32)
    if n == m and row_mask is None and column_mask is None:
        # Where every column ends up matched, prices may start anywhere. At the cheapest row of each
        # column, no reduced cost is negative, and a row that is the cheapest of some column may
        # have it: what is left to search for is the conflicts.
        price, row_of, waiting = _cheapest_rows(cost)
    # next_row[i]: the first row after i that waits to be matched, n if there is none.
    index = jnp.where(waiting, jnp.arange(n, dtype=jnp.int32)[:, None], n)
    ahead = jax.lax.cummin(index, axis=0, reverse=True)
    next_row = jnp.concatenate([ahead[1:], jnp.full((1, batch), n, jnp.int32)])
    first_row = ahead[0]

    def any_left(state: dict[str, Any]) -> Array:
        return jnp.any(state["root"] < n)

    def turn(state: dict[str, Any]) -> dict[str, Any]:
        root, row, column, fresh = state["root"], state["row"], state["column"], state["fresh"]
        active = root < n
        walking = active & state["walking"]
        searching = active & ~state["walking"]
        at_column = column_index == column

        # Search: relax all columns from `row`, then take the nearest one that is not scanned yet.
        # While a set walks back, or is done, its row may be none; what is fetched is not used then.
        index = (batch_index * n + jnp.clip(row, 0, n - 1)).astype(jnp.uint32)
        reduced = rows_of_all.at[index].get(mode="promise_in_bounds").T - state["price"]
        offset = jnp.sum(jnp.where(at_column, reduced, 0), axis=0) - state["nearest"]
        candidate = reduced - jnp.where(fresh, 0, offset)
        scanned = (state["scanned"] & ~fresh) | closed
        distance = jnp.where(fresh, infinity, state["distance"])
        shorter = searching & ~scanned & (candidate < distance)
        distance = jnp.where(shorter, candidate, distance)
        via = jnp.where(shorter, row, state["via"])
        reachable = jnp.where(scanned, infinity, distance)
        nearest = jnp.min(reachable, axis=0)
        # Among the nearest, free columns come first: they end the search.
        order = column_index + jnp.where(state["row_of"] < 0, 0, m)
        pick = jnp.min(jnp.where(reachable == nearest, order, 2 * m), axis=0)
        is_free = pick < m
        picked = jnp.where(is_free, pick, pick - m)
        is_picked = column_index == picked
        scanned = jnp.where(searching, scanned | is_picked, state["scanned"])
        found = searching & is_free
        price = state["price"] + jnp.where(found & scanned & ~closed, distance - nearest, 0)
        owner = jnp.max(jnp.where(is_picked, state["row_of"], -1), axis=0)

        # Walk back: `column` goes to the row it was reached from, which frees that row's column.
        taker = jnp.max(jnp.where(at_column, state["via"], -1), axis=0)
        freed = jnp.min(jnp.where(state["row_of"] == taker, column_index, m), axis=0)
        row_of = jnp.where(walking & at_column, taker, state["row_of"])
        arrived = walking & (taker == root)
        next_root = next_row[jnp.minimum(root, n - 1), batch_index]
        root = jnp.where(arrived, next_root, root)
        return {
            "root": root,
            "row": jnp.where(searching, owner, jnp.where(arrived, root, row)),
            "column": jnp.where(searching, picked, freed),
            "walking": jnp.where(searching, found, walking & ~arrived),
            "fresh": arrived,
            "nearest": jnp.where(searching, nearest, state["nearest"]),
            "price": price,
            "distance": distance,
            "via": via,
            "scanned": scanned,
            "row_of": row_of,
        }

    # Built from `cost`, so that under shard_map they vary over the same mesh axes as it does.
    zeros = jnp.zeros_like(price[0])
    no_index = jnp.zeros_like(zeros, dtype=jnp.int32)
    none = jnp.zeros_like(zeros, dtype=bool)
    state = {
        "root": first_row + no_index,
        "row": first_row + no_index,
        "column": no_index,
        "walking": none,
        "fresh": ~none,
        "nearest": zeros,
        "price": price,
        "distance": jnp.full_like(price, infinity),
        "via": jnp.zeros_like(row_of),
        "scanned": jnp.zeros_like(row_of, dtype=bool),
        "row_of": row_of,
    }
    return jax.lax.while_loop(any_left, turn, state)["row_of"].T


def _cheapest_rows(
    cost: Float[Array, "batch n m"],
) -> tuple[Float[Array, "m batch"], Int[Array, "m batch"], Bool[Array, "n batch"]]:
    """The lowest cost of every column, the row that has it if no earlier column took it, and the
    rows that are left.
    """
    batch, n, m = cost.shape
    column_index = jnp.arange(m, dtype=jnp.int32)
    row_index = jnp.arange(n, dtype=jnp.int32)[:, None]
    price = jnp.min(cost, axis=1)
    # What `argmin` gives, as a minimum of whole numbers: four times as fast on a CPU.
    cheapest = jnp.min(jnp.where(cost == price[:, None], row_index, n), axis=1)
    batch_index = jnp.arange(batch)[:, None]
    first = jnp.full_like(cheapest, m, shape=(batch, n)).at[batch_index, cheapest].min(column_index)
    row_of = jnp.where(first[batch_index, cheapest] == column_index, cheapest, UNMATCHED)
    return price.T, row_of.T, (first == m).T
