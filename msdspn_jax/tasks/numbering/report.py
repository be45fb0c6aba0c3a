"""``msdspn report numbering``: finished runs as the paper's table 1, ours beside the published."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from msdspn_jax import _markdown
from msdspn_jax._files import as_json, write_text
from msdspn_jax._options import parse
from msdspn_jax.adjoints import identity
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.numbering.config import Config
from msdspn_jax.tasks.numbering.equivariance import (
    PUBLISHED_EQUIVARIANCE,
    PUBLISHED_READING,
    model_equivariance,
)
from msdspn_jax.tasks.numbering.model import build_model
from msdspn_jax.tasks.runs import Runs
from msdspn_jax.tasks.summary import Result, marks, put_into, write_results
from msdspn_jax.training.config import as_flags
from msdspn_jax.training.run_folder import (
    finished_runs,
    last_decodings,
    read_json,
    training_hours,
    validation_curve,
)
from msdspn_jax.training.state import by_seed

#: Number of elements and of classes in the paper's table 1.
PUBLISHED_PROBLEM = (64, 4)
# What makes the runs of the README's table, by n.
_SCRIPTS = {PUBLISHED_PROBLEM[0]: "run.sh {runs}", 8: "small.sh"}

#: Macro accuracy in percent, mean and standard deviation over 6 seeds, by size of the training set
#: (paper, table 1).
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

# What makes a problem of its own, and so a table of its own.
_PROBLEM = ("set_size", "num_classes")
# What has a row, a column or a mean of its own, or does not bear on what is measured.
_IN_TABLE = {"seed", "replicates", "model", "train_size", "fresh", "augment"}
_IN_TABLE |= {"skip_bad_steps", "max_inner_energy", *_PROBLEM}

# In words, in this order; what else was changed is called by its name.
_WORDS = {
    "inner.num_steps": "{:g} inner steps",
    "inner.late_num_steps": "{:g} inner steps in the second half",
    "inner.eval_num_steps": "evaluated with {:g}",
    "inner.momentum": "inner momentum {:g}",
    "inner.step_size": "inner step size {:g}",
    "outer.average": "averaged weights",
}

STRAIGHT = "straight-through"
"""How a row of iDSPN is called that was trained with ``identity(straight_through=True)``."""

SCORES_FILE = "numbering_scores.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of ``msdspn report numbering``."""

    runs: Path = Path("runs")
    """Folder to search for finished runs of this task."""
    out: Path | None = None
    """Where to write results.md, results.json and summary.json, accuracy_*.png and learning_*.png
    for every size of the problem (and equivariance.md). Default: RUNS/report."""
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


class Row(NamedTuple):
    """A row of the table: a model, and how it was trained where that differs from other rows."""

    model: str
    augmented: bool
    training: str = ""

    def __str__(self) -> str:
        """What people call it."""
        name = NAMES[self.model] + (", permuted samples" if self.augmented else "")
        return f"{name}: {self.training}" if self.training else name


