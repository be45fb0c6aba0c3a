"""Table of the search for a recipe, from the records that search.sh keeps.

    python experiments/clevr/recipes/search.py [FOLDER]

Puts the table into README.md, between its marks. Changes that are missing are left out.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

from msdspn_jax import _markdown
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.tasks.summary import put_into
from msdspn_jax.training.run_folder import read_evaluation, read_metrics, read_record

HERE = Path(__file__).parent
#: What a change is called, in the order of the table; others follow by name.
LABELS = {
    "base": "nothing",
    "adam-0.001": "Adam, rate 0.001 (published)",
    "adam-0.003": "Adam, rate 0.003",
    "rate-0.01": "rate 0.01, not 0.04",
    "rate-0.02": "rate 0.02",
    "rate-0.08": "rate 0.08",
    "momentum-0.9": "Muon's momentum 0.9, not 0.95",
    "momentum-0.98": "momentum 0.98",
    "decay-0.1": "weight decay 0.1",
    "cosine": "rate along a cosine, not a line",
    "average-0.99": "averaged weights, decay 0.99",
    "clip-1": "gradient clipped at 1",
    "position-2": "weight 2 on positions",
    "position-4": "weight 4",
    "batch-64": "batch 64, not 128",
    "batch-256": "batch 256",
    "width-16": "encoder of width 16, not 32",
    "width-64": "width 64",
    "no-end-norm": "no normalisation before the encoder's end",
    "latent-256": "latent width 256, not 512",
    "latent-1024": "latent width 1,024",
    "hidden-256": "hidden width 256, not 512",
    "hidden-1024": "hidden width 1,024",
    "inner-5": "5 inner steps, not 20",
    "inner-10": "10 inner steps",
    "inner-40": "40 inner steps",
    "neumann-1": "`neumann(1)`, not `identity()`",
    "neumann-3": "`neumann(3)`",
    "cg-3": "`conjugate_gradient(3, damping=0.1)`",
    "proximity-0": "no pull towards the initial set",
    "fresh": "fresh scenes at every step",
    "size-128-stride-2": "128 pixels, first stage of stride 2",
    "size-128": "128 pixels",
}


def read(folder):
    """Of every change: by seed, steps, loss of the last training line and test scores."""
    found = defaultdict(dict)
    for path in sorted(folder.glob("*-s[0-9]")):
        evaluation = read_evaluation(path)
        if evaluation is not None and "test" in evaluation["metrics"]:
            change, seed = re.fullmatch(r"(.*)-s(\d)", path.name).groups()
            steps = read_record(path)["config"]["steps"]
            loss = read_metrics(path, "train")[-1]["loss"]
            found[change][seed] = (steps, loss, evaluation["metrics"]["test"])
    return {k: found[k] for k in sorted(found, key=lambda k: ([*LABELS, k].index(k), k))}


def table(found):
    """Markdown: average precision per image by change, %, seeds side by side."""
    lines = []
    for change, seeds in found.items():
        runs = list(seeds.values())
        cells = [
            "; ".join(f"{100 * scores[f'ap_{t:g}']:.1f}" for *_, scores in runs)
            for t in AP_THRESHOLDS[:-1]
        ]
        losses = "; ".join(f"{loss:.4f}" for _, loss, _ in runs)
        steps = "; ".join(dict.fromkeys(f"{steps:,}" for steps, *_ in runs))
        lines.append([LABELS.get(change, change), ", ".join(seeds), steps, losses, *cells])
    return _markdown.table(["changed", "seeds", "steps", "loss of training", *AP_NAMES[:-1]], lines)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "runs"
    found = read(folder)
    if not found:  # Not run yet; the page says so.
        print(f"{folder}: no records of search.sh")
        return
    text = table(found)
    put_into(HERE / "README.md", text, "search.py")
    print(text)


if __name__ == "__main__":
    main()
