"""Shortest augmenting paths as one GPU kernel: each program solves the assignment of one set.

The solver made of array operations (`matching.augmenting_paths`) costs a GPU a few kernel launches
a turn of its loop, and all sets wait for the slowest. Here a program holds the state of its set
(prices, distances, the row of every column: vectors of length m) in registers, fetches one row of
costs a turn from memory, and ends when its own set is solved.

Written with Pallas for its Triton backend (NVIDIA and AMD), which JAX 0.11 still has, but calls
deprecated; its successor there, Mosaic GPU, is for NVIDIA alone. Interpreted in the tests.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from msdspn_jax.matching import augmenting_paths
from msdspn_jax.matching.augmenting_paths import UNMATCHED


def shortest_augmenting_paths(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
    *,
    interpret: bool = False,
) -> Int[Array, "batch m"]:
    """Return the row of every column, or -1; no more rows than columns may take part.

    Args:
        cost: finite, and so small that 8 max(n, m) times the largest is.
        row_mask: rows that take part. Default: all.
        column_mask: columns that take part. Default: all.
        interpret: run as ordinary array operations, on any backend; slow, for tests.
    """
    batch, n, m = cost.shape
    # Where every column ends up matched, prices may start anywhere, and so at the column minima.
    reduce_columns = n == m and row_mask is None and column_mask is None
    rows = jnp.ones((batch, n), bool) if row_mask is None else row_mask
    columns = jnp.ones((batch, m), bool) if column_mask is None else column_mask
    # Triton's vectors have a power of two of entries; the added columns take no part.
    width = pl.next_power_of_2(m)
    extra = ((0, 0), (0, width - m))
    cost = jnp.pad(cost, ((0, 0), *extra))
    # Derived from `cost`, so that under shard_map it varies over the same mesh axes.
    result = jax.eval_shape(lambda cost: jnp.zeros_like(cost[:, 0], dtype=jnp.int32), cost)
    row_of = pl.pallas_call(
        functools.partial(_solve_one_set, reduce_columns=reduce_columns),
        grid=(batch,),
        in_specs=[
            pl.BlockSpec((1, n, width), lambda i: (i, 0, 0)),
            pl.BlockSpec((1, n), lambda i: (i, 0)),
            pl.BlockSpec((1, width), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((1, width), lambda i: (i, 0)),
        out_shape=result,
        # Every turn is a few reductions over the columns: within one warp they need no barrier.
        compiler_params=triton.CompilerParams(num_warps=min(8, max(1, width // 128)), num_stages=1),
        interpret=interpret,
        name="shortest_augmenting_paths",
    )(
        cost,
        rows.astype(jnp.int32),
        jnp.pad(columns.astype(jnp.int32), extra),
    )
    return row_of[:, :m]


def by_platform(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
) -> Int[Array, "batch m"]:
    """Use the kernel on a GPU, array operations elsewhere, decided when the program is lowered."""
    return lax.platform_dependent(
        cost,
        row_mask,
        column_mask,
        cuda=shortest_augmenting_paths,
        rocm=shortest_augmenting_paths,
        default=augmenting_paths.shortest_augmenting_paths,
    )


class _Search(NamedTuple):
    """Dijkstra's search from one row, on costs reduced by the prices."""

    turn: Int[Array, ""]
    row: Int[Array, ""]  # scanned next
    column: Int[Array, ""]  # picked last; of `row`, but for the first row
    searching: Bool[Array, ""]  # until that column is free
    nearest: Float[Array, ""]  # its distance
    scanned: Int[Array, " m"]  # 1: at its final distance, or takes no part
    distance: Float[Array, " m"]
    via: Int[Array, " m"]  # the row that a column was reached from


