"""Scores that are probabilities: the presence that a model gives, calibrated on other scenes.

Models are trained towards a presence of 1 for objects and 0 for none. How often an object of a
certain presence is right is another question, which scenes with known objects answer: a logistic
curve of the presence, fitted to it (Platt, 1999). It rises, so objects stay in their order and
average precision stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msdspn_jax import _check
from msdspn_jax._check import AnyArray

#: How close, in CLEVR units, an object of the same four words must be for a prediction to be right.
DISTANCE = 1.0
#: What the scores of a model are, for who reads them in a file.
SCORE = (
    f"the share of objects of such a score that are right, all four words and within {DISTANCE:g}"
    " units, as found on procedural scenes that the model was not trained on"
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

    Attributes:
        scale: of the presence; positive.
        offset: the score is 1 / (1 + exp(-(scale * presence + offset))).
        threshold: the score from which on to show objects, 0 to 1.
        scenes: how many scenes it was fitted to.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> calibration = Calibration(scale=8.0, offset=-4.0, threshold=0.5, scenes=1000)
        >>> float(calibration.score(0.5))
        0.5
    """

    scale: float
    offset: float
    threshold: float
    scenes: int

    def __post_init__(self) -> None:
        """Refuse what gives no score."""
        for name in ("scale", "offset", "threshold"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r:.80}")
        if not 0 < self.scale <= _LARGEST or not abs(self.offset) <= _LARGEST:
            raise ValueError(f"scale, offset: out of range, got {self.scale} and {self.offset}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a number from 0 to 1, got {self.threshold}")
        _check.require_positive("scenes", self.scenes)

    def score(self, presence: Float[AnyArray, "*any"] | float) -> Float[Array, "*any"]:
        """The probability that objects of this presence are right; jittable."""
        return jax.nn.sigmoid(self.scale * jnp.asarray(presence, jnp.float32) + self.offset)

    def to_json(self) -> dict[str, Any]:
        """As `Calibration(**...)` takes it."""
        return dataclasses.asdict(self)


def fit(
    presence: Float[np.ndarray, "scenes n"],
    right: Bool[np.ndarray, "scenes n"],
    num_objects: int,
) -> Calibration:
    """Fit a calibration: least logistic loss, by Newton's method; the threshold of the best F1.

    F1 is the harmonic mean of precision (how many of the shown objects are right) and recall (how
    many of the real objects are among them).

    Args:
        presence: of every predicted element.
        right: whether that element is right, see `clevr.metrics.right_within`.
        num_objects: real objects in all scenes together.

    Raises:
        ValueError: all elements are right, or none is; or more presence is not more often right.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> presence = rng.uniform(size=(500, 10)).astype(np.float32)
        >>> right = rng.uniform(size=presence.shape) < 1 / (1 + np.exp(4 - 8 * presence))
        >>> calibration = fit(presence, right, int(right.sum()))
        >>> 7 < calibration.scale < 9, -5 < calibration.offset < -3
        (True, True)
    """
    if right.all() or not right.any():
        raise ValueError("right: expected elements that are right and others that are not")
    x, y = np.asarray(presence, np.float64).ravel(), right.ravel()
    # Around the mean, in units of the spread: Newton's steps are good from the start.
    middle, spread = x.mean(), max(x.std(), 1e-12)
    design = np.stack([(x - middle) / spread, np.ones_like(x)], 1)
    # As Platt: not 1 and 0, so that what can be told apart has a finite curve.
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float(np.mean(np.logaddexp(0, logits) - target * logits))

    weights = np.zeros(2)
    for _ in range(100):
        share = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (share - target) / len(x)
        hessian = (design * (share * (1 - share))[:, None]).T @ design / len(x)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        length = 1.0
        while loss(weights - length * step) > loss(weights) and length > 1e-6:
            length /= 2
        weights = weights - length * step
        if np.abs(length * step).max() < 1e-10:
            break
    scale = float(weights[0] / spread)
    if not scale > 0:
        raise ValueError("presence: expected objects of more presence to be right more often")
    offset = float(weights[1] - scale * middle)
    score = 1 / (1 + np.exp(-(scale * x + offset)))
    return Calibration(
        scale=scale,
        offset=offset,
        threshold=round(_best_threshold(score, y, num_objects), 3),
        scenes=len(presence),
    )


def _best_threshold(score: np.ndarray, right: np.ndarray, num_objects: int) -> float:
    """Between the last element shown and the first that is not, where F1 is best."""
    order = np.argsort(-score, kind="stable")
    shown = np.arange(1, len(score) + 1)
    f1 = 2 * np.cumsum(right[order]) / (shown + num_objects)
    best = int(f1.argmax())
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
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], float]:
    """How well scores are kept: their means, and shares that are right, in bins of equal size.

    Returns:
        Mean score and share of right elements, a bin each, and the mean distance between the two:
        the expected calibration error.
    """
    order = np.argsort(np.ravel(score), kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    means = np.array([np.ravel(score)[group].mean() for group in groups])
    shares = np.array([np.ravel(right)[group].mean() for group in groups])
    sizes = np.array([len(group) for group in groups])
    return means, shares, float((np.abs(means - shares) * sizes).sum() / sizes.sum())
