"""Optimal assignment between two sets: the public functions, their checks, the choice of solver.

Losses on sets pair every predicted element with one target so that the summed cost is least. Doing
this inside a compiled training step needs a solver made of array operations: `assign` has one, and
is useful outside this library too.

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
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from msdspn_jax import _check
from msdspn_jax._check import AnyArray
from msdspn_jax._varying import varying_axes
from msdspn_jax.matching import optax_solver
from msdspn_jax.matching.augmenting_paths import UNMATCHED, shortest_augmenting_paths

INVALID = int(np.iinfo(np.int32).min)
"""The assignment of every row of a set whose cost is not finite, under ``jit``. The value is far
out of range on purpose: ``jnp.take_along_axis`` with it gives NaN, not somebody else's element."""

Method = Literal["auto", "device", "optax", "host"]
Mask = Bool[AnyArray, "*batch n"] | tuple[Bool[AnyArray, "*batch n"], Bool[AnyArray, "*batch m"]]


def assign(
    cost: Real[AnyArray, "*batch n m"] | Bool[AnyArray, "*batch n m"],
    *,
    mask: Mask | None = None,
    method: Method = "auto",
) -> Int[Array, "*batch n"]:
    """Return for every row the column it is matched to, so that the total cost is minimal.

    Each column is used at most once, and ``min(n, m)`` pairs are made (of the rows and columns that
    take part, if there is a mask). The result is piecewise constant in the cost, so no gradient
    flows through it: differentiate the cost of the matched pairs, see `matched_cost`. Where several
    matchings cost the same, the choice is the same with and without ``jit``.

    **Precision.** Every finite cost is allowed, denormal or near the largest number: each set is
    scaled by a power of two, which is exact. Costs are then added and subtracted as floating-point
    numbers with spacing ε (2⁻²³ in float32), so costs that span many magnitudes lose their smaller
    part. With k = max(n, m) and C the largest absolute cost of the set, the total is

    * the least, where all costs are multiples of one number q = 2^p and k · C ≤ 2²¹ · q: small
      whole numbers, for instance;
    * at most k · ε · C above the least in general. (Tested against SciPy in float64 on costs over
      the whole range, not proved: the worst that was seen is a twentieth of that.)

    C does not count costs above 16 · k times all others, if the matching can do without them:
    forbid a pair by any large number that you like.

    Args:
        cost: finite costs, of any sign. Computed in float32 where given in less, and in float64
            where JAX has it. Whole numbers must be at most 2²⁴ (2⁵³ in float64) in size.
        mask: which rows and columns take part: a pair of boolean arrays ``[*batch, n]`` and
            ``[*batch, m]``, or one array for both where ``n == m``. Other costs may be anything.
        method: ``"device"``: shortest augmenting paths, the whole batch in lock-step, on any
            backend. ``"auto"``: the same. ``"optax"``: ``optax.assignment.hungarian_algorithm``
            mapped over the batch (no mask; under ``jax.shard_map`` only with ``check_vma=False``).
            ``"host"``: SciPy in float64, for concrete arrays only; takes whole numbers up to 2⁵³,
            and on a CPU is often faster for sets of more than 16.

    Returns:
        int32 column indices in row order. ``UNMATCHED`` (-1) for a row left over. Under ``jit``,
        ``INVALID`` for every row of a set with a cost that is not finite or out of range (of a pair
        that takes part); `matched_cost` makes NaN of it.

    Raises:
        ValueError: such a cost in a concrete array; shapes that do not fit; complex costs; a
            method that cannot do what is asked for.

    Example:
        >>> cost = jnp.array([[5.0, 1.0], [1.0, 5.0], [2.0, 3.0]])
        >>> assign(cost).tolist(), matched_cost(cost, assign(cost)).tolist()
        ([1, 0, -1], 2.0)
        >>> here = jnp.array([False, True, True]), jnp.array([True, True])
        >>> assign(cost, mask=here).tolist()
        [-1, 0, 1]
    """
    _check.require_choice("method", method, get_args(Method))
    if not isinstance(cost, jax.Array):
        cost = np.asarray(cost)
    if cost.ndim < 2:
        raise ValueError(f"cost: expected shape [*batch, n, m], got {cost.shape}")
    if jnp.issubdtype(cost.dtype, jnp.complexfloating):
        raise ValueError(f"cost: expected real numbers, got dtype {cost.dtype}")
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    masks = _checked_masks(mask, batch, n, m)
    concrete = not any(_check.is_traced(x) for x in (cost, *(masks or ())))
    sets = math.prod(batch)
    if method == "host":
        if not concrete:
            raise ValueError(
                "cost, mask: expected concrete arrays with method='host', got traced ones (jit, "
                "vmap, grad or scan); use method='device' there"
            )
        assignment = _assign_on_host(cost, masks, sets)
        return jnp.asarray(assignment.reshape(*batch, n))
    if method == "optax" and masks is not None:
        raise ValueError("mask: expected None with method='optax', got one; use method='device'")
    if method == "optax" and varying_axes(cost):
        raise ValueError(
            "method: expected 'device' under jax.shard_map, got 'optax', whose loops do not pass "
            "its checks (check_vma=False turns them off)"
        )

    floats = as_floats(cost)
    if concrete:
        _refuse_unusable(cost, np.asarray(floats), masks)
    flat = lax.stop_gradient(jnp.reshape(floats, (sets, n, m)))
    rows = columns = None
    if masks is not None:
        rows, columns = (jnp.reshape(part, (sets, part.shape[-1])) for part in masks)
    if sets == 0 or n == 0 or m == 0:
        return jnp.full((*batch, n), UNMATCHED, jnp.int32)
    if method == "optax":
        assignment = _assign_with_optax(flat)
    else:
        assignment = _assign_on_device(flat, rows, columns)
    return jnp.reshape(assignment, (*batch, n))


