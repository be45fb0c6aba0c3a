"""Table and figure of the comparison at equal time, from the records that comparison.sh keeps.

    python experiments/clevr/comparison.py [FOLDER]

Writes comparison.png beside this file and puts the table into README.md, between its marks. Runs
may come from different machines: all had the processor time of as many steps of iDSPN, so the
figure's axis is the share of that time. Runs that are missing are left out.
"""

import json
import sys
from pathlib import Path

from msdspn_jax import _markdown, plots
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.tasks.clevr.report import PROTOCOLS
from msdspn_jax.tasks.summary import put_into
from msdspn_jax.training.run_folder import read_evaluation, read_metrics, read_record

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


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "comparison_runs"
    found = {label: seeds_of(folder, names) for label, names in ROWS.items()}
    found = {label: seeds for label, seeds in found.items() if seeds}
    if not found:
        raise SystemExit(f"{folder}: expected records of comparison.sh, got none that is scored")
    plots.save(figure(found), HERE / "comparison.png")
    put_into(HERE / "README.md", table(found), "comparison.py")
    print(table(found))


if __name__ == "__main__":
    main()