class Cell(NamedTuple):
    """Macro accuracy in percent over several `seeds`; `std` is the sample standard deviation.

    `hours` are those that training one seed took. Of two seeds, `both` are shown.
    """

    mean: float
    std: float
    seeds: int
    hours: float = 0.0
    both: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Mean ± deviation, as in the paper; of two seeds each."""
        if self.both:
            return "; ".join(f"{x:.1f}" for x in self.both)
        return f"{self.mean:.1f}±{self.std:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"


def report(argv: list[str], runs: Runs) -> int:
    """Collect the runs, write tables and figure; returns the exit code."""
    options = parse(Options, argv, prog="msdspn report numbering")
    out = options.out or options.runs / "report"
    folders = finished_runs(options.runs, "numbering")
    scores = [score_run(folder, options.split, runs) for folder in folders]
    if not scores:
        raise UserError(
            "--runs: expected a folder with finished runs of numbering (train one with 'msdspn "
            f"train numbering --run-dir RUN'), got {options.runs}"
        )
    out.mkdir(parents=True, exist_ok=True)
    groups = group_by_problem(scores)
    text = "\n\n".join(_section(members, options.split) for members in groups.values())
    _write(out / "results.md", text)
    _write(out / "results.json", as_json(_records(scores), indent=1) + "\n")
    from msdspn_jax import plots

    for (set_size, num_classes), members in groups.items():
        ending = f"_n{set_size}_{num_classes}_classes.png"
        plots.save(accuracy_figure(table(members)), out / f"accuracy{ending}")
        curves = learning(members)
        if curves:
            level = None
            if (set_size, num_classes) == PUBLISHED_PROBLEM:
                level = ("iDSPN, published, 50,000 steps", PUBLISHED["idspn"][640][0])
            figure = plots.learning_curves(
                curves, ylabel="macro accuracy on validation, %", percent=True, level=level
            )
            plots.save(figure, out / f"learning{ending}")
    write_results(out, summary(groups))
    _put_into_page(out / "README.md", groups)
    print(text)
    if options.equivariance:
        text = equivariance_table(scores, runs)
        _write(out / "equivariance.md", text)
        print(text)
    print(f"\nwritten to {out}")
    return 0


def _put_into_page(page: Path, groups: Mapping[tuple[int, int], Sequence[Scores]]) -> None:
    """The table of every problem for which a page has the marks."""
    text = page.read_text() if page.exists() else ""
    for (set_size, num_classes), scores in groups.items():
        name = f"msdspn report numbering, n = {set_size}"
        if marks(name)[0] in text:
            rows = markdown(table(scores), (set_size, num_classes))
            put_into(page, decodings_table(scores, common=True) or rows, name)


# --- reading runs ---


def score_run(folder: Path, split: str, runs: Runs) -> Scores:
    """Score the best checkpoint of a run on a split, or read the scores kept from the last time."""
    kept = folder / SCORES_FILE
    every = read_json(kept) if kept.exists() else {}
    # A run may have been trained on; a record without checkpoints is as it was kept.
    if split not in every or (folder / "checkpoints").is_dir():
        run = runs.load_run(folder)
        if every.get(split, {}).get("step") != run.step:
            values = by_seed(run.task, run.step, run.variables, split, run.config.seed)
            every[split] = {"step": run.step, "values": values}
            _write(kept, as_json(every, indent=1) + "\n")
    _, config = runs.read_config(folder)
    assert isinstance(config, Config)
    return Scores(folder, config, every[split]["step"], every[split]["values"])


def group_by_problem(scores: Iterable[Scores]) -> dict[tuple[int, int], list[Scores]]:
    """Runs that belong in one table, by set size and number of classes; the largest sets first."""
    groups: dict[tuple[int, int], list[Scores]] = defaultdict(list)
    for score in scores:
        groups[score.config.set_size, score.config.num_classes].append(score)
    return dict(sorted(groups.items(), reverse=True))


def shared_settings(scores: Iterable[Scores]) -> dict[str, Any]:
    """Settings that differ from the published ones in every run, and alike."""
    shared = [set(_unlike_published(score.config).items()) for score in scores]
    return dict(sorted(set.intersection(*shared)))


def _unlike_published(config: Config) -> dict[str, Any]:
    """The settings of a run that differ from the published ones of its model."""
    published = _settings(Config(model=config.model))
    return {
        name: value
        for name, value in _settings(config).items()
        if name not in _IN_TABLE and value != published[name]
    }


def rows_of(scores: Sequence[Scores]) -> dict[Row, list[Scores]]:
    """The runs of a table by row: a model, and how it was trained beyond what all runs share."""
    shared = shared_settings(scores)
    found: dict[tuple[str, bool, str], list[Scores]] = defaultdict(list)
    for score in scores:
        own = dict(_unlike_published(score.config).items() - shared.items())
        words = ", ".join(f"{name} {value}" for name, value in sorted(own.items()))
        found[score.config.model, score.config.augment, words].append(score)
    rows = [Row(model, augmented, _training(members[0].config, shared))
            for (model, augmented, _), members in found.items()]  # fmt: skip
    # Two ways of training that read alike in short are told apart in full.
    return dict(
        sorted(
            (
                (row if rows.count(row) == 1 else Row(*key), members)
                for row, (key, members) in zip(rows, found.items(), strict=True)
            ),
            key=lambda item: (
                list(PUBLISHED).index(item[0].model),
                item[0].augmented,
                # As people count: 5 before 10.
                [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", item[0].training)],
            ),
        )
    )


def _training(config: Config, shared: Mapping[str, Any]) -> str:
    """How a run was trained, in short."""
    own = dict(_unlike_published(config).items() - shared.items())
    words = []
    if own.get("inner.adjoint") == str(identity(straight_through=True)):
        words.append(STRAIGHT)
        del own["inner.adjoint"]
    if config.outer.optimizer == "muon" and "outer.optimizer" in own:
        words.append("Muon")
        # Which go with it; in full in results.json.
        own = {name: value for name, value in own.items() if not name.startswith("outer.")}
        own.pop("learning_rate", None)
    if own.keys() & {"steps", "batch_size"}:
        words.append(f"{config.steps:,} steps of {config.batch_size}")
    own = {name: value for name, value in own.items() if name not in ("steps", "batch_size")}
    words += [text.format(own.pop(name)) for name, text in _WORDS.items() if name in own]
    return ", ".join(words + [f"{name} {value}" for name, value in sorted(own.items())])


def _settings(config: Config) -> dict[str, Any]:
    """What determines the numbers, by field; those of groups as "inner.num_steps"."""
    flags = as_flags(config.resolved().numerical())
    return {flag[2:].replace("-", "_"): value for flag, value in flags.items()}


# --- the table ---


def table(scores: Sequence[Scores]) -> dict[Row, dict[int, Cell]]:
    """Macro accuracy by row, then by size of the training set (0: fresh)."""
    rows: dict[Row, dict[int, Cell]] = {}
    for row, members in rows_of(scores).items():
        # By size, then by seed: the same seed trained twice counts once.
        percent: dict[int, dict[int, float]] = defaultdict(dict)
        hours: dict[int, dict[int, float]] = defaultdict(dict)
        for score in members:
            size, values = _train_size(score.config), score.values["macro_accuracy"]
            for replicate, value in enumerate(values):
                percent[size][score.config.seed + replicate] = 100 * value
                hours[size][score.config.seed + replicate] = training_hours(score.folder) / len(
                    values
                )
        rows[row] = {
            size: _cell(list(of.values()), sum(hours[size].values()))
            for size, of in percent.items()
        }
    return rows


def learning(scores: Sequence[Scores]) -> dict[str, list[tuple[int, float, float]]]:
    """Validation accuracy at every evaluation, by row; of its first run on the fewest samples."""
    curves = {}
    for row, members in rows_of(scores).items():
        first = min(members, key=lambda score: (_train_size(score.config) or 1e18, score.folder))
        curve = validation_curve(first.folder, "macro_accuracy")
        if curve:
            curves[str(row)] = curve
    return curves


def markdown(rows: Mapping[Row, Mapping[int, Cell]], problem: tuple[int, int]) -> str:
    """The table of the paper: ours, then the published where the problem is that of the paper."""
    sizes = sorted({size for row in rows.values() for size in row}, key=lambda size: size or 1e18)
    published = sorted(next(iter(PUBLISHED.values()))) if problem == PUBLISHED_PROBLEM else []
    head = ["macro accuracy, %", *(_size(size) for size in sizes), "hours a seed"]
    head += [f"published, {size}" for size in published]
    lines = []
    for row, cells in rows.items():
        ours = [str(cells[size]) if size in cells else "" for size in sizes]
        hours = "; ".join(_hours(cells[size].hours) for size in sizes if size in cells)
        theirs = ["{:.1f}±{:.1f}".format(*PUBLISHED[row.model][size]) for size in published]
        lines.append([row, *ours, hours, *theirs])
    return _markdown.table(head, lines)


class Decoded(NamedTuple):
    """Runs that were decoded alike: the settings in words, and accuracy in percent by split."""

    words: str
    cells: dict[str, Cell]


def decoded(scores: Sequence[Scores]) -> list[Decoded]:
    """Every way of decoding that all of these runs were scored with, the best first.

    Best on validation, at the last step for which a run has such scores. Runs that were only ever
    decoded as they were trained have none.
    """
    by_run = [_decodings(score) for score in scores]
    found = []
    for words in by_run[0]:
        if all(words in of for of in by_run):
            cells = {}
            for split in ("val", "test"):
                if all(split in of[words] for of in by_run):
                    seeds = [x for of in by_run for x in of[words][split]]
                    cells[split] = _cell([100 * x for x in seeds], 0.0)
            found.append(Decoded(words, cells))
    return sorted(found, key=lambda of: -of.cells["val"].mean if "val" in of.cells else 0.0)


def _decodings(score: Scores) -> dict[str, dict[str, list[float]]]:
    """Macro accuracy of a run by way of decoding, its own among them, and by split."""
    own: dict[str, Any] = {}
    if score.config.minimises:
        inner = score.config.resolved_inner()
        own = {"num_steps": inner.steps_at_evaluation, "num_starts": inner.eval_num_starts}
        own |= {name: getattr(inner, name) for name in ("momentum", "step_size")}
    found: dict[str, dict[str, list[float]]] = {}
    for record in (records := last_decodings(score.folder)):
        settings = own | record["inner"]
        changed = {k: x for k, x in settings.items() if k == "num_steps" or x != own.get(k)}
        by_split = {split: x["macro_accuracy"] for split, x in record["metrics"].items()}
        found.setdefault(_decoding(changed), {}).update(by_split)
    curve = validation_curve(score.folder, "macro_accuracy") if own and found else []
    if curve and curve[-1][0] == records[0]["step"] and score.config.replicates == 1:
        words = _decoding({"num_steps": own["num_steps"]})
        found.setdefault(words, {"val": [curve[-1][2]]})
    return found


def _decoding(inner: Mapping[str, float]) -> str:
    """The settings in words; those that are not said are the run's own."""
    units = {"num_steps": "{:g} steps", "num_starts": "{:g} initial sets"}
    units |= {"momentum": "momentum {:g}", "step_size": "step size {:g}"}
    return ", ".join(words.format(inner[name]) for name, words in units.items() if name in inner)


