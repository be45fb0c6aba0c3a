"""CLEVR figures: objects drawn into their image and put in words, and where a model errs.

Every function returns a ``matplotlib.figure.Figure``; `plots.save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from msdspn_jax import _check
from msdspn_jax.clevr import objects
from msdspn_jax.clevr.camera import IMAGE_HEIGHT, Camera, look_at_origin, project
from msdspn_jax.clevr.metrics import PrecisionRecall, Reliability
from msdspn_jax.clevr.objects import ClevrObject
from msdspn_jax.matching.assignment import UNMATCHED, assign
from msdspn_jax.plots import SERIES, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRONG, QUIET, INK = "#c8102e", "#8d96a3", "#20242c"
_COLUMNS = ("size", "color", "material", "shape")
# Many of one size, or each of its own.
_Images = UInt8[np.ndarray, "images height width 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]]
_Sets = Float[np.ndarray, "images _ 19"] | Sequence[Float[np.ndarray, "_ 19"]]

# Positions of the columns of words, in shares of the width of their panel.
_PLACES = {"number": 0.0, "size": 0.09, "color": 0.25, "material": 0.43, "shape": 0.61}
_NUMBERS = {"distance": 0.93, "score": 1.08}
# Of the names in an image: their size, their height in shares of the image's, and the mean width
# of a letter in shares of that.
_NAME_POINTS, _NAME_HEIGHT, _LETTER_WIDTH = 7, 0.042, 0.58


def scene(
    image: UInt8[np.ndarray, "height width 3"],
    prediction: Float[np.ndarray, "n 19"],
    target: Float[np.ndarray, "m 19"] | None = None,
    *,
    camera: Camera | None = None,
    threshold: float = objects.PRESENCE_THRESHOLD,
    title: str = "",
) -> Figure:
    """One image, with its predicted (and true) objects drawn in and listed in words beside it.

    See `scenes`, of which this is one panel.
    """
    targets = None if target is None else [target]
    return scenes(
        [image],
        [prediction],
        targets,
        cameras=[camera],
        threshold=threshold,
        titles=[title],
        columns=1,
    )


def scenes(
    images: _Images,
    predictions: _Sets,
    targets: _Sets | None = None,
    *,
    cameras: Sequence[Camera | None] | None = None,
    threshold: float = objects.PRESENCE_THRESHOLD,
    titles: Sequence[str] | None = None,
    columns: int = 2,
) -> Figure:
    """A grid of images with their objects.

    A predicted object is a circle, as large as its size says, in its predicted color, with its
    number, color and shape beside it. A true object is a dashed white circle, and a line joins it
    to the prediction it is paired with (the assignment of least squared distance over all
    features). In the list beside the image, wrong attributes are red, with the distance in CLEVR
    units and the score behind; then come the true objects that no prediction was left for, and
    predictions of no object are red altogether. A name in the image is red if any of the four
    attributes is wrong, or if the object was missed. The image is drawn at about 480 x 320 pixels,
    CLEVR's own.

    Args:
        images: any size; squashed ones are shown in the camera's proportions again.
        predictions: in the CLEVR layout; elements with presence above ``threshold`` are shown.
        targets: true sets, in the same layout; None where they are not known.
        cameras: of the images; None for the generator's mean camera, from which the true one is
            up to 0.5 units away along each axis.
        threshold: on the predicted presence.
        titles: one a panel.
        columns: panels side by side.

    Raises:
        ValueError: lengths differ, or there is nothing to show.
    """
    number = len(images)
    _check.require_positive("columns", columns)
    if not number:
        raise ValueError("images: expected at least one, got none")
    for name, values in (("predictions", predictions), ("targets", targets), ("cameras", cameras)):
        if values is not None and len(values) != number:
            raise ValueError(f"{name}: expected one entry an image, {number}, got {len(values)}")
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = new_figure(7.6 * columns, 2.75 * rows)
    panels = np.atleast_2d(np.array(figure.subfigures(rows, columns, wspace=0.02), object))
    for i, panel in enumerate(panels.reshape(-1)[:number]):
        picture, words = panel.subplots(1, 2, width_ratios=[1.15, 1])
        camera = (cameras[i] if cameras else None) or look_at_origin()
        found = objects.decode(np.asarray(predictions[i]), threshold=threshold)
        true = None if targets is None else objects.decode(np.asarray(targets[i]))
        partner = _pair(found, true or [])
        _draw_image(picture, images[i], camera, found, true or [], partner)
        _draw_words(words, found, true, partner)
        if titles and titles[i]:
            # A title is often a file's name: dollars in it mean no formula.
            title = _drawable(titles[i])
            picture.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    return figure


def average_precision_by_steps(
    scores: Mapping[int, Float[np.ndarray, " thresholds"]],
    thresholds: Sequence[float],
    *,
    protocol: str,
) -> Figure:
    """Test-time compute: average precision by number of inner steps, a line a threshold."""
    from matplotlib import colormaps

    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    steps = sorted(scores)
    table = 100 * np.array([scores[step] for step in steps])
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(thresholds)))
    for column, threshold, color in zip(table.T, thresholds, shades, strict=True):
        label = "AP" + ("∞" if np.isinf(threshold) else f"{threshold:g}")
        axes.plot(steps, column, "o-", color=color, ms=4, lw=1.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set(xlabel="inner steps at evaluation", ylabel=f"average precision, % ({protocol})")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8)
    plain_axes(axes)
    return figure


def curves_by_model(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, metric: str = "ap_0.5"
) -> Figure:
    """Training loss (left) and a validation score (right) over the steps, one line a run.

    Args:
        runs: label -> lines of metrics.jsonl. Losses of models of different kinds are in different
            units, so lines within a run are comparable and lines of different runs need not be.
        metric: which value of the validation lines, in [0, 1].
    """
    figure = new_figure(8.4, 3.3)
    left, right = figure.subplots(1, 2)
    for (label, lines), color in zip(runs.items(), _cycle(len(runs)), strict=True):
        train = [(x["step"], x["loss"]) for x in lines if x["split"] == "train"]
        found = [(x["step"], 100 * x[metric]) for x in lines if x["split"] == "val"]
        left.plot(*np.reshape(train, (-1, 2)).T, color=color, lw=1.5, label=label)
        right.plot(*np.reshape(found, (-1, 2)).T, "o-", color=color, ms=4, lw=1.5, label=label)
    left.set(xlabel="training step", ylabel="training loss, each model's own", yscale="log")
    name = metric.replace("ap_", "AP").replace("inf", "∞")
    right.set(xlabel="training step", ylabel=f"validation {name}, % (per image)")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        plain_axes(axes)
    return figure


def reliability(
    curves: Mapping[str, Reliability],
    *,
    threshold: float,
    by_threshold: tuple[Float[np.ndarray, " t"], ...],
) -> Figure:
    """How well scores are kept (left), and what a threshold on them keeps (right).

    Args:
        curves: name -> what `calibration.reliability` returns. Bars are standard errors; the
            numbers are those of the elements in the bins of the last curve.
        threshold: the default.
        by_threshold: thresholds; precision and recall at each.
    """
    figure = new_figure(8.4, 3.5)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color=QUIET, lw=0.9, ls=(0, (3, 2)))
    for (name, curve), color in zip(curves.items(), _cycle(len(curves)), strict=True):
        spread = np.sqrt(curve.right * (1 - curve.right) / curve.number)
        label = f"{name} (off by {100 * curve.error:.1f} points)"
        left.errorbar(
            curve.score, curve.right, spread, fmt="o-", color=color, ms=4, lw=1.5, label=label
        )
    last = list(curves.values())[-1]
    for x, y, number in zip(last.score, last.right, last.number, strict=True):
        below = (4, -10) if y > 0.5 else (4, -3)
        left.annotate(
            f"{number:,}", (x, y), xytext=below, textcoords="offset points", fontsize=6.5,
            color="#555555",
        )  # fmt: skip
    left.set(xlabel="score", ylabel="share that is right", ylim=(-0.02, 1.02))
    thresholds, precision, recall = by_threshold
    for values, name, color in zip(
        (precision, recall), ("precision", "recall"), SERIES, strict=False
    ):
        right.plot(thresholds, values, color=color, lw=1.5, label=name)
    right.axvline(threshold, color=QUIET, lw=0.9, ls=(0, (3, 2)), label=f"default, {threshold:g}")
    right.set(xlabel="threshold on the score", xlim=(0, 1), ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        plain_axes(axes)
    return figure


def precision_recall_curves(curves: Mapping[str, PrecisionRecall]) -> Figure:
    """Precision against recall over the whole data set, one line a name."""
    figure = new_figure(4.2, 3.6)
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), _cycle(len(curves)), strict=True):
        axes.plot(curve.recall, curve.precision, color=color, lw=1.5, label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    plain_axes(axes)
    return figure


def errors(
    by_attribute: Mapping[str, Mapping[str, float]],
    by_number: Mapping[str, Mapping[int, float]],
    *,
    number_label: str = "mean distance, CLEVR units",
) -> Figure:
    """Where models err: share of wrong attributes (left), an error by number of objects (right).

    Args:
        by_attribute: model -> attribute -> share of objects that have it wrong, in [0, 1].
        by_number: model -> number of objects in the image -> error.
        number_label: what that error is.
    """
    figure = new_figure(8.4, 3.3)
    left, right = figure.subplots(1, 2)
    models = list(by_attribute)
    for k, (model, color) in enumerate(zip(models, _cycle(len(models)), strict=True)):
        names = list(by_attribute[model])
        places = np.arange(len(names)) + (k - (len(models) - 1) / 2) * 0.8 / len(models)
        values = [100 * by_attribute[model][name] for name in names]
        left.bar(places, values, 0.8 / len(models), color=color, label=model)
        left.set_xticks(np.arange(len(names)), names)
        numbers = sorted(by_number[model])
        right.plot(numbers, [by_number[model][n] for n in numbers], "o-", color=color, ms=4)
    left.set(ylabel="wrong, % of objects")
    right.set(xlabel="objects in the image", ylabel=number_label)
    right.set_xticks(sorted({n for numbers in by_number.values() for n in numbers}))
    right.set_ylim(bottom=0)
    if len(models) > 1:
        left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        plain_axes(axes)
    return figure


def _drawable(text: str) -> str:
    """On one short line, with boxes for the letters that no font here has."""
    from matplotlib import font_manager

    fonts = []
    for family in font_manager.FontProperties().get_family():
        of_family = font_manager.FontProperties(family=[family])
        fonts.append(font_manager.get_font(font_manager.findfont(of_family)))
    shown = "".join(
        c if c.isprintable() and any(font.get_char_index(ord(c)) for font in fonts) else "□"
        for c in text[:60]
    )
    return shown if len(text) <= 60 else f"{shown[:57]}…"


def _pair(found: list[ClevrObject], true: list[ClevrObject]) -> list[int]:
    """For every prediction the index of its true object, or `UNMATCHED`."""
    if not found or not true:
        return [UNMATCHED] * len(found)
    a, b = (objects.encode(each)[: len(each)] for each in (found, true))
    cost = ((a[:, None] - b[None]) ** 2).sum(-1)
    return np.asarray(assign(jnp.asarray(cost), method="host")).tolist()


def _draw_image(
    axes: Axes,
    image: UInt8[np.ndarray, "height width 3"],
    camera: Camera,
    found: list[ClevrObject],
    true: list[ClevrObject],
    partner: list[int],
) -> None:
    from matplotlib.patheffects import withStroke

    height = float(IMAGE_HEIGHT)
    width = height * camera.aspect
    axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    outline = [withStroke(linewidth=2.2, foreground="#000000c0")]
    discs = [_disc(camera, o, width, height) for o in found]
    for o in true:
        (x, y), radius = _disc(camera, o, width, height)
        ring: Any = _circle(x, y, radius, color="white", lw=0.9, ls=(0, (3, 2)))
        axes.add_patch(ring)
    missed = [o for i, o in enumerate(true) if i not in partner]
    names = [f"{number} {o.color} {o.shape}" for number, o in enumerate(found, 1)]
    names += [f"missed: {o.color} {o.shape}" for o in missed]
    around = discs + [_disc(camera, o, width, height) for o in missed]
    places = _places([len(name) for name in names], around, width, height)
    wrong = [
        bool(true) and (matched == UNMATCHED or o.words != true[matched].words)
        for o, matched in zip(found, partner, strict=True)
    ]
    for name, place, red in zip(names, places, wrong + [True] * len(missed), strict=True):
        axes.annotate(
            name, place, ha="center", va="center", fontsize=_NAME_POINTS, weight="bold",
            color="#ff98a4" if red else "white", path_effects=outline, annotation_clip=False,
        )  # fmt: skip
    for o, matched, ((x, y), radius) in zip(found, partner, discs, strict=True):
        rgb = np.array(objects.COLOR_RGB[objects.COLORS.index(o.color)]) / 255
        ring = _circle(x, y, radius, color=rgb, lw=1.5)
        ring.set_path_effects([withStroke(linewidth=2.8, foreground="#ffffffb0")])
        axes.add_patch(ring)
        if matched != UNMATCHED:
            there, _ = _disc(camera, true[matched], width, height)
            axes.plot([x, there[0]], [y, there[1]], color="white", lw=0.9, path_effects=outline)


def _places(
    lengths: Sequence[int], discs: Sequence[tuple[Any, float]], width: float, height: float
) -> list[tuple[float, float]]:
    """Where to write names of so many letters: close to their circles, over little else.

    Names come one after the other; each takes the best of the places around its circle, by what it
    would cover of the names before, of circles, and of the outside of the image.
    """
    tall = _NAME_HEIGHT * height
    boxes: list[tuple[float, float, float, float]] = []
    places = []
    for i, (length, ((x, y), radius)) in enumerate(zip(lengths, discs, strict=True)):
        wide = _LETTER_WIDTH * tall * length
        beside, above = radius + wide / 2 + 2, radius + tall / 2 + 1
        around = [(0, above), (0, -above), (beside, 0), (-beside, 0)]
        around += [(a * beside * 0.7, b * above * 0.8) for a in (1, -1) for b in (1, -1)]
        around += [(0, above + tall), (0, -above - tall), (0, 0)]

        def cost(place: tuple[float, float], x=x, y=y, wide=wide, i=i) -> float:
            box = _box(x + place[0], y + place[1], wide, tall)
            inside = _common(box, (0, 0, width, height))
            names = sum(_common(box, other) for other in boxes)
            circles = sum(
                _common(box, _box(u, v, 1.6 * r, 1.6 * r)) * (0.5 if k == i else 1)
                for k, ((u, v), r) in enumerate(discs)
            )
            far = np.hypot(*place) / (x + y + height)
            return 5 * (wide * tall - inside) + 4 * names + circles + far

        dx, dy = min(around, key=cost)
        boxes.append(_box(x + dx, y + dy, wide, tall))
        places.append((float(x + dx), float(y + dy)))
    return places


def _box(x: float, y: float, wide: float, tall: float) -> tuple[float, float, float, float]:
    return x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2


def _common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    sides = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    return max(sides[0], 0.0) * max(sides[1], 0.0)


def _circle(x: float, y: float, radius: float, **style):
    from matplotlib.patches import Circle

    return Circle((x, y), radius, fill=False, clip_on=True, **style)


def _disc(camera: Camera, o: ClevrObject, width: float, height: float):
    """Where an object's centre and its size come to lie in the image."""
    centre = np.array(o.position)
    radius = objects.SIZE_RADIUS[objects.SIZES.index(o.size)]
    points = np.stack([centre, centre + radius * camera.matrix_world[:3, 0]])
    middle, side = project(camera, points, width, height)[:, :2]
    return middle, float(np.linalg.norm(side - middle))


