"""Optimal assignment between two sets, for a whole batch at once and exactly.

Losses on sets pair every predicted element with one target so that the summed cost is least. Doing
this inside a compiled training step needs a solver made of array operations: :func:`assign` is
one, and is useful outside this library too.

>>> import jax.numpy as jnp
>>> cost = jnp.array([[[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]])  # [batch, n, m]
>>> assign(cost)
Array([[1, 0, 2]], dtype=int32)
>>> matched_cost(cost, assign(cost))
Array([5.], dtype=float32)
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, Protocol, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

UNMATCHED = -1
"""The assignment of a row that takes no part, or for which there are not enough columns."""

INVALID = int(np.iinfo(np.int32).min)
"""The assignment of every row of a set whose cost is not finite, under ``jit``. The value is far
out of range on purpose: ``jnp.take_along_axis`` with it gives NaN, not somebody else's element."""

Method = Literal["auto", "device", "pallas", "optax", "host"]
Mask = Bool[Array, "*batch n"] | tuple[Bool[Array, "*batch n"], Bool[Array, "*batch m"]]


def assign(
    cost: Float[Array, "*batch n m"],
    *,
    mask: Mask | None = None,
    method: Method = "auto",
) -> Int[Array, "*batch n"]:
    """Return for every row the column it is matched to, so that the total cost is minimal.

    Each column is used at most once, and ``min(n, m)`` pairs are made (of the rows and columns that
    take part, if there is a mask). The result is piecewise constant in the cost, so no gradient
    flows through it: differentiate the cost of the matched pairs, see :func:`matched_cost`.

    Args:
      cost: finite costs, of any sign. Computed in float32 where given in less.
      mask: which rows and columns take part: a pair of boolean arrays ``[*batch, n]`` and
        ``[*batch, m]``, or one array for both where ``n == m``.
      method: ``"device"``: shortest augmenting paths, the whole batch in lock-step, any backend,
        under ``jit``. ``"pallas"``: the same algorithm as one kernel, with one set a program, on an
        NVIDIA or AMD GPU (not yet run on one); elsewhere ``"device"``. ``"optax"``:
        ``optax.assignment.hungarian_algorithm`` mapped over the batch (no mask). ``"host"``: SciPy,
        for concrete arrays only. ``"auto"``: ``"host"`` for concrete arrays on a CPU where it is
        faster, otherwise ``"device"``.

    Returns:
      int32 column indices in row order. ``UNMATCHED`` (-1) for a row left over. Where ``cost`` is
      not finite (of a pair that takes part): ``ValueError`` for concrete arrays; under ``jit``,
      ``INVALID`` for every row of that set, of which :func:`matched_cost` makes NaN.
    """
    cost = _checked_cost(cost)
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    row_mask, column_mask = _checked_masks(mask, batch, n, m)
    concrete = not any(isinstance(x, jax.core.Tracer) for x in (cost, row_mask, column_mask))
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if method == "optax" and mask is not None:
        raise ValueError("method='optax' takes no mask; use method='device'.")
    if method == "host" and not concrete:
        raise ValueError(
            "method='host' needs concrete arrays, and cost or mask is being traced (jit, vmap, "
            "grad or scan); use method='device' there."
        )
    if concrete:
        _raise_if_not_finite(cost, row_mask, column_mask)
    if method == "auto":
        method = _choose(cost, concrete)
    if method == "host":
        return _assign_on_host(cost, row_mask, column_mask)

    cost = jax.lax.stop_gradient(cost)
    sets = math.prod(batch)
    flat = jnp.reshape(cost, (sets, n, m))
    rows = None if row_mask is None else jnp.reshape(row_mask, (sets, n))
    columns = None if column_mask is None else jnp.reshape(column_mask, (sets, m))
    if method == "optax":
        assignment = _assign_with_optax(flat)
    else:
        paths = _paths_by_kernel if method == "pallas" else _shortest_augmenting_paths
        assignment = _assign_on_device(flat, rows, columns, paths)
    return jnp.reshape(assignment, (*batch, n))


