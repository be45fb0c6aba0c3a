"""Figures: sets beside sets, the inner loop at work, training curves, comparisons.

Every function returns a ``matplotlib.figure.Figure`` and touches no global state; `save` writes it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from msdspn_jax._files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET, PREDICTION = "#9aa3b2", "#d1495b"
SERIES = (
    "#00798c", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#8e5ea2", "#7f5539",
)  # fmt: skip
NIGHT = "#12151c"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window, width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path, *, dpi: int = 130, tight: bool = False) -> None:
    """Write a figure to a PNG file, whole or not at all.

    Args:
        figure: any figure of Matplotlib's.
        path: the file; folders are made where needed.
        dpi: pixels an inch.
        tight: cut to what is drawn, also where that lies outside the figure.
    """
    png = io.BytesIO()
    figure.savefig(
        png,
        dpi=dpi,
        format="png",
        facecolor=figure.get_facecolor(),
        bbox_inches="tight" if tight else None,
    )
    write_bytes(path, png.getvalue())


# --- sets ---


def point_sets(
    prediction: Float[np.ndarray, "sets n d"],
    target: Float[np.ndarray, "sets n d"],
    *,
    names: Sequence[str] | None = None,
) -> Figure:
    """Predicted against target sets in their first two dimensions, matched pairs joined by a line.

    A ring is a target element, a dot a predicted one. Sets of one dimension are drawn on a line.
    """
    count = len(target)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = new_figure(2.3 * columns, 2.3 * rows + 0.35)
    limit = 1.12 * max(np.abs(target[..., :2]).max(), np.abs(prediction[..., :2]).max(), 1e-3)
    for i, axes in enumerate(_grid(figure, rows, columns)):
        if i >= count:
            axes.set_visible(False)
            continue
        a, b = _plane(prediction[i]), _plane(target[i])
        order = _matched(prediction[i], target[i])
        for p, t in zip(a, b[order], strict=True):
            axes.plot(*zip(p, t, strict=True), color=PREDICTION, lw=0.8, alpha=0.6, zorder=1)
        axes.scatter(*b.T, s=64, facecolors="none", edgecolors=SERIES[4], lw=1.3, zorder=2)
        axes.scatter(*a.T, s=16, color=PREDICTION, zorder=3)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("#d5d9e0")
        if names is not None:
            axes.set_title(names[i], fontsize=9)
    figure.suptitle("rings: target elements   dots: predicted elements", fontsize=9, color="#555")
    return figure


def _plane(elements: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    if elements.shape[1] > 1:
        return elements[:, :2]
    return np.concatenate([elements, np.zeros_like(elements)], axis=1)


def _matched(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    if not np.isfinite(prediction).all():
        return np.arange(len(prediction))
    return linear_sum_assignment(((prediction[:, None] - target[None]) ** 2).sum(-1))[1]


def digits(rows: Mapping[str, Float[np.ndarray, "sets n 4"]]) -> Figure:
    """Digits as points, one row of sets for each name: ``{"target": …, "iDSPN": …}``.

    An element's place is its (x, y) as in the digits task, its size and colour its intensity; the
    less present, the fainter.
    """
    count = max(len(sets) for sets in rows.values())
    figure = new_figure(1.15 * count + 0.55, 1.2 * len(rows) + 0.05)
    figure.set_facecolor(NIGHT)
    for r, (name, sets) in enumerate(rows.items()):
        for c, elements in enumerate(sets):
            axes = figure.add_subplot(len(rows), count, r * count + c + 1)
            _digit(axes, elements)
            if c == 0:
                axes.set_ylabel(name, color="#e6e9ef", fontsize=11)
    return figure


def _digit(axes: Axes, elements: Float[np.ndarray, "n 4"]) -> None:
    x, y, intensity, presence = np.nan_to_num(elements).T
    # The dimmest last, so that bright elements are not hidden under them.
    order = np.argsort(-intensity)
    shown = order[presence[order] > 0.05]
    axes.scatter(
        x[shown],
        y[shown],
        s=6 + 34 * np.clip(intensity[shown], 0, 1),
        c=np.clip(intensity[shown], 0, 1),
        cmap="YlOrBr_r",
        vmin=-0.15,
        vmax=1.1,
        alpha=np.clip(presence[shown], 0, 1),
        linewidths=0,
    )
    axes.set(xlim=(-2.15, 2.15), ylim=(2.15, -2.15), aspect="equal", xticks=[], yticks=[])
    axes.set_facecolor(NIGHT)
    axes.spines[:].set_visible(False)


def strip(
    trajectory: Float[np.ndarray, "steps n d"],
    target: Float[np.ndarray, "n d"],
    *,
    as_digits: bool = False,
    energy: Float[np.ndarray, " steps"] | None = None,
    frames: int = 8,
) -> Figure:
    """The set moving from its initial state to the prediction; the target last."""
    # Most of the way is made in the first steps.
    last = len(trajectory) - 1
    steps = np.unique(np.round(last * np.linspace(0, 1, min(frames, last + 1)) ** 2).astype(int))
    figure = new_figure(1.45 * (len(steps) + 1), 1.85)
    if as_digits:
        figure.set_facecolor(NIGHT)
    ink = "#e6e9ef" if as_digits else "#333"
    limit = 1.15 * max(np.abs(_plane(target)).max(), np.abs(_plane(trajectory[-1])).max(), 1e-3)
    for i in range(len(steps) + 1):
        axes = figure.add_subplot(1, len(steps) + 1, i + 1)
        final = i == len(steps)
        elements = target if final else trajectory[steps[i]]
        if as_digits:
            _digit(axes, elements)
        else:
            ring = _plane(target)
            axes.scatter(*ring.T, s=56, facecolors="none", edgecolors=SERIES[4], lw=1.2)
            if not final:
                axes.scatter(*_plane(elements).T, s=16, color=PREDICTION)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#d5d9e0")
        title = "target" if final else f"step {steps[i]}"
        if energy is not None and not final:
            title += f"\nE {energy[steps[i]]:.2g}"
        axes.set_title(title, fontsize=8, color=ink)
    return figure


# --- curves ---


def inner_curves(
    energy: Float[np.ndarray, "steps sets"], gradient_norm: Float[np.ndarray, "steps sets"]
) -> Figure:
    """Energy and gradient norm over the inner steps: the median of the sets, and each of them."""
    figure = new_figure(8, 3)
    for i, (label, values) in enumerate({"energy": energy, "gradient norm": gradient_norm}.items()):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.plot(values, color=SERIES[0], alpha=0.25, lw=0.8)
        axes.plot(np.median(values, axis=1), color=SERIES[0], lw=2)
        _log_if_positive(axes, values)
        axes.set(xlabel="inner step", title=label)
        plain_axes(axes)
    return figure


def training_curves(lines: Sequence[Mapping[str, Any]], *, name: str = "loss") -> Figure:
    """A metric over the steps from the lines of metrics.jsonl; bands are ± one deviation."""
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot()
    everything = []
    for color, split in zip((TARGET, SERIES[0], SERIES[1]), ("train", "val", "test"), strict=True):
        of_split = [x for x in lines if x["split"] == split and x.get(name) is not None]
        if not of_split:
            continue
        steps = np.array([x["step"] for x in of_split])
        values = np.array([x[name] for x in of_split], float)
        spread = np.array([x.get(f"{name}_std") or 0.0 for x in of_split], float)
        marker = "o" if split != "train" else None
        axes.plot(steps, values, color=color, lw=1.8, marker=marker, ms=3.5, label=split)
        if spread.any():
            low = np.maximum(values - spread, values.min() / 2)
            axes.fill_between(steps, low, values + spread, color=color, alpha=0.2, lw=0)
        everything.append(values)
    if everything:
        _log_if_positive(axes, np.concatenate(everything))
        axes.legend(frameon=False)
    axes.set(xlabel="training step", ylabel=name)
    plain_axes(axes)
    return figure


def learning_curves(
    runs: Mapping[str, Sequence[tuple[int, float, float]]],
    *,
    ylabel: str,
    percent: bool = False,
    level: tuple[str, float] | None = None,
) -> Figure:
    """A validation metric by training steps (left) and by hours of training (right).

    Args:
        runs: label -> (step, hours, value) of every evaluation.
        ylabel: what the metric is called.
        percent: the metric is a share; otherwise its axis is logarithmic.
        level: label and value, in the units of the axis, of a line to compare with.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    everything = []
    if level is not None:
        for axes in (left, right):
            axes.axhline(level[1], color="#555555", lw=1, ls="--", label=level[0])
    for number, (label, curve) in enumerate(runs.items()):
        steps, hours, values = np.reshape(curve, (-1, 3)).T
        values = values * (100 if percent else 1)
        style = {"color": SERIES[number % len(SERIES)], "lw": 1.6, "marker": "o", "ms": 3}
        left.plot(steps, values, label=label, **style)
        right.plot(hours, values, **style)
        everything.append(values)
    if percent:
        left.set_ylim(-3, 103)
    else:
        _log_if_positive(left, np.concatenate(everything))
    left.set(xlabel="training step", ylabel=ylabel)
    right.set(xlabel="hours of training")
    # Above: inside, long labels hide the curves.
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False,
        fontsize=8,
    )  # fmt: skip
    for axes in (left, right):
        plain_axes(axes)
    return figure


