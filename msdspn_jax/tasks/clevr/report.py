"""``msdspn report clevr``: average precision of finished runs, and how they got there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from msdspn_jax import _markdown
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.clevr.config import Config
from msdspn_jax.tasks.runs import Runs
from msdspn_jax.tasks.summary import Result, write_results
from msdspn_jax.training.config import as_flags
from msdspn_jax.training.run_folder import (
    finished_runs,
    read_metrics,
    training_hours,
    validation_curve,
)

# What makes a run comparable with the published ones (paper, section 4.3).
PUBLISHED_SETTING = {"size": 128, "set_size": 10, "min_objects": 3, "max_objects": 10}
# Model, protocol, percent at the thresholds of metrics.AP_THRESHOLDS; as published.
PUBLISHED = (
    ("Slot MLP", "not known to us", ("19.8±1.6", "1.4±0.3", "0.3±0.2", "0.0", "0.0", "")),
    ("DSPN", "not known to us", ("85.2±4.8", "81.1±5.2", "47.4±17.6", "10.8±9.0", "0.6±0.7", "")),
    ("Slot Attention", "data set", ("94.3±1.1", "86.7±1.4", "56.0±3.6", "10.8±1.7", "0.9±0.2", "")),
    (
        "Slot Attention†",
        "data set",
        ("90.6±1.8", "89.1±2.1", "84.4±2.5", "50.3±3.8", "7.9±1.0", ""),
    ),
    (
        "iDSPN",
        "per image",
        ("98.8±0.5", "98.5±0.6", "98.2±0.6", "95.8±0.7", "76.9±2.5", "32.3±3.9"),
    ),
)
NAMES = {
    "idspn": "iDSPN",
    "dspn": "DSPN",
    "slot-attention": "Slot Attention",
    "slot-mlp": "Slot MLP",
}
# Settings that say where things lie, not what was done.
_PLACES = ("cache_dir", "data_dir")
PROTOCOLS = {"ap": "per image", "dataset_ap": "data set"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Collect the finished and evaluated runs of clevr into a table and curves.

    Writes results.md, results.json, curves.png (training loss, validation AP0.5) and learning.png
    (validation AP0.5 by steps and by hours). Run ``msdspn evaluate RUN`` for every run first: it
    makes the test scores.
    """

    runs: Path = Path("runs")
    """Folder to search for runs, at any depth."""
    out: Path | None = None
    """Where the report goes. Default: RUNS/report."""


class Row(NamedTuple):
    """A finished run: what it was, its curves, its scores on the test split in [0, 1]."""

    label: str
    config: Config
    curves: Sequence[Mapping[str, Any]]
    scores: Mapping[str, float]
    by_inner_steps: Mapping[str, Mapping[str, float]]
    """Scores on validation images by number of inner steps; empty without an inner loop."""
    hours: float
    learning: Sequence[tuple[int, float, float]]
    """Step, hours and validation AP0.5 at every evaluation."""

    @property
    def comparable(self) -> bool:
        """Whether it saw images like those of the published models."""
        return all(getattr(self.config, name) == value for name, value in PUBLISHED_SETTING.items())


def report(argv: list[str], runs: Runs) -> int:
    """Run the verb for this task; returns the exit code."""
    from msdspn_jax import plots
    from msdspn_jax._files import write_text
    from msdspn_jax._options import parse
    from msdspn_jax.clevr import plots as clevr_plots

    options = parse(Options, argv, prog="msdspn report clevr")
    out = options.out or options.runs / "report"
    rows = collect(options.runs, runs)
    text = table(rows) + inner_steps_table(rows)
    scores = [
        {
            "label": row.label,
            "config": {k: v for k, v in row.config.numerical().items() if k not in _PLACES},
            "test": row.scores,
            "by_inner_steps": row.by_inner_steps,
        }
        for row in rows
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "results.md", text)
        write_text(out / "results.json", json.dumps(scores, indent=1) + "\n")
        write_results(out, summary(rows))
        figure = clevr_plots.curves_by_model({row.label: row.curves for row in rows})
        plots.save(figure, out / "curves.png")
        learning = {row.label: row.learning for row in rows if row.learning}
        if learning:
            label = "validation AP0.5, % (per image)"
            figure = plots.learning_curves(learning, ylabel=label, percent=True)
            plots.save(figure, out / "learning.png")
    except OSError as error:
        raise UserError(
            f"--out: expected a folder that can be written, got {out} ({error.strerror})"
        ) from error
    print(text)
    print(f"written to {out}")
    return 0


