"""Class-specific numbering: number the elements of a multiset within their classes (paper, 4.1).

The input is a multiset of n one-hot classes, the target counts, for every element, the earlier
elements of its class: [a, b, b, a] ↦ [a0, b0, b1, a1]. Equal elements need different outputs, so
no set-equivariant function gets this right; any order within a class is as good as any other.

Everything is a pure function of keys and runs on the device. A fixed training set of `size` samples
is never stored: sample i is drawn from ``fold_in(key, i)`` whenever it is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msdspn_jax._check import AnyArray


class NumberingBatch(NamedTuple):
    """A batch of multisets with their numbers.

    Attributes:
        inputs: one-hot classes, [batch, n, num_classes].
        targets: one-hot numbers, [batch, n, n].
    """

    inputs: Float[Array, "batch n num_classes"]
    targets: Float[Array, "batch n n"]


def number_within_classes(classes: Int[AnyArray, "*batch n"]) -> Int[Array, "*batch n"]:
    """Count, for every element, the earlier elements of the same class: 0 for the first."""
    n = classes.shape[-1]
    same = classes[..., :, None] == classes[..., None, :]
    return jnp.sum(same & jnp.tri(n, k=-1, dtype=bool), axis=-1)


def draw_classes(
    key: Key[Array, ""], *, n: int, num_classes: int, classes_per_set: int | None = None
) -> Int[Array, " n"]:
    """Draw one multiset: n classes, independent and uniform.

    Args:
        key: fixes the multiset.
        n: set size.
        num_classes: classes there are.
        classes_per_set: draw first this many distinct classes, then the elements from among them.
            None: from all.
    """
    check_sizes(n=n, num_classes=num_classes, classes_per_set=classes_per_set)
    if classes_per_set is None or classes_per_set == num_classes:
        return jax.random.randint(key, (n,), 0, num_classes, jnp.int32)
    key_choice, key_elements = jax.random.split(key)
    chosen = jax.random.permutation(key_choice, num_classes)[:classes_per_set]
    return chosen[jax.random.randint(key_elements, (n,), 0, classes_per_set, jnp.int32)]


def draw_batch(
    keys: Key[Array, " batch"],
    *,
    n: int,
    num_classes: int,
    classes_per_set: int | None = None,
    permutation_keys: Key[Array, " batch"] | None = None,
) -> NumberingBatch:
    """Draw one multiset a key, with its numbers.

    Args:
        keys: one key per multiset; the same key gives the same multiset.
        n: set size; the numbers are one-hot in n dimensions.
        num_classes: classes there are.
        classes_per_set: see `draw_classes`.
        permutation_keys: augmentation: bring the elements of multiset i into a random order drawn
            from ``permutation_keys[i]`` before they are numbered.
    """
    classes = jax.vmap(
        lambda key: draw_classes(key, n=n, num_classes=num_classes, classes_per_set=classes_per_set)
    )(keys)
    if permutation_keys is not None:
        classes = jax.vmap(jax.random.permutation)(permutation_keys, classes)
    return NumberingBatch(
        inputs=jax.nn.one_hot(classes, num_classes),
        targets=jax.nn.one_hot(number_within_classes(classes), n),
    )


# Validation and test sets do not depend on the seed of a run: all runs are judged by the same.
_SPLIT_SEEDS = {"val": 20211, "test": 20212}


def split_keys(split: str, indices: Int[AnyArray, " batch"]) -> Key[Array, " batch"]:
    """The keys of samples of the validation ("val") or test split."""
    return fold_in_each(jax.random.key(_SPLIT_SEEDS[split]), indices)


def fold_in_each(key: Key[Array, ""], numbers: Int[AnyArray, " batch"]) -> Key[Array, " batch"]:
    """One key a number: sample i of the data set that `key` stands for."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def check_sizes(*, n: int, num_classes: int, classes_per_set: int | None) -> None:
    """Refuse sizes that no multiset has."""
    if n < 1 or num_classes < 1:
        raise ValueError(f"n, num_classes: expected integers >= 1, got {n} and {num_classes}")
    if classes_per_set is not None and not 1 <= classes_per_set <= num_classes:
        raise ValueError(
            f"classes_per_set: expected an integer in 1 … num_classes = {num_classes},"
            f" got {classes_per_set}"
        )
