"""``msdspn report random-sets``: the tables and bar charts of the paper's section 4.2."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msdspn_jax import _markdown
from msdspn_jax._files import as_json
from msdspn_jax._options import parse
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import published_inner
from msdspn_jax.tasks.autoencoding.config import AutoencoderConfig
from msdspn_jax.tasks.runs import Runs
from msdspn_jax.tasks.summary import Result, write_results
from msdspn_jax.training.config import as_flags
from msdspn_jax.training.run_folder import (
    finished_runs,
    last_decodings,
    read_metrics,
    read_record,
    training_hours,
    validation_curve,
)

# Read off the paper's bar chart of equal compute: final validation loss, n = d = 8, by variant and
# inner steps, after this many steps of this batch with this width. Its 1x and 2x are 10 and 20
# inner steps of DSPN, but 20 and 40 of iDSPN, which does not go back through them; DSPN has
# momentum 0.9 there (the authors' analysis/ran-results.py, plot_one).
PUBLISHED_STEPS = 20_000
PUBLISHED_SETTING = {"batch_size": 128, "hidden_dim": 512}
PUBLISHED = {
    "DSPN, momentum": {10: 0.028, 20: 0.011},
    "iDSPN": {20: 0.009, 40: 0.005},
    "iDSPN, momentum": {20: 0.003, 40: 0.002},
}
# Other outer optimisers than the published one, Adam with one rate, as variants are called by them.
FALLING, MUON = ", falling rate", ", Muon"
BFLOAT16 = ", bfloat16"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Collect finished runs into tables and charts; those that differ in the seed are one cell.

    Writes grid.md (the tables), grid.json (the numbers) and the charts by_n.png, by_d.png,
    by_inner_steps.png, by_decoding.png and learning.png. The last two, and the published
    readings, only where cells with n = d = 8 were trained as the paper's, or with another outer
    optimiser.
    """

    runs: Path = Path("runs")
    """Folder to search for finished runs, at any depth."""
    out: Path | None = None
    """Where the report goes. Default: RUNS/report."""


class Row(NamedTuple):
    """A cell: the finished runs of one setting, and the mean and deviation over their seeds."""

    n: int
    d: int
    inner_steps: int
    variant: str
    loss: float
    deviation: float
    replicates: int
    steps: int
    steps_per_second: float
    devices: str
    batch_size: int
    hidden_dim: int
    hours: float
    run: str
    """Folder of the first of them, below that of all runs."""
    more_steps: dict[int, float]
    """Loss by number of inner steps at evaluation, where that was tried (decodings.json)."""

    @property
    def comparable(self) -> bool:
        """Whether it may stand beside the paper's models: one of them, as wide, as long with Adam.

        With another outer optimiser the number of steps is part of what is compared.
        """
        alike = all(getattr(self, name) == value for name, value in PUBLISHED_SETTING.items())
        alike = alike and self.model in PUBLISHED
        return alike and (self.steps == PUBLISHED_STEPS or self.optimizer != "")

    @property
    def products(self) -> str:
        """The end of the variant's name if set encoders multiplied in bfloat16."""
        return BFLOAT16 if self.variant.endswith(BFLOAT16) else ""

    @property
    def optimizer(self) -> str:
        """The end of the name before it that says which outer optimiser; none: as published."""
        name = self.variant.removesuffix(self.products)
        return next((end for end in (FALLING, MUON) if name.endswith(end)), "")

    @property
    def model(self) -> str:
        """The variant's name without the two."""
        return self.variant.removesuffix(self.optimizer + self.products)

    @property
    def baseline(self) -> str:
        """The variant that relative losses divide by: DSPN with momentum, trained alike."""
        return "DSPN, momentum" + self.optimizer + self.products

    def in_short(self) -> str:
        """Loss and what it cost."""
        seeds = f"{self.replicates} seed{'s' * (self.replicates > 1)}"
        cost = f"{self.steps:,} steps, {self.hours / self.replicates:.1f} h, {seeds}"
        return f"{_spread(self)} ({cost})"