def collect(folder: Path, runs: Runs) -> list[Row]:
    """The finished and evaluated runs below a folder, labelled by what tells them apart."""
    rows, waiting = [], []
    for run in finished_runs(folder, "clevr"):
        evaluation = run / "evaluation.json"
        scores = json.loads(evaluation.read_text())["metrics"] if evaluation.exists() else {}
        if "test" not in scores:
            waiting.append(run)
            continue
        config: Any = runs.read_config(run)[1]
        tried = run / "figures" / "inner_steps.json"
        by_steps = json.loads(tried.read_text()) if tried.exists() else {}
        rows.append(
            Row(
                "",
                config,
                read_metrics(run),
                scores["test"],
                by_steps,
                training_hours(run),
                validation_curve(run, "ap_0.5"),
            )
        )
    if waiting:
        names = ", ".join(map(str, waiting))
        raise UserError(
            "--runs: expected every finished run to be scored on the test split (msdspn evaluate "
            f"RUN), got some that are not: {names}"
        )
    if not rows:
        raise UserError(
            "--runs: expected a folder with finished runs of clevr (train one with 'msdspn train "
            f"clevr --run-dir RUN'), got {folder}"
        )
    return [row._replace(label=_label(row.config, rows)) for row in rows]


def _label(config: Config, rows: Sequence[Row]) -> str:
    """The model's name, and whatever else is not the same in all runs of that model."""
    alike = [_settings(row.config) for row in rows if row.config.model == config.model]
    words = [
        f"{flag[2:].replace('-', ' ')} {value}"
        for flag, value in _settings(config).items()
        if len({str(settings.get(flag)) for settings in alike}) > 1
    ]
    return ", ".join([NAMES[config.model], *words])


def _settings(config: Config) -> dict[str, Any]:
    values = config.resolved().numerical()
    return as_flags({name: value for name, value in values.items() if name not in _PLACES})


def table(rows: Sequence[Row]) -> str:
    """Average precision in percent, as Markdown; the published beside comparable runs."""
    lines = [
        [row.label, protocol, *(_percent(row.scores, f"{prefix}_{t:g}") for t in AP_THRESHOLDS)]
        for row in rows
        for prefix, protocol in PROTOCOLS.items()
    ]
    note = ""
    if any(row.comparable for row in rows):
        lines += [[f"{name}, published", protocol, *cells] for name, protocol, cells in PUBLISHED]
    else:
        note = (
            "\nNo run saw 128 x 128 images of up to ten objects, so none is set beside the"
            " published ones.\n"
        )
    return _markdown.table(["model", "protocol", *AP_NAMES], lines) + note


def summary(rows: Sequence[Row]) -> list[Result]:
    """Rows for the README: AP0.5 per image of every model."""
    published = {name: cells[2] for name, protocol, cells in PUBLISHED if protocol == "per image"}
    return [
        Result(
            "[CLEVR](experiments/clevr/README.md), AP0.5, %, per image",
            row.label,
            published.get(NAMES[row.config.model], "") if row.comparable else "",
            _percent(row.scores, "ap_0.5"),
            f"{row.config.size} x {row.config.size}, "
            f"{row.config.min_objects} to {row.config.max_objects} objects",
            f"{row.hours:.1f}",
            "msdspn train clevr",
        )
        for row in rows
    ]


def inner_steps_table(rows: Sequence[Row]) -> str:
    """AP0.5 by inner steps at evaluation, as Markdown; empty where nothing was tried."""
    steps = sorted({int(number) for row in rows for number in row.by_inner_steps})
    if not steps:
        return ""
    lines = []
    for row in rows:
        tried = row.by_inner_steps
        cells = [_percent(tried[str(n)], "ap_0.5") if str(n) in tried else "" for n in steps]
        if tried:
            inner = row.config.resolved_inner()
            trained = f"{inner.num_steps}, then {inner.steps_at(1.0)}"
            lines.append([f"{row.label} ({trained})", *cells])
    title = "AP0.5 per image on validation images, %, by number of inner steps at evaluation:"
    head = ["model (inner steps in training)", *steps]
    return f"\n{title}\n\n" + _markdown.table(head, lines)


def _percent(scores: Mapping[str, float], name: str) -> str:
    text = f"{100 * scores[name]:.1f}"
    deviation = scores.get(f"{name}_std")
    return text if deviation is None else f"{text}±{100 * deviation:.1f}"
