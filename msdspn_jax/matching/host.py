"""SciPy's solver, one set after the other, in float64: for concrete arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from msdspn_jax.matching.augmenting_paths import UNMATCHED


def assign_each(
    cost: Float[np.ndarray, "batch n m"],
    row_mask: Bool[np.ndarray, "batch n"],
    column_mask: Bool[np.ndarray, "batch m"],
) -> Int[np.ndarray, "batch n"]:
    """The column of every row, or -1, for costs that are finite where they take part."""
    assignment = np.full(cost.shape[:2], UNMATCHED, np.int32)
    for index, matrix in enumerate(cost):
        rows, columns = np.flatnonzero(row_mask[index]), np.flatnonzero(column_mask[index])
        row, column = linear_sum_assignment(matrix[np.ix_(rows, columns)])
        assignment[index, rows[row]] = columns[column]
    return assignment