def _draw_words(
    axes: Axes,
    found: list[ClevrObject],
    true: list[ClevrObject] | None,
    partner: list[int],
) -> None:
    axes.set(xlim=(0, 1.1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    missed = [o for i, o in enumerate(true or []) if i not in partner]
    lines = 1 + len(found) + (1 + len(missed) if missed else 0)
    axes.set_ylim(max(lines, 11) - 0.5, -0.5)

    def write(x: float, line: int, text: str, color: str = INK, align: Any = "left") -> None:
        axes.text(x, line, text, fontsize=8, color=color, ha=align, va="center")

    for name in _COLUMNS:
        write(_PLACES[name], 0, name, QUIET)
    if true is not None:
        write(_NUMBERS["distance"], 0, "distance", QUIET, "right")
    write(_NUMBERS["score"], 0, "score", QUIET, "right")
    for line, (o, matched) in enumerate(zip(found, partner, strict=True), 1):
        match = true[matched] if true is not None and matched != UNMATCHED else None
        no_such = true is not None and match is None
        write(_PLACES["number"], line, str(line), QUIET)
        for name in _COLUMNS:
            word = getattr(o, name)
            wrong = no_such or (match is not None and getattr(match, name) != word)
            write(_PLACES[name], line, word, WRONG if wrong else INK)
        if match is not None:
            distance = float(np.linalg.norm(np.subtract(o.position, match.position)))
            write(_NUMBERS["distance"], line, f"{distance:.3f}", INK, "right")
        elif no_such:
            write(_NUMBERS["distance"], line, "–", WRONG, "right")
        write(_NUMBERS["score"], line, f"{o.score:.2f}", QUIET, "right")
    if missed:
        write(_PLACES["size"], len(found) + 1, "missed:", QUIET)
    for line, o in enumerate(missed, len(found) + 2):
        for name in _COLUMNS:
            write(_PLACES[name], line, getattr(o, name), WRONG)


def _cycle(number: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(number)]