def _solve_one_set(cost_ref, rows_ref, columns_ref, row_of_ref, *, reduce_columns: bool) -> None:
    _, n, m = cost_ref.shape
    dtype = cost_ref.dtype
    index = lax.iota(jnp.int32, m)
    open_ = columns_ref[0, :]
    infinity = jnp.full((m,), jnp.inf, dtype)
    unmatched = jnp.full((m,), UNMATCHED, jnp.int32)

    def entry(vector, column, nothing):
        """vector[column]: registers cannot be indexed."""
        return jnp.max(jnp.where(index == column, vector, nothing))

    def match_row(root, state):
        price, row_of = state
        skipped = (rows_ref[0, root] == 0) | (jnp.max(jnp.where(row_of == root, 1, 0)) == 1)

        def search_on(s: _Search):
            # No more than m turns, whatever comes: a kernel that hangs cannot be interrupted.
            return s.searching & (s.turn < m)

        def scan(s: _Search) -> _Search:
            reduced = cost_ref[0, s.row, :] - price
            offset = jnp.where(s.turn == 0, 0, entry(reduced, s.column, -jnp.inf) - s.nearest)
            candidate = reduced - offset
            shorter = (s.scanned == 0) & (candidate < s.distance)
            distance = jnp.where(shorter, candidate, s.distance)
            via = jnp.where(shorter, s.row, s.via)
            reachable = jnp.where(s.scanned == 0, distance, infinity)
            nearest = jnp.min(reachable)
            # Among the nearest, free columns come first: they end the search.
            order = jnp.where(row_of < 0, index, index + m)
            pick = jnp.min(jnp.where(reachable == nearest, order, 2 * m))
            column = jnp.where(pick < m, pick, pick - m)
            return _Search(
                turn=s.turn + 1,
                row=jnp.maximum(entry(row_of, column, UNMATCHED), 0),
                column=column,
                searching=pick >= m,
                nearest=nearest,
                scanned=jnp.where(index == column, 1, s.scanned),
                distance=distance,
                via=via,
            )

        end = lax.while_loop(
            search_on,
            scan,
            _Search(
                # Not `where(skipped, m, 0)`: Pallas lowers that choice to a boolean (JAX 0.10.2).
                turn=skipped.astype(jnp.int32) * m,
                row=root,
                column=jnp.int32(0),
                searching=jnp.bool_(True),
                nearest=jnp.zeros((), dtype),
                scanned=1 - open_,
                distance=infinity,
                via=jnp.zeros((m,), jnp.int32),
            ),
        )
        found = jnp.logical_not(end.searching)
        settled = found & (end.scanned == 1) & (open_ == 1)
        price = jnp.where(settled, price + (end.distance - end.nearest), price)

        def walk_on(state):
            return state[2]

        def change_column(state):
            # The column goes to the row it was reached from, which frees that row's column.
            row_of, column, _ = state
            taker = entry(end.via, column, UNMATCHED)
            freed = jnp.min(jnp.where(row_of == taker, index, m))
            return jnp.where(index == column, taker, row_of), freed, taker != root

        row_of, _, _ = lax.while_loop(walk_on, change_column, (row_of, end.column, found))
        return price, row_of

    def cheapest_row(row, state):
        price, cheapest = state
        costs = cost_ref[0, row, :]
        better = costs < price
        return jnp.where(better, costs, price), jnp.where(better, row, cheapest)

    def take_first(row, row_of):
        # The first of the columns whose cheapest row this is may have it.
        first = jnp.min(jnp.where((cheapest == row) & (open_ == 1), index, m))
        return jnp.where(index == first, row, row_of)

    price, row_of = jnp.zeros((m,), dtype), unmatched
    if reduce_columns:
        price, cheapest = lax.fori_loop(0, n, cheapest_row, (infinity, unmatched))
        price = jnp.where(open_ == 1, price, 0)
        row_of = lax.fori_loop(0, n, take_first, unmatched)
    _, row_of = lax.fori_loop(0, n, match_row, (price, row_of))
    row_of_ref[0, :] = row_of
