"""``msdspn report numbering``: finished runs as the paper's table 1, ours beside the published."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from msdspn_jax._files import write_text
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.numbering.config import Config
from msdspn_jax.tasks.numbering.equivariance import (
    PUBLISHED_EQUIVARIANCE,
    PUBLISHED_READING,
    model_equivariance,
)
from msdspn_jax.tasks.numbering.model import build_model
from msdspn_jax.tasks.runs import Runs
from msdspn_jax.tasks.summary import Result, write_results
from msdspn_jax.training.config import as_flags
from msdspn_jax.training.run_folder import finished_runs, training_hours
from msdspn_jax.training.state import run_keys

#: Macro accuracy in percent, mean and standard deviation over 6 seeds, at n = 64 with 4 classes,
#: by size of the training set (paper, table 1).
PUBLISHED: dict[str, dict[int, tuple[float, float]]] = {
    "deep-sets": {640: (0.0, 0.0), 6_400: (0.0, 0.0), 64_000: (0.0, 0.0)},
    "transformer": {640: (0.0, 0.0), 6_400: (0.0, 0.0), 64_000: (0.0, 0.0)},
    "transformer-random-pe": {640: (28.5, 8.1), 6_400: (22.6, 5.2), 64_000: (22.7, 7.7)},
    "transformer-pe": {640: (0.0, 0.0), 6_400: (46.4, 26.2), 64_000: (94.4, 1.8)},
    "bilstm": {640: (0.0, 0.0), 6_400: (25.1, 20.2), 64_000: (97.9, 2.1)},
    "dspn": {640: (89.4, 2.4), 6_400: (88.9, 4.9), 64_000: (90.8, 4.2)},
    "idspn": {640: (96.8, 0.6), 6_400: (98.1, 0.3), 64_000: (97.9, 0.6)},
}

NAMES = {
    "deep-sets": "DeepSets",
    "transformer": "Transformer without PE",
    "transformer-random-pe": "Transformer with random PE",
    "transformer-pe": "Transformer with PE",
    "bilstm": "BiLSTM",
    "dspn": "DSPN",
    "idspn": "iDSPN",
}

# What may differ between the runs of one table, or does not bear on what is measured.
_WITHIN_TABLE = {"seed", "replicates", "model", "train_size", "fresh", "augment"}
_WITHIN_TABLE |= {"skip_bad_steps", "max_inner_energy"}

SCORES_FILE = "numbering_scores.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of ``msdspn report numbering``."""

    runs: Path = Path("runs")
    """Folder to search for finished runs of this task."""
    out: Path = Path("experiments/class_specific_numbering")
    """Where to write results.md, results.json, summary.json, accuracy.png (and equivariance.md)."""
    split: Literal["test", "val"] = "test"
    """Which split to score the best checkpoint on. Scores are kept in the run folder."""
    equivariance: bool = False
    """Compute the equivariance table as well: every model fresh, and trained where a run exists."""


class Scores(NamedTuple):
    """A finished run and the scores of its best checkpoint, one for each replicate."""

    folder: Path
    config: Config
    step: int
    values: dict[str, list[float]]


class Cell(NamedTuple):
    """Macro accuracy in percent over several `seeds`; `std` is the sample standard deviation."""

    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        """Mean ± deviation, as in the paper."""
        return f"{self.mean:.1f}±{self.std:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"