def decodings_table(scores: Sequence[Scores], *, common: bool = False) -> str:
    """Macro accuracy with other settings of the inner minimisation than in training, on validation.

    A row for each way of training, a column for each way of decoding; test scores in brackets.

    Args:
        scores: runs of one problem.
        common: leave out the ways of decoding that fewer than half of the rows have.
    """
    sizes = {_train_size(score.config) for score in scores}
    rows = []
    for row, members in rows_of(scores).items():
        for size in sorted({_train_size(score.config) for score in members}):
            alike = [score for score in members if _train_size(score.config) == size]
            cells = {x.words: x.cells for x in decoded(alike) if "val" in x.cells}
            if cells:
                name = f"{row}; {_size(size)} samples" if len(sizes) > 1 else str(row)
                hours = np.mean([training_hours(score.folder) for score in alike])
                rows.append((name, _hours(float(hours)), cells))
    counts = Counter(words for *_, cells in rows for words in cells)
    enough = len(rows) / 2 if common else 0
    columns = sorted((x for x in counts if counts[x] >= enough), key=_by_number)
    lines = [
        [name, hours, *(_with_test(cells[x]) if x in cells else "" for x in columns)]
        for name, hours, cells in rows
    ]
    return _markdown.table(["trained", "hours a seed", *columns], lines) if lines else ""