def matched_cost(
    cost: Float[AnyArray, "*batch n m"], assignment: Int[AnyArray, "*batch n"]
) -> Float[Array, "*batch"]:
    """Sum the cost of the matched pairs of every set; differentiable in ``cost``.

    Args:
        cost: as given to `assign`.
        assignment: what `assign` returned. Unmatched rows count nothing. A set whose assignment is
            ``INVALID`` gets NaN, so that whatever watches the loss sees that its cost was not
            finite.

    Raises:
        TypeError, ValueError: an assignment that is not of integers, of another shape, or that
            names, where it is concrete, a column that is not there.

    Example:
        >>> cost = jnp.array([[5.0, 1.0], [1.0, 5.0]])
        >>> jax.grad(lambda cost: matched_cost(cost, assign(cost)))(cost).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    _check.require_shape("assignment", assignment, jnp.shape(cost)[:-1], "*batch n")
    if not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise TypeError(f"assignment: expected integers, got dtype {assignment.dtype}")
    if not _check.is_traced(assignment):
        columns = cost.shape[-1]
        known = (assignment == UNMATCHED) | (assignment == INVALID)
        bad = ~(known | ((assignment >= 0) & (assignment < columns)))
        if np.any(bad):
            raise ValueError(
                f"assignment: expected columns 0 to {columns - 1}, UNMATCHED or INVALID, got "
                f"{np.asarray(assignment)[np.asarray(bad)][0]}"
            )
    chosen = assignment[..., None] == jnp.arange(cost.shape[-1], dtype=assignment.dtype)
    invalid = jnp.any(assignment == INVALID, axis=-1)
    # Of such a set every pair, so that not only the total but also its gradient is NaN.
    chosen |= invalid[..., None, None]
    total = jnp.sum(jnp.where(chosen, cost, 0), axis=(-2, -1))
    return total * jnp.where(invalid, jnp.nan, 1)


# --- on device ---


@functools.partial(jax.jit, inline=True)
def _assign_on_device(
    cost: Float[Array, "batch n m"],
    row_mask: Bool[Array, "batch n"] | None,
    column_mask: Bool[Array, "batch m"] | None,
) -> Int[Array, "batch n"]:
    batch, n, m = cost.shape
    if row_mask is None and column_mask is None:
        valid = jnp.all(jnp.isfinite(cost), axis=(1, 2))
        cost = _conditioned(jnp.where(valid[:, None, None], cost, 0))
        if n <= m:
            assignment = _rows_of(shortest_augmenting_paths(cost), n)
        else:
            assignment = shortest_augmenting_paths(jnp.swapaxes(cost, 1, 2))
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
    row_of = shortest_augmenting_paths(cost, rows, columns)
    assignment = jnp.where(flip[:, None], row_of, _rows_of(row_of, side))[:, :n]
    return jnp.where(valid[:, None], assignment, INVALID)


@functools.partial(jax.jit, inline=True)
def _assign_with_optax(cost: Float[Array, "batch n m"]) -> Int[Array, "batch n"]:
    valid = jnp.all(jnp.isfinite(cost), axis=(1, 2))
    cost = _conditioned(jnp.where(valid[:, None, None], cost, 0))
    return jnp.where(valid[:, None], optax_solver.hungarian(cost), INVALID)


def _conditioned(cost: Float[Array, "batch n m"]) -> Float[Array, "batch n m"]:
    """Every set times a power of two: sums stay finite, and nothing that matters is denormal.

    With R the largest absolute cost and k = max(n, m), a shortest path is a sum of at most 2k
    costs, prices are at most 4kR, and nothing that the solver computes exceeds 8kR. So R is brought
    to just below 2^top, where 8kR is a quarter of the largest number, and the smaller costs keep
    all the room below. Done on the bits: XLA's CPU backend takes denormal operands for zero.
    """
    info = jnp.finfo(cost.dtype)
    digits = int(info.nmant)
    bits = lax.bitcast_convert_type(cost, jnp.dtype(f"uint{info.bits}"))
    biased = (bits >> digits).astype(jnp.int32) & (2 ** (info.bits - 1 - digits) - 1)
    fraction = bits & (2**digits - 1)
    # |cost| = whole · 2^(exponent - constant), and denormal numbers differ by the leading bit only.
    whole = jnp.where(biased > 0, fraction | 2**digits, fraction).astype(cost.dtype)
    exponent = jnp.maximum(biased, 1)
    largest = jnp.max(exponent, axis=(1, 2), keepdims=True)
    top = int(info.maxexp) - 5 - (max(cost.shape[1:]) - 1).bit_length()
    shift = exponent - largest + (top - digits - 1)
    # In two factors, since the smallest is no normal number.
    half = shift // 2
    scaled = whole * _power_of_two(half, cost.dtype) * _power_of_two(shift - half, cost.dtype)
    return jnp.where(bits >> (info.bits - 1) == 1, -scaled, scaled)


def _power_of_two(exponent: Int[Array, "*any"], dtype: Any) -> Float[Array, "*any"]:
    info = jnp.finfo(dtype)
    biased = (exponent + (int(info.maxexp) - 1)).astype(f"uint{info.bits}")
    return lax.bitcast_convert_type(biased << int(info.nmant), dtype)


def _rows_of(row_of: Int[Array, "batch m"], n: int) -> Int[Array, "batch n"]:
    """Invert: from the row of every column to the column of every row."""
    hit = row_of[:, None, :] == jnp.arange(n, dtype=row_of.dtype)[:, None]
    index = jnp.arange(row_of.shape[1], dtype=row_of.dtype)
    return jnp.max(jnp.where(hit, index, UNMATCHED), axis=2)


# --- on the host ---


def _assign_on_host(cost: Any, masks: Any, sets: int) -> Int[np.ndarray, "batch n"]:
    # Imported here: SciPy's optimisers are slow to import, and a training step needs none.
    from msdspn_jax.matching import host

    n, m = cost.shape[-2:]
    cost = np.asarray(cost)
    whole = np.issubdtype(cost.dtype, np.integer)
    floats = _whole_numbers_as(np.float64, cost) if whole else cost.astype(np.float64)
    _refuse_unusable(cost, floats, masks)
    if masks is None:
        rows, columns = np.ones((sets, n), bool), np.ones((sets, m), bool)
    else:
        rows, columns = (np.asarray(part).reshape(sets, part.shape[-1]) for part in masks)
    return host.assign_each(floats.reshape(sets, n, m), rows, columns)


# --- checks ---


def as_floats(cost: Any) -> Array:
    """In the precision of the solver; NaN for whole numbers that it cannot hold."""
    if jnp.issubdtype(cost.dtype, jnp.integer):
        return jnp.asarray(_whole_numbers_as(jax.dtypes.canonicalize_dtype(np.float64), cost))
    with np.errstate(over="ignore"):
        floats = jnp.asarray(cost)
    return floats.astype(jnp.promote_types(floats.dtype, jnp.float32))


def _whole_numbers_as(dtype: Any, cost: Any) -> Any:
    limit, info = _largest_whole(dtype), jnp.iinfo(cost.dtype)
    floats = cost.astype(dtype)
    if info.max <= limit:
        return floats
    beyond = cost > limit
    if info.min < 0:
        beyond |= cost < -limit
    # Where it came as a NumPy array it stays one: JAX would wrap wide integers around.
    return (jnp if isinstance(cost, jax.Array) else np).where(beyond, np.nan, floats)


def _largest_whole(dtype: Any) -> int:
    return 2 ** (int(jnp.finfo(dtype).nmant) + 1)


def _checked_masks(mask: Any, batch: tuple[Any, ...], n: int, m: int) -> tuple[Array, Array] | None:
    if mask is None:
        return None
    pair = mask if isinstance(mask, tuple | list) else (mask, mask)
    if len(pair) != 2:
        raise ValueError(
            f"mask: expected one array or a pair (rows, columns), got {len(pair)} arrays"
        )
    checked = []
    for name, part, size in (("rows", pair[0], n), ("columns", pair[1], m)):
        part = jnp.asarray(part)
        if part.shape != (*batch, size):
            raise ValueError(
                f"mask: expected shape {(*batch, size)} for the {name}, got {part.shape}; where "
                "n != m, give a pair (rows, columns)"
            )
        if part.dtype != bool:
            raise ValueError(f"mask: expected booleans for the {name}, got dtype {part.dtype}")
        checked.append(part)
    return checked[0], checked[1]


def _refuse_unusable(cost: Any, floats: np.ndarray, masks: Any) -> None:
    bad = ~np.isfinite(floats)
    if masks is not None:
        rows, columns = map(np.asarray, masks)
        bad &= rows[..., :, None] & columns[..., None, :]
    if not bad.any():
        return
    expected = f"finite numbers in {floats.dtype}"
    if jnp.issubdtype(cost.dtype, jnp.integer):
        digits = _largest_whole(floats.dtype).bit_length() - 1
        expected = f"whole numbers of at most 2**{digits} in size (2**53 with method='host')"
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"cost: expected {expected}, got {np.asarray(cost)[first]} at index {first} "
        f"({int(bad.sum())} such entries, in {int(bad.any((-2, -1)).sum())} sets)"
    )
