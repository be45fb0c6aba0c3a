"""Optimal assignment between two sets: for a whole batch at once, inside compiled programs too."""

from msdspn_jax.matching.assignment import INVALID, UNMATCHED, Method, assign, matched_cost

__all__ = ["INVALID", "UNMATCHED", "Method", "assign", "matched_cost"]
