"""Scores that are probabilities: what a model gives, calibrated on scenes with known objects.

Models are trained towards a presence of 1 for objects and 0 for none. Whether an object is *right*,
all four attributes and nearly the place, is another question: it depends as well on how clear the
attributes are. The score is a logistic curve (Platt, 1999) of two numbers: the presence, and the
lead, by how much the most doubtful of the four attributes beats the next one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msdspn_jax._check import AnyArray
from msdspn_jax.clevr.metrics import Reliability
from msdspn_jax.clevr.objects import CLEVR_LAYOUT

#: How close, in CLEVR units, an object of the same attributes must be for a prediction to be right.
DISTANCE = 1.0
#: What the scores of a model are, for who reads them in a file.
SCORE = (
    "the share of objects of such a score that are right, all four attributes and within"
    f" {DISTANCE:g} units, as found on procedural scenes that the model was not trained on"
)
NO_PROBABILITY = (
    "the presence that the model gave: it was trained towards 1 for objects and 0 for none;"
    " no probability, and may lie outside of 0 to 1"
)
_LARGEST = 1e6
_BINS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What makes a score of a presence, and from which score on an object is shown.

    The score is 1 / (1 + exp(-(presence * p + lead * l + offset))) of an object with presence p
    and lead l.

    Attributes:
        presence: weight of the presence; positive.
        lead: weight of the lead; at least 0.
        offset: a constant.
        threshold: the score from which on to show objects, 0 to 1.
        scenes: how many scenes it was fitted to.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> calibration = Calibration(
        ...     presence=8.0, lead=0.0, offset=-4.0, threshold=0.5, scenes=1000
        ... )
        >>> nobody = np.zeros((1, 19))
        >>> bool(calibration.score(nobody)[0] < 0.02)
        True
    """

    presence: float
    lead: float
    offset: float
    threshold: float
    scenes: int

    def __post_init__(self) -> None:
        """Refuse what gives no score."""
        for name in ("presence", "lead", "offset", "threshold", "scenes"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not abs(value) <= _LARGEST:
                raise ValueError(f"{name}: expected a number up to {_LARGEST:g}, got {value!r:.80}")
        if not (self.presence > 0 and self.lead >= 0):
            raise ValueError(
                f"presence, lead: expected > 0 and >= 0, got {self.presence} and {self.lead}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a number from 0 to 1, got {self.threshold}")

    def score(self, sets: Float[AnyArray, "*sets n 19"]) -> Float[Array, "*sets n"]:
        """The probability of every element of sets to be right; jittable."""
        presence, lead = jnp.unstack(jnp.asarray(clues(jnp.asarray(sets))), axis=-1)
        return jax.nn.sigmoid(self.presence * presence + self.lead * lead + self.offset)

    def to_json(self) -> dict[str, Any]:
        """As `Calibration(**...)` takes it."""
        return dataclasses.asdict(self)


def clues(sets: Float[AnyArray, "*sets n 19"]) -> Float[AnyArray, "*sets n 2"]:
    """What the score of an element depends on: its presence, and its lead."""
    xp = jnp if isinstance(sets, jax.Array) else np
    leads = []
    for features in CLEVR_LAYOUT.attributes.values():
        best = xp.sort(sets[..., features], axis=-1)
        leads.append(best[..., -1] - best[..., -2])
    lead = xp.min(xp.stack(leads), axis=0)
    return xp.stack([sets[..., CLEVR_LAYOUT.presence], lead], axis=-1)


def fit(
    sets: Float[np.ndarray, "scenes n 19"],
    right: Bool[np.ndarray, "scenes n"],
    num_objects: int,
) -> Calibration:
    """Fit a calibration: least logistic loss, by Newton's method; the threshold of the best F1.

    F1 is the harmonic mean of precision (how many of the shown objects are right) and recall (how
    many of the real objects are among them).

    Args:
        sets: predicted, as the model gives them.
        right: whether each element is right, see `clevr.metrics.right_within`.
        num_objects: real objects in all scenes together.

    Raises:
        ValueError: all elements are right, or none is; or more presence is not more often right.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> sets = rng.uniform(size=(500, 10, 19))
        >>> chance = 1 / (1 + np.exp(4 - 8 * sets[..., 18]))
        >>> right = rng.uniform(size=chance.shape) < chance
        >>> calibration = fit(sets, right, int(right.sum()))
        >>> 7 < calibration.presence < 9, calibration.lead < 1
        (True, True)
    """
    if right.all() or not right.any():
        raise ValueError("right: expected elements that are right and others that are not")
    x = np.asarray(clues(np.asarray(sets, np.float64))).reshape(-1, 2)
    y = np.asarray(right).ravel()
    # As Platt: not 1 and 0, so that what can be told apart has a finite curve.
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    presence, lead, offset = _logistic(x, target)
    if lead < 0:  # Noise: clear words make no object less likely.
        (presence, offset), lead = _logistic(x[:, :1], target), 0.0
    if not presence > 0:
        raise ValueError("sets: expected elements of more presence to be right more often")
    score = 1 / (1 + np.exp(-(x @ np.array([presence, lead]) + offset)))
    return Calibration(
        presence=float(presence),
        lead=float(lead),
        offset=float(offset),
        threshold=round(_best_threshold(score, y, num_objects), 3),
        scenes=len(sets),
    )


def _logistic(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights of the columns of ``x`` and a constant, of least logistic loss."""
    # Around the mean, in units of the spread: Newton's steps are good from the start.
    middle, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-12)
    design = np.concatenate([(x - middle) / spread, np.ones((len(x), 1))], axis=1)

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float(np.mean(np.logaddexp(0, logits) - target * logits))

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        share = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (share - target) / len(x)
        hessian = (design * (share * (1 - share))[:, None]).T @ design / len(x)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(len(weights)), gradient)
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-10:
            step /= 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    scaled = weights[:-1] / spread
    return np.append(scaled, weights[-1] - scaled @ middle)


def _best_threshold(score: np.ndarray, right: np.ndarray, num_objects: int) -> float:
    """Between the last element shown and the first that is not, where F1 is best."""
    order = np.argsort(-score, kind="stable")
    shown = np.arange(1, len(score) + 1)
    f1 = 2 * np.cumsum(right[order]) / (shown + num_objects)
    # A threshold shows all elements of one score or none.
    ends = np.append(np.diff(score[order]) != 0, True)
    best = int(np.where(ends, f1, -1).argmax())
    after = score[order[best + 1]] if best + 1 < len(score) else 0.0
    return float((score[order[best]] + after) / 2)


def precision_and_recall(
    score: Float[np.ndarray, "*any"],
    right: Bool[np.ndarray, "*any"],
    num_objects: int,
    threshold: float,
) -> tuple[float, float]:
    """Of what is shown at a threshold: the share that is right; the share of objects among it."""
    shown = np.asarray(score) > threshold
    hits = int((shown & right).sum())
    return hits / max(int(shown.sum()), 1), hits / max(num_objects, 1)


def reliability(
    score: Float[np.ndarray, "*any"], right: Bool[np.ndarray, "*any"], bins: int = _BINS
) -> Reliability:
    """How well scores are kept, in bins of equal width from 0 to 1; empty ones are left out.

    Most scores are near 0 or 1, so bins of equal number would say nothing of those between.
    """
    score, right = np.ravel(score), np.ravel(right)
    of = np.clip((score * bins).astype(int), 0, bins - 1)
    number = np.bincount(of, minlength=bins)
    there = number > 0
    means, shares = (
        np.bincount(of, weights=x, minlength=bins)[there] / number[there] for x in (score, right)
    )
    number = number[there]
    error = float((np.abs(means - shares) * number).sum() / number.sum())
    return Reliability(means, shares, number, error)