def report(argv: list[str], runs: Runs) -> int:
    """Run the verb for this task; returns the exit code."""
    options = parse(Report, argv, prog="msdspn report random-sets")
    rows = collect(options.runs, runs)
    out = options.out or options.runs / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = tables(rows)
        (out / "grid.md").write_text(text)
        numbers = as_json([row._asdict() for row in rows], indent=1)
        (out / "grid.json").write_text(numbers + "\n")
        charts(rows, out)
        learning_chart(rows, options.runs, out)
        write_results(out, summary(rows))
    except OSError as error:
        raise UserError(
            f"--out: expected a folder that can be written, got {out} ({error.strerror})"
        ) from error
    print(text)
    print(f"written to {out}")
    return 0


def variant_of(config: AutoencoderConfig) -> str:
    """The paper's name of a configuration."""
    inner = config.resolved_inner()
    name = {"idspn": "iDSPN", "dspn": "DSPN"}[config.model]
    if inner.adjoint != published_inner(config.experiment, config.model).adjoint:
        name += f", {inner.adjoint}"
    if inner.pool != "fspool":
        name += f", {inner.pool} pool"
    name += ", momentum" if inner.momentum else ""
    if config.outer.optimizer == "muon":
        name += MUON
    elif config.outer.schedule in ("cosine", "linear"):
        name += FALLING
    return name + (BFLOAT16 if inner.products == "bfloat16" else "")


def collect(folder: Path, runs: Runs) -> list[Row]:
    """The finished cells in a folder, in order of n, d, inner steps and variant."""
    cells: dict[str, list[tuple[Any, dict[str, Any], Path]]] = {}
    for run in finished_runs(folder, "random-sets"):
        config: Any = runs.read_config(run)[1]
        settings = config.resolved().numerical()
        alike = {k: v for k, v in settings.items() if k not in ("seed", "replicates")}
        last = read_metrics(run, "val")[-1]
        cells.setdefault(json.dumps(alike, sort_keys=True), []).append((config, last, run))
    if not cells:
        raise UserError(
            "--runs: expected a folder with finished cells of random-sets (see msdspn grid "
            f"--help), got {folder}"
        )
    rows = {flags: _row(members, folder) for flags, members in cells.items()}
    return sorted(_told_apart({flags: json.loads(flags) for flags in rows}, rows))


def _told_apart(settings: dict[str, dict[str, Any]], rows: dict[str, Row]) -> list[Row]:
    """Rows of one cell that have the same name, with the flags in which they differ in it."""
    by_name: dict[Any, list[str]] = {}
    for which, row in rows.items():
        by_name.setdefault((row[:3], row.variant), []).append(which)
    found = []
    for namesakes in by_name.values():
        flags = [as_flags(settings[which]) for which in namesakes]
        differing = [k for k in flags[0] if any(f.get(k) != flags[0][k] for f in flags)]
        for which, of in zip(namesakes, flags, strict=True):
            words = "".join(f", {flag} {of[flag]}" for flag in differing if flag in of)
            found.append(rows[which]._replace(variant=rows[which].variant + words))
    return found


def _row(members: list[tuple[Any, dict[str, Any], Path]], folder: Path) -> Row:
    # Seeds of one run come as their mean and sample deviation.
    counts = np.array([config.replicates for config, _, _ in members])
    # Null where it was not finite.
    means = np.array([last["loss"] for _, last, _ in members], float)
    variances = np.array([last.get("loss_std", 0.0) for _, last, _ in members], float) ** 2
    mean, number = np.average(means, weights=counts), counts.sum()
    squares = np.sum((counts - 1) * variances + counts * (means - mean) ** 2)
    deviation = np.sqrt(squares / (number - 1)) if number > 1 else 0.0
    config, _, run = members[0]
    record = read_record(run)
    # Null where there was no time but that of compiling.
    speeds = [
        line["steps_per_second"]
        for _, _, run in members
        for line in read_metrics(run, "train")
        if line["steps_per_second"] is not None
    ]
    return Row(
        n=config.set_size,
        d=config.set_dim,
        inner_steps=config.resolved_inner().num_steps,
        variant=variant_of(config),
        loss=float(mean),
        deviation=float(deviation),
        replicates=int(number),
        steps=config.steps,
        steps_per_second=float(np.median(speeds)) if speeds else float("nan"),
        devices=f"{', '.join(record['devices'])} × {record['num_devices']}",
        batch_size=config.batch_size,
        hidden_dim=config.hidden_dim,
        hours=sum(training_hours(run) for _, _, run in members),
        run=str(run.relative_to(folder)),
        more_steps=_more_steps([run for _, _, run in members]),
    )


