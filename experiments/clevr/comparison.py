"""Table and figure of the comparison at equal time, from the records that comparison.sh keeps.

    python experiments/clevr/comparison.py [FOLDER]

Writes comparison.png and summary_comparison.json, rows for the table of the project's README,
beside this file, and puts the table into README.md, between its marks. Runs may come from different
machines: all had the processor time of as many steps of iDSPN, so the figure's axis is the share of
that time. Runs that are missing are left out.
"""

import json
import sys
from pathlib import Path

from msdspn_jax import _markdown, plots
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.tasks.clevr.report import PROTOCOLS
from msdspn_jax.tasks.summary import Result, put_into, write_results
from msdspn_jax.training.run_folder import (
    read_evaluation,
    read_metrics,
    read_record,
    training_hours,
)

HERE = Path(__file__).parent
INNER_STEPS = ("20", "40")
#: Records by name, in the order of the table.
ROWS = {
    "iDSPN": ("idspn-0", "idspn-1"),
    "iDSPN, Adam": ("idspn-adam",),
    "DSPN": ("dspn-0", "dspn-1"),
    "DSPN, Adam": ("dspn-adam",),
    "Slot Attention": ("slot-attention-muon",),
    "Slot Attention, Adam": ("slot-attention",),
    "Slot MLP": ("slot-mlp",),
    "Slot MLP, Adam": ("slot-mlp-adam",),
    "iDSPN, FSPool, half the time": ("idspn-fspool",),
    "iDSPN, relation network, half the time": ("idspn-relation",),
    "iDSPN, sum, half the time": ("idspn-sum",),
    "iDSPN, mean, half the time": ("idspn-mean",),
}
#: AP0.5 at 128 x 128, %, and its protocol where that is not per image (the table of the paper; Slot
#: Attention as its authors).
PUBLISHED = {
    "iDSPN": "98.2±0.6",
    "DSPN": "47.4±17.6 (protocol not known)",
    "Slot Attention": "56.0±3.6 (data set)",
    "Slot MLP": "0.3±0.2 (protocol not known)",
}


def seeds_of(folder, names):
    """Steps, test scores, validation curve, and validation AP0.5 by inner steps of every record."""
    found = []
    for name in names:
        evaluation = read_evaluation(folder / name)
        if evaluation is not None and "test" in evaluation["metrics"]:
            steps = read_record(folder / name)["config"]["steps"]
            curve = [(x["step"] / steps, x["ap_0.5"]) for x in read_metrics(folder / name, "val")]
            file = folder / name / "figures" / "inner_steps.json"
            by_inner_steps = json.loads(file.read_text()) if file.exists() else {}
            found.append((steps, evaluation["metrics"]["test"], curve, by_inner_steps))
    return found


def table(found):
    """Markdown: average precision by model and protocol, seeds side by side, %."""
    head = ["model", "steps", "protocol", *AP_NAMES]
    head += [f"AP0.5, validation, {n} inner steps" for n in INNER_STEPS]
    lines = []
    for label, seeds in found.items():
        steps = "; ".join(f"{steps:,}" for steps, *_ in seeds)
        for prefix, protocol in PROTOCOLS.items():
            cells = [
                "; ".join(f"{100 * scores[f'{prefix}_{t:g}']:.1f}" for _, scores, *_ in seeds)
                for t in AP_THRESHOLDS
            ]
            cells += [
                "; ".join(f"{100 * by[n][f'{prefix}_0.5']:.1f}" for *_, by in seeds if n in by)
                for n in INNER_STEPS
            ]
            lines.append([label, steps, protocol, *cells])
    return _markdown.table(head, lines)


def figure(found):
    """Validation AP0.5 by share of the time; a line a run, a colour a model."""
    picture = plots.new_figure(8, 3.8)
    axes = picture.add_subplot()
    models = list(dict.fromkeys(label.removesuffix(", Adam") for label in ROWS))
    for label, seeds in found.items():
        color = plots.SERIES[models.index(label.removesuffix(", Adam")) % len(plots.SERIES)]
        style = ":" if "half" in label else "--" if "Adam" in label else "-"
        share = 0.5 if "half" in label else 1.0
        for number, (_, _, curve, _) in enumerate(seeds):
            x, y = zip(*curve, strict=True)
            axes.plot(
                [100 * share * v for v in x],
                [100 * v for v in y],
                color=color,
                lw=1.6,
                ls=style,
                marker="o",
                ms=3,
                label=None if number else label,
            )
    axes.set(xlabel="processor time, % of 2,300 steps of iDSPN", ylabel="validation AP0.5, %")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False,
                   fontsize=8)  # fmt: skip
    plots.plain_axes(axes)
    return picture


def results(found, folder):
    """Rows for the README: the four models, trained alike."""
    rows = []
    for model in (label for label in PUBLISHED if label in found):
        seeds = found[model]
        hours = sum(training_hours(folder / name) for name in ROWS[model])
        steps = seeds[0][0]
        rows.append(
            Result(
                "[CLEVR at equal time](experiments/clevr/README.md#the-papers-comparison-at-equal"
                "-time), three to ten objects: AP0.5 per image, %",
                model,
                PUBLISHED[model],
                "; ".join(f"{100 * scores['ap_0.5']:.1f}" for _, scores, *_ in seeds),
                f"64 x 64 pixels, not 128; {steps:,} steps of 128; {len(seeds)} seed"
                + "s" * (len(seeds) > 1),
                f"{hours:.1f}",
                f"experiments/clevr/comparison.sh {' '.join(ROWS[model])}",
            )
        )
    return rows


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "comparison_runs"
    found = {label: seeds_of(folder, names) for label, names in ROWS.items()}
    found = {label: seeds for label, seeds in found.items() if seeds}
    if not found:
        raise SystemExit(f"{folder}: expected records of comparison.sh, got none that is scored")
    plots.save(figure(found), HERE / "comparison.png")
    write_results(HERE, results(found, folder), "comparison")
    put_into(HERE / "README.md", table(found), "comparison.py")
    print(table(found))


if __name__ == "__main__":
    main()