def matched_cost(
    cost: Float[Array, "*batch n m"], assignment: Int[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """Sum the cost of the matched pairs of every set; differentiable in ``cost``.

    Unmatched rows count nothing. A set whose assignment is ``INVALID`` gets NaN, so that whatever
    watches the loss sees that its cost was not finite.
    """
    chosen = assignment[..., None] == jnp.arange(cost.shape[-1], dtype=assignment.dtype)
    total = jnp.sum(jnp.where(chosen, cost, 0), axis=(-2, -1))
    return jnp.where(jnp.any(assignment == INVALID, axis=-1), jnp.nan, total)


# The batched solver -----------------------------------------------------------------------------


class _Paths(Protocol):
    """A solver where no more rows than columns take part: the row of every column, or -1."""

    def __call__(
        self,
        cost: Float[Array, "batch n m"],
        row_mask: Bool[Array, "batch n"] | None = None,
        column_mask: Bool[Array, "batch m"] | None = None,
    ) -> Int[Array, "batch m"]: ...


@functools.partial(jax.jit, inline=True, static_argnames="paths")
def _assign_on_device(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None,
    column_mask: Bool[Array, "batch m"] | None,
    paths: _Paths,
) -> Int[Array, "batch n"]:
    batch, n, m = cost.shape
    if batch == 0 or n == 0 or m == 0:
        return jnp.full((batch, n), UNMATCHED, jnp.int32)
    if row_mask is None and column_mask is None:
        valid = jnp.all(jnp.isfinite(cost), axis=(1, 2))
        cost = _conditioned(jnp.where(valid[:, None, None], cost, 0))
        if n <= m:
            assignment = _rows_of(paths(cost), n)
        else:
            assignment = paths(jnp.swapaxes(cost, 1, 2))
        return jnp.where(valid[:, None], assignment, INVALID)

    rows = jnp.ones((batch, n), bool) if row_mask is None else row_mask
    columns = jnp.ones((batch, m), bool) if column_mask is None else column_mask
    pairs = rows[:, :, None] & columns[:, None, :]
    valid = jnp.all(jnp.isfinite(cost) | ~pairs, axis=(1, 2))
    cost = _conditioned(jnp.where(pairs & valid[:, None, None], cost, 0))
    # Paths are grown from the smaller side of each set, so that no artificial costs are needed:
    # where more rows than columns take part, the set is transposed.
    side = max(n, m)
    cost = jnp.pad(cost, ((0, 0), (0, side - n), (0, side - m)))
    rows = jnp.pad(rows, ((0, 0), (0, side - n)))
    columns = jnp.pad(columns, ((0, 0), (0, side - m)))
    flip = jnp.sum(rows, axis=1) > jnp.sum(columns, axis=1)
    cost = jnp.where(flip[:, None, None], jnp.swapaxes(cost, 1, 2), cost)
    rows, columns = (
        jnp.where(flip[:, None], columns, rows),
        jnp.where(flip[:, None], rows, columns),
    )
    row_of = paths(cost, rows, columns)
    assignment = jnp.where(flip[:, None], row_of, _rows_of(row_of, side))[:, :n]
    return jnp.where(valid[:, None], assignment, INVALID)


def _conditioned(cost: Float[Array, "batch n m"]) -> Float[Array, "batch n m"]:
    """Scale huge costs down, so that sums of them stay finite; the optimum does not move."""
    peak = jnp.max(jnp.abs(cost), axis=(1, 2), keepdims=True)
    return cost * jnp.where(peak > jnp.sqrt(jnp.finfo(cost.dtype).max), 1 / peak, 1)


def _rows_of(row_of: Int[Array, "batch m"], n: int) -> Int[Array, "batch n"]:
    """Invert: from the row of every column to the column of every row."""
    hit = row_of[:, None, :] == jnp.arange(n, dtype=row_of.dtype)[:, None]
    index = jnp.arange(row_of.shape[1], dtype=row_of.dtype)
    return jnp.max(jnp.where(hit, index, UNMATCHED), axis=2)


def _shortest_augmenting_paths(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
) -> Int[Array, "batch m"]:
    """Return the row of every column, or -1; no more rows than columns may take part.

    Jonker and Volgenant's algorithm (Computing 38, 1987; in the form of Crouse, IEEE TAES 52,
    2016): rows enter one by one, each along the shortest path (Dijkstra, on costs reduced by the
    columns' prices v) to a free column, after which the rows on the path change columns.

    Every set runs through this as a machine of its own: in one turn of the loop it either scans
    one row (search) or changes one row's column (walk back). So the loop takes as many turns as the
    slowest *set* needs in all, not the sum over rows of the slowest set's turns for each row. The
    batch is the last axis, which makes minima over columns elementwise operations.
    """
    batch, n, m = cost.shape
    # Rows of costs are fetched from memory where each is in one piece.
    rows_of_all = cost.reshape(batch * n, m)
    cost = jnp.transpose(cost, (1, 2, 0))
    column_index = jnp.arange(m, dtype=jnp.int32)[:, None]
    batch_index = jnp.arange(batch)
    infinity = jnp.asarray(jnp.inf, cost.dtype)
    closed = jnp.zeros((m, batch), bool) if column_mask is None else ~column_mask.T
    price, row_of = jnp.zeros_like(cost[0]), jnp.full_like(cost[0], UNMATCHED, dtype=jnp.int32)
    waiting = jnp.ones((n, batch), bool) if row_mask is None else row_mask.T
    if n == m and row_mask is None and column_mask is None:
        # Where every column ends up matched, prices may start anywhere. At the cheapest row of each
        # column, no reduced cost is negative, and a row that is the cheapest of some column may
        # have it: what is left to search for is the conflicts.
        price, row_of = _cheapest_rows(cost)
        taken = row_of == jnp.arange(n, dtype=jnp.int32)[:, None, None]
        waiting = ~jnp.any(taken, axis=1)
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
    zeros = jnp.zeros_like(cost[0, 0])
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
        "distance": jnp.full_like(cost[0], infinity),
        "via": jnp.zeros_like(cost[0], dtype=jnp.int32),
        "scanned": jnp.zeros_like(cost[0], dtype=bool),
        "row_of": row_of,
    }
    return jax.lax.while_loop(any_left, turn, state)["row_of"].T


def _paths_by_kernel(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None = None,
    column_mask: Bool[Array, "batch m"] | None = None,
) -> Int[Array, "batch m"]:
    """The GPU's kernel where there is one, decided when the program is lowered."""
    # Imported here: Pallas takes a quarter of a second to import, and few need it.
    from msdspn_jax.matching.kernel import shortest_augmenting_paths

    return jax.lax.platform_dependent(
        cost,
        row_mask,
        column_mask,
        cuda=shortest_augmenting_paths,
        rocm=shortest_augmenting_paths,
        default=_shortest_augmenting_paths,
    )


def _cheapest_rows(
    cost: Float[Array, "n m batch"],
) -> tuple[Float[Array, "m batch"], Int[Array, "m batch"]]:
    """The lowest cost of every column, and the row that has it if no earlier column took it."""
    row_index = jnp.arange(cost.shape[0], dtype=jnp.int32)[:, None, None]
    column_index = jnp.arange(cost.shape[1], dtype=jnp.int32)[:, None]
    cheapest = jnp.argmin(cost, axis=0).astype(jnp.int32)
    wants = cheapest == row_index
    first = jnp.min(jnp.where(wants, column_index, cost.shape[1]), axis=1, keepdims=True)
    row_of = jnp.max(jnp.where(wants & (column_index == first), row_index, UNMATCHED), axis=0)
    return jnp.min(cost, axis=0), row_of


# The others -------------------------------------------------------------------------------------


def _assign_with_optax(cost: Float[Array, "batch n m"]) -> Int[Array, "batch n"]:
    import optax

    n = cost.shape[1]
    valid = jnp.all(jnp.isfinite(cost), axis=(1, 2))
    cost = jnp.where(valid[:, None, None], cost, 0)
    if 0 in cost.shape:
        return jnp.full(cost.shape[:2], UNMATCHED, jnp.int32)
    rows, columns = jax.vmap(optax.assignment.hungarian_algorithm)(cost)
    # optax returns the pairs in no particular order.
    index = jnp.arange(cost.shape[0])[:, None]
    assignment = jnp.full((cost.shape[0], n), UNMATCHED, jnp.int32)
    assignment = assignment.at[index, rows].set(columns.astype(jnp.int32))
    return jnp.where(valid[:, None], assignment, INVALID)


def _assign_on_host(cost: Array, row_mask: Any, column_mask: Any) -> Int[Array, "*batch n"]:
    from scipy.optimize import linear_sum_assignment

    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    sets = math.prod(batch)
    costs = np.asarray(cost).reshape(sets, n, m)
    assignment = np.full((sets, n), UNMATCHED, np.int32)
    rows = None if row_mask is None else np.asarray(row_mask).reshape(sets, n)
    columns = None if column_mask is None else np.asarray(column_mask).reshape(sets, m)
    for index, matrix in enumerate(costs):
        if rows is None or columns is None:
            row, column = linear_sum_assignment(matrix)
        else:
            live_rows, live_columns = np.flatnonzero(rows[index]), np.flatnonzero(columns[index])
            row, column = linear_sum_assignment(matrix[np.ix_(live_rows, live_columns)])
            row, column = live_rows[row], live_columns[column]
        assignment[index, row] = column
    return jnp.asarray(assignment.reshape(*batch, n))


def _choose(cost: Array, concrete: bool) -> Method:
    """Pick by measurement: see experiments/benchmarks/README.md."""
    on_cpu = concrete and all(device.platform == "cpu" for device in cost.devices())
    return "host" if on_cpu and cost.shape[-1] > 16 else "device"


# Checks -----------------------------------------------------------------------------------------


def _checked_cost(cost: Any) -> Array:
    cost = jnp.asarray(cost)
    if cost.ndim < 2:
        raise ValueError(f"cost must have shape [*batch, n, m], got {cost.shape}.")
    if jnp.issubdtype(cost.dtype, jnp.complexfloating):
        raise ValueError(f"cost must be real, got dtype {cost.dtype}.")
    return cost.astype(jnp.promote_types(cost.dtype, jnp.float32))


def _checked_masks(
    mask: Any, batch: tuple[int, ...], n: int, m: int
) -> tuple[Array | None, Array | None]:
    if mask is None:
        return None, None
    pair = mask if isinstance(mask, tuple | list) else (mask, mask)
    if len(pair) != 2:
        raise ValueError(
            f"mask must be one array or a pair (rows, columns), got {len(pair)} arrays."
        )
    checked = []
    for name, part, size in (("rows", pair[0], n), ("columns", pair[1], m)):
        part = jnp.asarray(part)
        if part.shape != (*batch, size):
            raise ValueError(
                f"the mask of the {name} must have shape {(*batch, size)}, got {part.shape}; where "
                "n != m, give a pair (rows, columns)."
            )
        if part.dtype != bool:
            raise ValueError(f"the mask of the {name} must be boolean, got dtype {part.dtype}.")
        checked.append(part)
    return checked[0], checked[1]


def _raise_if_not_finite(cost: Array, row_mask: Array | None, column_mask: Array | None) -> None:
    bad = ~np.isfinite(np.asarray(cost))
    if row_mask is not None and column_mask is not None:
        bad &= np.asarray(row_mask)[..., :, None] & np.asarray(column_mask)[..., None, :]
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"cost must be finite, got {float(np.asarray(cost)[first])} at index {first} "
            f"({int(bad.sum())} such entries, in {int(bad.any((-2, -1)).sum())} sets)."
        )
