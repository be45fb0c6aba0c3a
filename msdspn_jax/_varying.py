"""Loop carries under `jax.shard_map`, whose checks ask over which mesh axes a value varies."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying_axes(*trees: Any) -> frozenset[str]:
    """Mesh axes over which any leaf varies; empty outside of `jax.shard_map`."""
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(trees):
        found |= getattr(jax.typeof(leaf), "vma", frozenset())
    return found


def vary_like(tree: Any, *others: Any) -> Any:
    """The same values, marked as varying over every axis over which the others vary.

    The start of a loop is often a constant, and its end depends on sharded data; the types of a
    carry must agree.
    """
    axes = varying_axes(*others)
    if not axes:
        return tree

    def mark(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