def _more_steps(folders: Sequence[Path]) -> dict[int, float]:
    """Mean validation loss of all seeds by number of inner steps, where all runs have it.

    Of their last step, from what `msdspn evaluate RUN --inner.num-steps K` kept.
    """
    tried: list[dict[int, list[float]]] = [
        {
            x["inner"]["num_steps"]: x["metrics"]["val"]["loss"]
            for x in last_decodings(folder)
            if x["inner"].keys() == {"num_steps"} and "val" in x["metrics"]
        }
        for folder in folders
    ]
    common = set.intersection(*(set(of) for of in tried))
    return {n: float(np.mean([loss for of in tried for loss in of[n]])) for n in sorted(common)}


def _variants(rows: Sequence[Row]) -> list[str]:
    known = [name + end for end in ("", FALLING, MUON) for name in PUBLISHED]
    found = {row.variant for row in rows}
    return [v for v in known if v in found] + sorted(found - set(known))


def relative_losses(rows: Sequence[Row], key: Callable[[Row], int]) -> dict[str, dict[int, float]]:
    """Geometric mean of loss ÷ DSPN's loss in the same cell, by variant and ``key`` of the cell."""
    losses = {(row[:3], row.variant): row.loss for row in rows}
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if (row[:3], row.baseline) in losses:
            ratio = row.loss / losses[row[:3], row.baseline]
            found.setdefault(row.variant, {}).setdefault(key(row), []).append(ratio)
    return {
        variant: {k: float(np.exp(np.mean(np.log(v)))) for k, v in sorted(by_key.items())}
        for variant, by_key in found.items()
    }


def _spread(row: Row) -> str:
    """The loss, with a deviation where there is more than one seed."""
    return f"{row.loss:.4f}" + f" ± {row.deviation:.4f}" * (row.replicates > 1)


def _size(rows: Sequence[Row]) -> str:
    """Training steps and seeds of rows: one pair for all, or what belongs to which variant."""
    variants: dict[tuple[int, int], set[str]] = {}
    for row in rows:
        variants.setdefault((row.steps, row.replicates), set()).add(row.variant)
    words = []
    for (steps, seeds), of in sorted(variants.items(), reverse=True):
        size = f"{steps:,} steps, {seeds} seed{'s' * (seeds > 1)}"
        if len(variants) > 1:
            size += f" ({'; '.join(v for v in _variants(rows) if v in of)})"
        words.append(size)
    return "; ".join(words)


def tables(rows: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    variants = _variants(rows)
    by_cell = {(row[:3], row.variant): row for row in rows}
    lines = []
    for cell in dict.fromkeys(row[:3] for row in rows):
        values = []
        for variant in variants:
            row = by_cell.get((cell, variant))
            values.append("" if row is None else _spread(row))
        lines.append([*cell, *values])
    text = f"Final validation loss, mean ± standard deviation over seeds: {_size(rows)}.\n\n"
    text += _markdown.table(["n", "d", "inner steps", *variants], lines)

    keys: dict[str, Callable[[Row], int]] = {
        "n": lambda r: r.n,
        "d": lambda r: r.d,
        "inner steps": lambda r: r.inner_steps,
    }
    for name, key in keys.items():
        relative = relative_losses(rows, key)
        if not relative:
            continue
        values = sorted({k for by_key in relative.values() for k in by_key})
        text += f"\nLoss relative to DSPN in the same cell (geometric mean), by {name}.\n\n"
        shown = [v for v in variants if v in relative]
        lines = [[k, *(f"{relative[v].get(k, np.nan):.2f}" for v in shown)] for k in values]
        text += _markdown.table([name, *shown], lines)

    ours = [row for row in rows if (row.n, row.d) == (8, 8) and row.comparable]
    if not ours:
        setting = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in PUBLISHED_SETTING.items())
        return text + (
            f"\nNo cell with n = d = 8 was trained as the paper's ({setting}, {PUBLISHED_STEPS:,}"
            " steps), so its losses are not set beside the published ones.\n"
        )
    text += (
        "\nn = d = 8, validation loss beside the published reading (its bar chart). Hours are of"
    )
    text += f" one seed, on {ours[0].devices}.\n\n"
    evaluated = sorted({steps for row in ours for steps in row.more_steps})
    head = ["model", "inner steps in training", "published", "ours"]
    head += [f"ours, evaluated with {steps}" for steps in evaluated]
    lines = []
    found = {(row.variant, row.inner_steps): row for row in ours}
    for variant in dict.fromkeys([*PUBLISHED, *variants]):
        published = PUBLISHED.get(variant, {})
        for steps in sorted({*published, *(n for name, n in found if name == variant)}):
            row = found.get((variant, steps))
            cells = [variant, str(steps), str(published.get(steps, ""))]
            cells.append("" if row is None else row.in_short())
            for number in evaluated:
                value = None if row is None else row.more_steps.get(number)
                cells.append("" if value is None else f"{value:.4f}")
            lines.append(cells)
    return text + _markdown.table(head, lines)


