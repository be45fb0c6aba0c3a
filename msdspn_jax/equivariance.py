"""Is a function on sets set-equivariant, multiset-equivariant, or neither? Evidence, not faith.

The definitions are those of Zhang et al. (ICLR 2022), section 2, for f from multisets X
[n, d] to Y [n, d_out] with one output row for each input row:

* f is *set-equivariant* if f(P X) = P f(X) for every permutation P. Equal rows of X then get
  equal rows of f(X).
* f is *multiset-equivariant* if for every P1 there is a P2 with P1 X = P2 X and
  f(P1 X) = P2 f(X): P2 may differ from P1 by a permutation among equal rows.
* f is *exclusively* multiset-equivariant if it is the second and not the first. Only such an f can
  treat equal elements differently without an order being imposed on the input.

`check_equivariance` tries to refute each property on given or generated sets. A "no" comes with a
counterexample and is final; a "yes" means that none of the trials refuted it. What the trials could
not have refuted is "not tested": whether f is set-equivariant shows on sets with equal elements
only, and the multiset property asks for sets with different ones.

    >>> report = check_equivariance(push_apart, key=jax.random.key(0))
    >>> report.verdict
    'exclusively multiset-equivariant'

**Functions that draw noise.** The properties belong to functions, so a stochastic f(X, ε) needs a
decision about ε, and the answer depends on it. Two are sensible. *The noise belongs to the model*:
fix the key, check X ↦ f(X, ε); row i always meets ε_i. *The noise belongs to the elements*: check
the function on concatenated rows [X, ε], so that permutations move both, on some sets with equal
noise for equal elements, and with `equal_by` the columns of X: elements are equal, and may be
exchanged, if they are equal in X. A function whose results change from call to call is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msdspn_jax import _check
from msdspn_jax._check import AnyArray


def push_apart(sets: Float[AnyArray, "*batch n d"]) -> Float[Array, "*batch n d"]:
    """Move the smallest entry of every column down by one, the largest up by one.

    The smallest example of an exclusively multiset-equivariant function (Zhang et al. 2022,
    section 2): with n = 2, [1, 2] ↦ [0, 3], [2, 1] ↦ [3, 0] and [1, 1] ↦ [0, 2]. Entries between
    move in proportion to their rank within the column. Where rows tie in a column, their other
    columns decide; only equal rows are ranked by position.

    Example:
        >>> push_apart(jnp.array([[1.0], [1.0], [5.0]])).ravel().tolist()
        [0.0, 1.0, 6.0]
    """
    if sets.ndim < 2:
        raise ValueError(f"sets: expected shape [..., n, d], got {sets.shape}")
    sets = jnp.asarray(sets)
    n, d = sets.shape[-2:]
    if n == 1:
        return sets

    def rank(column: int):
        # lexsort's last key is its first criterion.
        criteria = (*(sets[..., other] for other in range(d)), sets[..., column])
        return jnp.argsort(jnp.lexsort(criteria, axis=-1), axis=-1)

    ranks = jnp.stack([rank(column) for column in range(d)], axis=-1)
    return sets + 2.0 * ranks / (n - 1) - 1.0


def example_sets(
    key: Key[Array, ""],
    *,
    num_sets: int = 12,
    n: int = 6,
    d: int = 2,
    repeated_entries: bool = False,
) -> Float[Array, "num_sets n d"]:
    """Draw sets that tell equivariant functions apart: distinct rows, repeated rows, equal rows.

    A third of the sets has n independent N(0, I_d) rows, a third repeats rows drawn from n / 2, and
    in the last third all rows are equal.

    With `repeated_entries`, the second third repeats entries, column by column: rows that differ
    then share entries. A function that sorts each column by itself, such as the gradient of FSPool
    with respect to the features it pools, breaks such ties by position and so is *not* multiset-
    equivariant there. Features computed by a generic layer tie like this with probability zero.

    Args:
        key: draws the rows, and which are repeated.
        num_sets: at least 3.
        n: elements of every set, at least 2.
        d: entries of every element, at least 1.
        repeated_entries: see above.

    Example:
        >>> sets = example_sets(jax.random.key(0), num_sets=3, n=4, d=2)
        >>> [len(set(map(tuple, each.tolist()))) for each in sets]  # different rows
        [4, 2, 1]
    """
    for name, value, least in (("num_sets", num_sets, 3), ("n", n, 2), ("d", d, 1)):
        _check.require_integer(name, value, least)
    key_values, key_source = jax.random.split(key)
    values = jax.random.normal(key_values, (num_sets, n, d))
    width = d if repeated_entries else 1
    drawn = jax.random.randint(key_source, (num_sets, n, width), 0, n // 2)
    kind = (jnp.arange(num_sets) % 3)[:, None, None]
    source = jnp.where(kind == 0, jnp.arange(n)[:, None], jnp.where(kind == 1, drawn, 0))
    return jnp.take_along_axis(values, jnp.broadcast_to(source, values.shape), axis=1)


@dataclasses.dataclass(frozen=True)
class Counterexample:
    """The trial that violates a property most.

    Attributes:
        set: X, [n, d].
        permutation: P1 as indices: row i of P1 X is row permutation[i] of X.
        output: f(X), [n, d_out].
        permuted_output: f(P1 X), [n, d_out].
        expected: what the property asks f(P1 X) to be: P1 f(X), or P2 f(X) with the best P2.
        matching: P2 as indices, or None where the property leaves no choice.
        violation: largest absolute difference between `permuted_output` and `expected`.
        tolerance: the difference that was allowed here.
    """

    set: np.ndarray
    permutation: np.ndarray
    output: np.ndarray
    permuted_output: np.ndarray
    expected: np.ndarray
    matching: np.ndarray | None
    violation: float
    tolerance: float

    def __str__(self) -> str:
        """Show the trial as small arrays, one a line."""
        second = "P1" if self.matching is None else "P2"
        lines = [
            ("X", self.set),
            ("P1", self.permutation),
            *([] if self.matching is None else [("best P2", self.matching)]),
            ("f(X)", self.output),
            ("f(P1 X)", self.permuted_output),
            (f"{second} f(X)", self.expected),
        ]
        width = max(len(name) for name, _ in lines)
        text = [f"  {name:>{width}} = {_one_line(value)}" for name, value in lines]
        text.append(
            f"  largest |f(P1 X) - {second} f(X)| = {self.violation:.3g}, "
            f"allowed {self.tolerance:.1g}"
        )
        return "\n".join(text)


@dataclasses.dataclass(frozen=True)
class EquivarianceReport:
    """What `check_equivariance` found.

    Attributes:
        set_equivariant: True if no trial refuted f(P X) = P f(X), False if one did, None if none
            did but none of them could have: not tested.
        multiset_equivariant: the same for the existence of P2.
        set_violation: largest violation of the first relative to what is allowed (<= 1: held).
        multiset_violation: the same of the second.
        set_counterexample: the worst trial, or None if the property was not refuted.
        multiset_counterexample: the worst trial, or None if the property was not refuted.
        num_trials: pairs of a set and a permutation.
        num_exchanging_equal: trials that change the order of equal elements. Without any,
            set-equivariance is not tested.
        num_exchanging_different: trials with P X ≠ X. Without any, neither property is tested.
        name: what was checked.
    """

    set_equivariant: bool | None
    multiset_equivariant: bool | None
    set_violation: float
    multiset_violation: float
    set_counterexample: Counterexample | None
    multiset_counterexample: Counterexample | None
    num_trials: int
    num_exchanging_equal: int
    num_exchanging_different: int
    name: str

    @property
    def exclusively_multiset_equivariant(self) -> bool | None:
        """Multiset-equivariant and not set-equivariant: able to separate equal elements.

        None if what was tested does not decide it.
        """
        if self.set_equivariant or self.multiset_equivariant is False:
            return False
        if self.set_equivariant is None or self.multiset_equivariant is None:
            return None
        return True

    @property
    def verdict(self) -> str:
        """The finding in words."""
        if self.multiset_equivariant is False:
            return "neither set- nor multiset-equivariant"
        if self.set_equivariant:
            return (
                "set-equivariant (so multiset-equivariant, but unable to separate equal elements)"
            )
        if self.exclusively_multiset_equivariant:
            return "exclusively multiset-equivariant"
        if self.multiset_equivariant:
            return f"multiset-equivariant (set-equivariance not tested: {self._missing})"
        if self.set_equivariant is False:
            return f"not set-equivariant (multiset-equivariance not tested: {self._missing})"
        return f"not tested: {self._missing}"

    @property
    def _missing(self) -> str:
        kind = "equal" if self.num_exchanging_different else "different"
        return f"no trial exchanges {kind} elements; give sets with {kind} rows"

    def __str__(self) -> str:
        """Say the verdict, how far each property was from failing, and show the counterexamples."""
        text = [f"{self.name}: {self.verdict}  ({self.num_trials} trials)"]
        for label, held, ratio, example in (
            ("set", self.set_equivariant, self.set_violation, self.set_counterexample),
            (
                "multiset",
                self.multiset_equivariant,
                self.multiset_violation,
                self.multiset_counterexample,
            ),
        ):
            mark = {True: "held in every trial", False: "refuted", None: "not tested"}[held]
            text.append(f"{label}-equivariant: {mark}; worst violation {ratio:.2g} x tolerance")
            if example is not None:
                text.append(str(example))
        return "\n".join(text)

    __repr__ = __str__


def check_equivariance(
    function: Callable[[Any], Any],
    sets: Float[AnyArray, "num_sets n d"] | None = None,
    *,
    key: Key[Array, ""],
    num_permutations: int = 8,
    equal_by: slice | None = None,
    batched: bool = False,
    jit: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    float64: bool = True,
    name: str | None = None,
) -> EquivarianceReport:
    """Try to refute that `function` is set-equivariant, and that it is multiset-equivariant.

    Every set is permuted `num_permutations` times at random. For the multiset property, a suitable
    P2 is searched among *all* permutations of equal rows by solving, for every group of equal rows,
    the assignment whose largest difference is smallest; nothing is enumerated.

    Args:
        function: [n, d] -> [n, d_out], or [batch, n, d] -> [batch, n, d_out] with `batched`. A
            result with an attribute `sets` (such as a `Minimum`) stands for its `sets`. Stochastic
            functions need a fixed key, see the module's docstring.
        sets: the multisets to try, [num_sets, n, d]; include some with equal rows, without which
            set-equivariance is not tested. Default: `example_sets`.
        key: draws the permutations and the default sets.
        num_permutations: random permutations for each set.
        equal_by: the columns by which two rows count as equal, that is, may be exchanged by P2; all
            by default. For noise that travels with the elements: the columns without it.
        batched: whether `function` takes a batch of sets.
        jit: trace and compile `function` (True), call it on NumPy arrays (False), or compile it
            if JAX can trace it (None). Traced, NumPy's random numbers are drawn once and stay.
        rtol: allowed difference relative to the largest absolute entry of f(X), all columns
            together; smaller violations are not seen. In float64 1e-9 is mostly enough.
        atol: allowed absolute difference, added to the former.
        float64: evaluate in double precision. Where f sorts, single precision is treacherous:
            rounding exchanges near-equal entries, and a few steps of descent amplify that.
        name: what to call the function in the report.

    Raises:
        ValueError: if shapes do not fit, an output is not finite, or two calls with the same input
            differ.

    Example:
        >>> report = check_equivariance(lambda x: x - x.mean(0), key=jax.random.key(0))
        >>> report.set_equivariant, report.multiset_equivariant
        (True, True)
        >>> different = jax.random.normal(jax.random.key(0), (3, 5, 2))
        >>> check_equivariance(push_apart, different, key=jax.random.key(0)).set_equivariant is None
        True
    """
    _check.require_integer("num_permutations", num_permutations, 1)
    equal_by = slice(None) if equal_by is None else equal_by
    if not isinstance(equal_by, slice):
        raise TypeError(f"equal_by: expected a slice of columns or None, got {equal_by!r}")
    key_sets, key_permutations = jax.random.split(key)
    if sets is None:
        sets = example_sets(key_sets)
    if np.ndim(sets) != 3 or 0 in np.shape(sets):
        raise ValueError(f"sets: expected shape [num_sets, n, d], got {np.shape(sets)}")
    num_sets, n, _ = np.shape(sets)
    keys = jax.random.split(key_permutations, (num_sets, num_permutations))
    permutations = np.asarray(
        jax.vmap(jax.vmap(lambda each: jax.random.permutation(each, n)))(keys)
    )
    with jax.enable_x64(float64 or jax.dtypes.canonicalize_dtype(float) == np.float64):
        precision = np.float64 if float64 else np.asarray(sets).dtype
        originals = np.asarray(sets, dtype=precision)
        permuted = np.take_along_axis(originals[:, None], permutations[..., None], axis=2)
        # The identity comes twice: f(X) itself, and a second call that must agree with it.
        stacked = np.concatenate([originals[:, None], originals[:, None], permuted], axis=1)
        outputs = _evaluate(function, stacked, batched=batched, jit=jit)
    output, again, permuted_output = outputs[:, 0], outputs[:, 1], outputs[:, 2:]
    tolerances = atol + rtol * np.abs(output).max(axis=(1, 2))
    if np.any(np.abs(output - again).max(axis=(1, 2)) > tolerances):
        raise ValueError(
            "function: expected the same output for the same set, got different outputs for the "
            "same set in two places of a batch or two calls; fix what it draws at random (see "
            "msdspn_jax.equivariance), and check that members of a batch do not influence each "
            "other"
        )
    worst: dict[str, Counterexample] = {}
    exchanging_equal = exchanging_different = 0
    for i, j in np.ndindex(num_sets, num_permutations):
        equal, different = _exchanges(originals[i], permutations[i, j])
        exchanging_equal += equal
        exchanging_different += different
        trial = (originals[i], permutations[i, j], output[i], permuted_output[i, j], tolerances[i])
        matching = best_matching(originals[i][:, equal_by], *trial[1:4])
        for label, example in (("set", _trial(*trial)), ("multiset", _trial(*trial, matching))):
            if label not in worst or _ratio(example) > _ratio(worst[label]):
                worst[label] = example
    ratios = {label: _ratio(example) for label, example in worst.items()}

    def finding(label: str, tested: bool) -> bool | None:
        return False if ratios[label] > 1 else (True if tested else None)

    return EquivarianceReport(
        set_equivariant=finding("set", exchanging_equal > 0 and exchanging_different > 0),
        multiset_equivariant=finding("multiset", exchanging_different > 0),
        set_violation=ratios["set"],
        multiset_violation=ratios["multiset"],
        set_counterexample=worst["set"] if ratios["set"] > 1 else None,
        multiset_counterexample=worst["multiset"] if ratios["multiset"] > 1 else None,
        num_trials=num_sets * num_permutations,
        num_exchanging_equal=exchanging_equal,
        num_exchanging_different=exchanging_different,
        name=name or getattr(function, "__name__", None) or type(function).__name__,
    )


def best_matching(
    set_: Float[np.ndarray, "n d"],
    permutation: Int[np.ndarray, " n"],
    output: Float[np.ndarray, "n d_out"],
    permuted_output: Float[np.ndarray, "n d_out"],
) -> Int[np.ndarray, " n"]:
    """Find P2 with P2 X = P1 X that brings P2 f(X) closest to f(P1 X) in the largest difference.

    P2 sends, within every group of equal rows of X, rows of f(X) to rows of f(P1 X): one bottleneck
    assignment a group. Returned as indices: row i of P2 f(X) is row P2[i] of f(X).

    Example:
        >>> same, output = np.array([[1.0], [1.0]]), np.array([[0.0], [2.0]])
        >>> best_matching(same, np.array([1, 0]), output, output).tolist()
        [0, 1]
    """
    group = _groups(set_)
    matching = np.empty(len(set_), dtype=np.int64)
    for label in range(group.max() + 1):
        targets = np.flatnonzero(group[permutation] == label)
        sources = np.flatnonzero(group == label)
        cost = np.abs(permuted_output[targets][:, None] - output[sources][None]).max(axis=-1)
        matching[targets] = sources[_bottleneck_assignment(cost)]
    return matching


def _groups(set_: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
    """Number the rows so that equal ones have equal numbers."""
    return np.unique(set_, axis=0, return_inverse=True)[1].reshape(-1)


def _exchanges(set_: Float[np.ndarray, "n d"], permutation) -> tuple[bool, bool]:
    """Whether P1 changes the order of equal rows, and whether P1 X differs from X."""
    group = _groups(set_)
    moved = group[permutation]
    equal = any((np.diff(permutation[moved == label]) < 0).any() for label in np.unique(group))
    return equal, bool((moved != group).any())


def _trial(set_, permutation, output, permuted_output, tolerance, matching=None):
    expected = output[permutation if matching is None else matching]
    violation = float(np.abs(permuted_output - expected).max())
    return Counterexample(
        set_,
        permutation,
        output,
        permuted_output,
        expected,
        matching,
        violation,
        float(tolerance),
    )


def _bottleneck_assignment(cost: Float[np.ndarray, "m m"]) -> Int[np.ndarray, " m"]:
    """Assign rows to columns so that the largest cost is smallest: a threshold, bisected."""
    from scipy.optimize import linear_sum_assignment

    if len(cost) == 1:
        return np.zeros(1, dtype=np.int64)
    columns = linear_sum_assignment(cost)[1]
    upper = cost[np.arange(len(cost)), columns].max()
    lower = max(cost.min(axis=0).max(), cost.min(axis=1).max())
    levels = np.unique(cost[(cost >= lower) & (cost <= upper)])
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        forbidden = cost > levels[middle]
        candidate = linear_sum_assignment(forbidden)[1]
        if forbidden[np.arange(len(cost)), candidate].any():
            low = middle + 1
        else:
            columns, high = candidate, middle
    return columns


def _evaluate(function, stacked: np.ndarray, *, batched: bool, jit: bool | None) -> np.ndarray:
    """Apply f to every set of [num_sets, trials, n, d]: finite [num_sets, trials, n, d_out]."""
    shape = stacked.shape
    flat = stacked.reshape(-1, *shape[2:])

    def run(inputs):
        outputs = function(inputs)
        return getattr(outputs, "sets", outputs)

    whole = run if batched else jax.vmap(run)
    if jit is None:
        try:
            jax.eval_shape(whole, jax.ShapeDtypeStruct(flat.shape, flat.dtype))
            jit = True
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.NonConcreteBooleanIndexError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
        ):
            jit = False
    if jit:
        outputs = np.asarray(jax.jit(whole)(jnp.asarray(flat)))
    elif batched:
        outputs = np.asarray(run(flat))
    else:
        outputs = np.stack([np.asarray(run(each)) for each in flat])
    if outputs.ndim != 3 or outputs.shape[:2] != flat.shape[:2]:
        expected = "[batch, n, d_out]" if batched else "[n, d_out]"
        sizes = f"batch={flat.shape[0]}, n={flat.shape[1]}" if batched else f"n={flat.shape[1]}"
        got = outputs.shape if batched else outputs.shape[1:]
        raise ValueError(
            f"function: expected {expected} with one row for every row of its input "
            f"({sizes}), got shape {got}"
        )
    outputs = outputs.astype(np.float64).reshape(*shape[:3], outputs.shape[-1])
    if not np.isfinite(outputs).all():
        bad = int(np.flatnonzero(~np.isfinite(outputs).all(axis=(1, 2, 3)))[0])
        raise ValueError(
            f"function: expected finite outputs, got an entry that is not finite for set {bad}: "
            f"{stacked[bad, 0]}"
        )
    return outputs


def _ratio(example: Counterexample) -> float:
    if example.tolerance == 0:  # As for f = 0 with atol = 0.
        return np.inf if example.violation else 0.0
    return example.violation / example.tolerance


def _one_line(value: np.ndarray) -> str:
    """One column as a flat list, several as a list of rows: short enough for a notebook."""
    flat = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
    text = np.array2string(
        flat, precision=3, suppress_small=True, separator=", ", threshold=80, max_line_width=10**6
    )
    return " ".join(text.split())
