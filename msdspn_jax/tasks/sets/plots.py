"""Figures of predicted sets beside their targets, where sets vary in size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from msdspn_jax.plots import PREDICTION, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOX = "#ffd60a"
"""Of predicted boxes: seen on most photographs, with its dark edge."""

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]
"""Of target [n, d] and prediction [m, d]."""


def point_sets(pairs: Pairs, names: Sequence[str]) -> Figure:
    """Sets in their first two features: rings are target elements, dots predicted ones."""
    figure, axes = _grid(len(pairs))
    plane = _plane(np.concatenate([elements for pair in pairs for elements in pair]))
    plane = plane[np.isfinite(plane).all(1)]
    if not len(plane):
        plane = np.array([[-1.0, -1.0], [1.0, 1.0]])
    margin = 0.08 * np.maximum(np.ptp(plane, axis=0), 1e-6)
    low, high = plane.min(0) - margin, plane.max(0) + margin
    for one, (target, prediction) in zip(axes, pairs, strict=True):
        one.scatter(*_plane(target).T, s=64, facecolors="none", edgecolors=SERIES[4], lw=1.3)
        one.scatter(*_plane(prediction).T, s=16, color=PREDICTION)
        one.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        one.spines[:].set_color("#d5d9e0")
    shown = " and ".join(names[:2])
    title = f"{shown}   rings: target elements   dots: predicted elements"
    figure.suptitle(title, fontsize=9, color="#555")
    return figure


def _plane(elements: np.ndarray) -> np.ndarray:
    if elements.shape[1] > 1:
        return elements[:, :2]
    return np.concatenate([elements, np.zeros_like(elements)], axis=1)


def boxes(images: UInt8[np.ndarray, "num side side 3"], pairs: Pairs) -> Figure:
    """Boxes on their images: thin ones are targets, thick ones predicted.

    Boxes are (x, y, w, h), centre and size, as shares of the image; further features are not drawn.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    edge = withStroke(linewidth=3, foreground="#222")
    figure, axes = _grid(len(pairs))
    for one, image, (target, prediction) in zip(axes, images, pairs, strict=True):
        side = len(image)
        one.imshow(image, extent=(0, side, side, 0))
        for elements, color, width in ((target, "white", 1.0), (prediction, BOX, 1.8)):
            for x, y, w, h in elements[:, :4] * side:
                corner = (x - w / 2, y - h / 2)
                box = Rectangle(corner, w, h, fill=False, edgecolor=color, lw=width)
                box.set_path_effects([edge])
                one.add_patch(box)
        one.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    figure.suptitle("white: target boxes   yellow: predicted boxes", fontsize=9, color="#555")
    return figure


def _grid(count: int) -> tuple[Figure, list[Any]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = new_figure(2.3 * columns, 2.3 * rows + 0.35)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