def summary(rows: Sequence[Row]) -> list[Result]:
    """Rows for the README: what at n = d = 8 may stand beside the paper's, by variant."""
    order = _variants(rows)
    ours = [row for row in rows if (row.n, row.d) == (8, 8) and row.comparable]
    ours.sort(key=lambda row: (order.index(row.variant), row.inner_steps))

    def words(row: Row) -> str:
        twice = row.more_steps.get(2 * row.inner_steps)
        more = "" if twice is None else f", decoded with {2 * row.inner_steps}: {twice:.4f}"
        return f"{row.inner_steps} inner steps: {row.loss:.4f}{more}"

    return [
        Result(
            "[random sets](experiments/random_sets/README.md), n = d = 8: validation loss",
            variant,
            "; ".join(f"{n} inner steps: {x}" for n, x in PUBLISHED.get(variant, {}).items()),
            "; ".join(words(row) for row in ours if row.variant == variant),
            _size([row for row in ours if row.variant == variant]),
            f"{sum(row.hours for row in ours if row.variant == variant):.1f}",
            "experiments/random_sets/run.sh ten",
        )
        for variant in dict.fromkeys(row.variant for row in ours)
    ]


def charts(rows: Sequence[Row], out: Path) -> None:
    """All charts, as PNG files in ``out``."""
    from msdspn_jax import plots

    variants = _variants(rows)
    keys: dict[str, Callable[[Row], int]] = {
        "n": lambda r: r.n,
        "d": lambda r: r.d,
        "inner_steps": lambda r: r.inner_steps,
    }
    for name, key in keys.items():
        relative = relative_losses(rows, key)
        if not relative:
            continue
        values = sorted({k for by_key in relative.values() for k in by_key})
        label = name.replace("_", " ")
        figure = plots.bars(
            [f"{label} = {v}" for v in values],
            {v: [relative[v].get(x, np.nan) for x in values] for v in variants if v in relative},
            ylabel="loss ÷ DSPN's loss",
        )
        plots.save(figure, out / f"by_{name}.png")
    # An older chart must not outlive the rows it was drawn from.
    (out / "by_decoding.png").unlink(missing_ok=True)
    ours = [row for row in rows if (row.n, row.d) == (8, 8) and row.comparable]
    if not ours:
        return
    panels: dict[str, dict[str, dict[int, float]]] = {variant: {} for variant in PUBLISHED}
    for row in sorted(ours, key=lambda row: (row.optimizer, row.inner_steps)):
        label = f"ours, trained with {row.inner_steps}{row.optimizer}{row.products}"
        own = {row.inner_steps: row.loss}
        panels[row.model][label] = own | row.more_steps
    figure = plots.by_decoding(panels, PUBLISHED, ylabel="validation loss, n = d = 8")
    plots.save(figure, out / "by_decoding.png")


def learning_chart(rows: Sequence[Row], runs: Path, out: Path) -> None:
    """Validation loss at n = d = 8 by training steps and by hours, with the fewest inner steps."""
    from msdspn_jax import plots

    (out / "learning.png").unlink(missing_ok=True)
    ours = [row for row in rows if (row.n, row.d) == (8, 8) and row.comparable]
    fewest = min((row.inner_steps for row in ours), default=0)
    shown = {row.variant: row for row in ours if row.inner_steps == fewest}
    if shown:
        curves = {
            name: validation_curve(runs / shown[name].run, "loss")
            for name in _variants(ours)
            if name in shown
        }
        figure = plots.learning_curves(curves, ylabel="validation loss")
        plots.save(figure, out / "learning.png")