def lines(
    series: Mapping[str, Sequence[float] | np.ndarray], *, xlabel: str, ylabel: str
) -> Figure:
    """Curves on a logarithmic axis (where all values are positive), one colour a series."""
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot()
    for color, (label, values) in zip(SERIES, series.items(), strict=False):
        axes.plot(np.asarray(values), color=color, lw=1.6, label=label)
    _log_if_positive(axes, np.concatenate([np.ravel(v) for v in series.values()]))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    plain_axes(axes)
    return figure


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
) -> Figure:
    """Bars side by side: one cluster a group, one colour a series; NaN leaves a gap."""
    figure = new_figure(max(4.5, 0.5 * len(groups) * len(series) + 1.5), 3.4)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        color = SERIES[i % len(SERIES)]
        axes.bar(x, np.asarray(values, float), 0.92 * width, color=color, label=label)
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set(ylabel=ylabel)
    # Above the bars: inside there may be no room.
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False, fontsize=8)
    plain_axes(axes)
    return figure


def by_decoding(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    published: Mapping[str, Mapping[int, float]],
    *,
    ylabel: str,
) -> Figure:
    """A loss by the inner steps of decoding, beside published values; one panel a model.

    Args:
        panels: model -> how it was trained -> inner steps of decoding -> loss.
        published: model -> inner steps of training and decoding -> loss.
        ylabel: what the loss is.
    """
    from matplotlib.ticker import LogLocator

    figure = new_figure(3.1 * len(panels) + 0.6, 3.6)
    shared: Any = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    everywhere = dict.fromkeys(label for curves in panels.values() for label in curves)
    colors = dict(zip(everywhere, SERIES * len(everywhere), strict=False))
    shown: dict[str, Any] = {}
    for axes, (model, curves) in zip(shared, panels.items(), strict=True):
        for label, losses in curves.items():
            (shown[label],) = axes.plot(*zip(*sorted(losses.items()), strict=True), "o-", ms=4,
                                        lw=1.6, color=colors[label])  # fmt: skip
        points = sorted(published.get(model, {}).items())
        if points:
            (shown["published, trained as it is decoded"],) = axes.plot(
                *zip(*points, strict=True), "D", ms=7, mfc="none", mec="#20242c", mew=1.6
            )
        axes.set_title(model, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="inner steps of decoding")
        plain_axes(axes)
    steps = {n for curves in (*panels.values(), published) for of in curves.values() for n in of}
    shared[0].set_xticks(sorted(steps), [str(n) for n in sorted(steps)])
    shared[0].minorticks_off()
    shared[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    shared[0].yaxis.set_major_formatter("{x:g}")
    shared[0].set_ylabel(ylabel)
    figure.legend(
        shown.values(), shown, loc="outside upper center", ncols=3, frameon=False, fontsize=8
    )
    return figure


# --- small things ---


def _grid(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def _log_if_positive(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        # Within one decade the minor ticks are the only ones: label them, plainly.
        narrow = finite.max() < 10 * finite.min()
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        if narrow:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain if narrow else NullFormatter())


def plain_axes(axes: Axes) -> None:
    """Leave only the axes themselves and faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e7eaef", lw=0.7)
    axes.set_axisbelow(True)