def report(argv: list[str], runs: Runs) -> int:
    """Collect the runs, write tables and figure; returns the exit code."""
    import tyro

    options = tyro.cli(Options, prog="msdspn report numbering", args=argv)
    folders = finished_runs(options.runs, "numbering")
    scores = [score_run(folder, options.split, runs) for folder in folders]
    if not scores:
        raise UserError(
            "--runs: expected a folder with finished runs of numbering (train one with 'msdspn "
            f"train numbering --run-dir RUN'), got {options.runs}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    groups = group_by_settings(scores)
    text = "\n\n".join(
        _section(settings, members, options.split) for settings, members in groups.items()
    )
    _write(options.out / "results.md", text)
    _write(options.out / "results.json", json.dumps(_records(scores), indent=1) + "\n")
    from msdspn_jax import plots

    for number, members in enumerate(groups.values()):
        name = "accuracy.png" if number == 0 else f"accuracy_{number + 1}.png"
        plots.save(accuracy_figure(table(members)), options.out / name)
    write_results(options.out, summary(groups))
    print(text)
    if options.equivariance:
        text = equivariance_table(scores, runs)
        _write(options.out / "equivariance.md", text)
        print(text)
    print(f"\nwritten to {options.out}")
    return 0


# --- reading runs ---


def score_run(folder: Path, split: str, runs: Runs) -> Scores:
    """Score the best checkpoint of a run on a split, or read the scores kept from the last time."""
    kept = folder / SCORES_FILE
    every = json.loads(kept.read_text()) if kept.exists() else {}
    if split not in every:
        run = runs.load_run(folder)
        values: dict[str, list[float]] = defaultdict(list)
        for replicate, variables in enumerate(run.variables):
            key = run_keys(run.config.seed + replicate).evaluation
            for name, value in run.task.evaluate(variables, split, key).items():
                values[name].append(float(value))
        every[split] = {"step": run.step, "values": values}
        _write(kept, json.dumps(every, indent=1) + "\n")
    _, config = runs.read_config(folder)
    assert isinstance(config, Config)
    return Scores(folder, config, every[split]["step"], every[split]["values"])


def group_by_settings(scores: Iterable[Scores]) -> dict[str, list[Scores]]:
    """Runs that belong in one table, by what their settings share, said in words."""
    groups: dict[str, list[Scores]] = defaultdict(list)
    for score in scores:
        published = _settings(Config(model=score.config.model))
        differs = {
            name: value
            for name, value in _settings(score.config).items()
            if name not in _WITHIN_TABLE and value != published[name]
        }
        words = ", ".join(f"{name} {value}" for name, value in sorted(differs.items()))
        groups[words or "published settings"].append(score)
    return dict(groups)


def _settings(config: Config) -> dict[str, Any]:
    """What determines the numbers, by field; those of groups as "inner.num_steps"."""
    flags = as_flags(config.resolved().numerical())
    return {flag[2:].replace("-", "_"): value for flag, value in flags.items()}


# --- the table ---


def table(scores: Sequence[Scores]) -> dict[tuple[str, bool], dict[int, Cell]]:
    """Macro accuracy by (model, augmented), then by size of the training set (0: fresh)."""
    seeds: dict[tuple[str, bool], dict[int, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for score in scores:
        row = seeds[score.config.model, score.config.augment]
        for replicate, value in enumerate(score.values["macro_accuracy"]):
            # The same seed trained twice counts once.
            row[_train_size(score.config)][score.config.seed + replicate] = 100 * value
    return {
        row: {size: _cell(list(by_seed.values())) for size, by_seed in sizes.items()}
        for row, sizes in sorted(seeds.items(), key=lambda item: _order(item[0]))
    }


def markdown(rows: Mapping[tuple[str, bool], Mapping[int, Cell]]) -> str:
    """The table of the paper: ours, then the published (at n = 64, 4 classes, 6 seeds)."""
    sizes = sorted({size for row in rows.values() for size in row}, key=lambda size: size or 1e18)
    published = sorted(next(iter(PUBLISHED.values())))
    head = ["macro accuracy, %", *(_size(size) for size in sizes)]
    head += [f"published, {size}" for size in published]
    lines = [head, ["---"] * len(head)]
    for (model, augmented), row in rows.items():
        ours = [str(row[size]) if size in row else "" for size in sizes]
        theirs = ["{:.1f}±{:.1f}".format(*PUBLISHED[model][size]) for size in published]
        lines.append([_name(model, augmented), *ours, *theirs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_figure(rows: Mapping[tuple[str, bool], Mapping[int, Cell]]):
    """Accuracy by size of the training set, one line a model; returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    sizes = sorted({size for row in rows.values() for size in row}, key=lambda size: size or 1e18)
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, ((model, augmented), row) in enumerate(rows.items()):
        own = [size for size in sizes if size in row]
        # Lines that coincide (at zero, say) are told apart by a small shift.
        place = [sizes.index(size) + 0.03 * (number - len(rows) / 2) for size in own]
        axes.errorbar(
            place,
            [row[size].mean for size in own],
            [row[size].std for size in own],
            label=_name(model, augmented),
            marker="o" if model in ("idspn", "dspn") else "s",
            linewidth=2.4 if model == "idspn" else 1.4,
            linestyle="--" if augmented else "-",
            capsize=2,
        )
    axes.set_xticks(range(len(sizes)), [_size(size) for size in sizes])
    axes.set(xlabel="training samples", ylabel="macro accuracy, %", ylim=(-4, 104))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def summary(groups: Mapping[str, Sequence[Scores]]) -> list[Result]:
    """Rows for the README: iDSPN and DSPN trained on 640 samples, the largest n there is."""
    settings, scores = max(groups.items(), key=lambda group: group[1][0].config.set_size)
    cells = table(scores)
    found = {name: cells.get((name, False), {}).get(640) for name in ("idspn", "dspn")}
    if None in found.values():
        return []
    counted = [score for score in scores if score.config.model in found]
    steps = {score.config.steps for score in counted}
    seeds = min(cell.seeds for cell in found.values() if cell)
    return [
        Result(
            "[numbering](experiments/class_specific_numbering/README.md), sets entirely right, %,"
            " iDSPN; DSPN",
            "; ".join("{:.1f}±{:.1f}".format(*PUBLISHED[name][640]) for name in found),
            "; ".join(str(cell) for cell in found.values()),
            f"n = {scores[0].config.set_size}, 640 samples, "
            + "/".join(f"{n:,}" for n in sorted(steps))
            + f" steps, {seeds} seeds"
            + ("" if settings == "published settings" else "; smaller or other settings"),
            f"{sum(training_hours(score.folder) for score in counted):.1f}",
            "experiments/class_specific_numbering/run.sh",
        )
    ]


# --- which equivariance ---


def equivariance_table(scores: Sequence[Scores], runs: Runs, *, seed: int = 0) -> str:
    """Computed check marks of every model, fresh and trained, beside the published.

    Trained parameters are those of the first run found of a model; its settings are used for the
    fresh one as well. For models that draw noise, both readings are computed (see
    `msdspn_jax.equivariance`).
    """
    head = ["model", "randomness belongs to", "parameters", "set-eq.", "multiset-eq."]
    head += ["worst violation (set, multiset) / tolerance", "published (set, multiset)"]
    lines = [head, ["---"] * len(head)]
    key = jax.random.key(seed)
    for model in PUBLISHED:
        found = [score for score in scores if score.config.model == model]
        config = found[0].config if found else Config(model=model)  # pyright: ignore[reportArgumentType]
        variants = {"fresh": build_model(config).init(jax.random.key(seed))}
        if found:
            variants["trained"] = runs.load_run(found[0].folder).variables[0]["params"]
        stochastic = model in PUBLISHED_READING
        for reading in ("model", "elements") if stochastic else ("model",):
            quoted = not stochastic or reading == PUBLISHED_READING[model]
            for label, params in variants.items():
                found_out = model_equivariance(config, params, key=key, noise_belongs_to=reading)
                lines.append(
                    [
                        NAMES[model],
                        {"model": "the model", "elements": "the elements"}[reading]
                        if stochastic
                        else "(none)",
                        label,
                        _mark(found_out.set_equivariant),
                        _mark(found_out.multiset_equivariant),
                        f"{found_out.set_violation:.1e}, {found_out.multiset_violation:.1e}",
                        ", ".join(map(_mark, PUBLISHED_EQUIVARIANCE[model])) if quoted else "",
                    ]
                )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- small things ---


def _section(settings: str, scores: Sequence[Scores], split: str) -> str:
    rows = table(scores)
    counts = {cell.seeds for row in rows.values() for cell in row.values()}
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    title = f"Ours ({split} split, {seeds} seeds, mean ± standard deviation): {settings}."
    return f"{title}\n\n{markdown(rows)}"


def _records(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    return [
        {"run": score.folder.name, "best_step": score.step}
        | {name: getattr(score.config, name) for name in ("model", "augment", "seed")}
        | {"train_size": _train_size(score.config)}
        | score.values
        for score in scores
    ]


def _cell(percent: Sequence[float]) -> Cell:
    std = float(np.std(percent, ddof=1)) if len(percent) > 1 else 0.0
    return Cell(float(np.mean(percent)), std, len(percent))


def _order(row: tuple[str, bool]) -> tuple[int, bool]:
    return list(PUBLISHED).index(row[0]), row[1]


def _name(model: str, augmented: bool) -> str:
    return NAMES[model] + (", permuted samples" if augmented else "")


def _train_size(config: Config) -> int:
    """Samples in the training set; 0: fresh ones at every step."""
    return 0 if config.fresh else config.train_size


def _size(size: int) -> str:
    return f"{size}" if size else "fresh"


def _mark(held: bool | None) -> str:
    return {True: "yes", False: "no", None: "not tested"}[held]


def _write(path: Path, text: str) -> None:
    write_text(path, text if text.endswith("\n") else text + "\n")