def _with_test(cells: Mapping[str, Cell]) -> str:
    """The score on validation, and that on the test split where there is one."""
    return str(cells["val"]) + (f" (test: {cells['test']})" if "test" in cells else "")


def _by_number(words: str) -> tuple[int, list[float]]:
    """Short descriptions first, then by the numbers in them."""
    return words.count(","), [float(x) for x in re.findall(r"[0-9.]+", words)]


def accuracy_figure(rows: Mapping[Row, Mapping[int, Cell]]):
    """Accuracy by size of the training set, one line a model; returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    sizes = sorted({size for row in rows.values() for size in row}, key=lambda size: size or 1e18)
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, (row, cells) in enumerate(rows.items()):
        own = [size for size in sizes if size in cells]
        # Lines that coincide (at zero, say) are told apart by a small shift.
        place = [sizes.index(size) + 0.03 * (number - len(rows) / 2) for size in own]
        axes.errorbar(
            place,
            [cells[size].mean for size in own],
            [cells[size].std for size in own],
            label=str(row),
            marker="o" if row.model in ("idspn", "dspn") else "s",
            linewidth=2.4 if row.model == "idspn" else 1.4,
            linestyle="--" if row.augmented else "-",
            capsize=2,
        )
    axes.set_xticks(range(len(sizes)), [_size(size) for size in sizes])
    axes.set(xlabel="training samples", ylabel="macro accuracy, %", ylim=(-4, 104))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def summary(groups: Mapping[tuple[int, int], Sequence[Scores]]) -> list[Result]:
    """Rows for the README, on 640 samples, at the published n and the small one.

    The iDSPN, with the paper's rule and straight through, the DSPN and the other model that are
    best on validation, with their test scores.
    """
    return [
        result
        for (set_size, _), scores in groups.items()
        if set_size in _SCRIPTS
        for result in _summary_at(set_size, scores)
    ]


def _summary_at(set_size: int, scores: Sequence[Scores]) -> list[Result]:
    best: dict[str, tuple[Cell, Row]] = {}
    members, highest = rows_of(scores), defaultdict(lambda: -1.0)
    for row, cells in table(scores).items():
        name = row.model if row.model in ("idspn", "dspn") else "baseline"
        name += f", {STRAIGHT}" * (STRAIGHT in row.training)
        # Chosen on validation: the best of several on the test split would flatter.
        found = _on_validation(members[row])
        if 640 in cells and found > highest[name]:
            best[name], highest[name] = (cells[640], row), found
    if "idspn" not in best:
        return []
    return [
        _result(set_size, name, *best[name], members[best[name][1]])
        for name in ("idspn", f"idspn, {STRAIGHT}", "dspn", "baseline")
        if name in best
    ]


def _on_validation(members: Sequence[Scores]) -> float:
    """The best macro accuracy of every run on 640 samples during training, their mean."""
    curves = [
        validation_curve(score.folder, "macro_accuracy")
        for score in members
        if _train_size(score.config) == 640
    ]
    return float(np.mean([max((x for *_, x in curve), default=0.0) for curve in curves or [()]]))


def _result(set_size: int, name: str, cell: Cell, row: Row, members: Sequence[Scores]) -> Result:
    # The way of decoding that is best on validation, if it was scored on the test split too.
    others = decoded([score for score in members if _train_size(score.config) == 640])
    other = others[0] if others and "test" in others[0].cells else None
    more = f"; decoded with {other.words}: {other.cells['test']}" if other else ""
    config, at_64 = members[0].config, set_size == PUBLISHED_PROBLEM[0]
    length = f"{config.steps:,} steps of {config.batch_size}"
    size = [
        "640 samples" + ", permuted" * row.augmented,
        length + ", not 50,000" * (at_64 and config.steps < 50_000),
    ]
    if row.training not in ("", length):
        words = [word for word in row.training.split(", ") if word not in (length, STRAIGHT)]
        size += [", ".join(words)] * bool(words)
    own = name.removeprefix(row.model)  # ", straight-through" or nothing
    published = at_64 and 640 in PUBLISHED.get(row.model, {})
    folder = "experiments/class_specific_numbering"
    runs = " ".join(dict.fromkeys(score.folder.name for score in members))
    return Result(
        f"[numbering]({folder}/README.md), n = {set_size}{', not 64' * (not at_64)}: macro"
        " accuracy, %",
        NAMES[row.model] + (", the best of the others" if name == "baseline" else own),
        "{:.1f}±{:.1f}".format(*PUBLISHED[row.model][640]) if published else "",
        str(cell) + more,
        "; ".join([*size, _seeds(str(cell.seeds))]),
        f"{cell.hours * cell.seeds:.2g}",
        f"{folder}/{_SCRIPTS[set_size].format(runs=runs)}",
    )


# --- which equivariance ---


def equivariance_table(scores: Sequence[Scores], runs: Runs, *, seed: int = 0) -> str:
    """Computed check marks of every model, fresh and trained, beside the published.

    Trained parameters are those of the first run found of a model; its settings are used for the
    fresh one as well. For models that draw noise, both readings are computed (see
    `msdspn_jax.equivariance`).
    """
    head = ["model", "randomness belongs to", "parameters", "set-eq.", "multiset-eq."]
    head += ["worst violation (set, multiset) / tolerance", "published (set, multiset)"]
    lines = []
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
    return _markdown.table(head, lines)


# --- small things ---


def _section(scores: Sequence[Scores], split: str) -> str:
    rows = table(scores)
    config = scores[0].config
    settings = ", ".join(f"{name} {value}" for name, value in shared_settings(scores).items())
    problem = f"n = {config.set_size}, {config.num_classes} classes"
    counts = {cell.seeds for row in rows.values() for cell in row.values()}
    seeds = _seeds(f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}")
    title = f"{problem}, {split} split, {seeds}"
    title += ", mean ± standard deviation" if max(counts) > 1 else ""
    title += f"; {settings}." if settings else "."
    parts = [title, markdown(rows, (config.set_size, config.num_classes)), decodings_table(scores)]
    return "\n\n".join(part.strip() for part in parts if part)


def _records(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    return [
        {"run": score.folder.name, "best_step": score.step}
        | {name: getattr(score.config, name) for name in ("model", "augment", "seed")}
        | {"train_size": _train_size(score.config), "hours": training_hours(score.folder)}
        | {"unlike_published": _unlike_published(score.config)}
        | score.values
        for score in scores
    ]


def _cell(percent: Sequence[float], hours: float) -> Cell:
    std = float(np.std(percent, ddof=1)) if len(percent) > 1 else 0.0
    both = tuple(percent) if len(percent) == 2 else ()
    return Cell(float(np.mean(percent)), std, len(percent), hours / len(percent), both)


def _train_size(config: Config) -> int:
    """Samples in the training set; 0: fresh ones at every step."""
    return 0 if config.fresh else config.train_size


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours >= 1e-3 else "< 0.001"


def _size(size: int) -> str:
    return f"{size}" if size else "fresh"


def _seeds(count: str) -> str:
    return "1 seed" if count == "1" else f"{count} seeds"


def _mark(held: bool | None) -> str:
    return {True: "yes", False: "no", None: "not tested"}[held]


def _write(path: Path, text: str) -> None:
    write_text(path, text if text.endswith("\n") else text + "\n")
