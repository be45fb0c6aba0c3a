"""Calibrate a CLEVR model: what its scores mean, and from which on to show an object.

    python experiments/clevr/calibrate.py [--model FILE] [--num 2000] [--judge]

Renders fresh procedural scenes, fits a logistic curve of presence and lead (in
`msdspn_jax.trained.calibration`) to half of them, and judges it by the other half. The fit goes
into the weights file (by default that of the model in the box), where `msdspn predict` and `msdspn
export` find it; calibration.json and reliability.png go beside this script. Run it again whenever
the model is another. With --judge the fit that is in the file is judged, and the file left alone.
"""

import argparse
import dataclasses
import json
from datetime import date
from pathlib import Path

import jax
import numpy as np

from msdspn_jax import plots
from msdspn_jax.bench.layer import device_name
from msdspn_jax.clevr import plots as clevr_plots
from msdspn_jax.clevr.metrics import right_within
from msdspn_jax.clevr.objects import CLEVR_LAYOUT, PRESENCE_THRESHOLD
from msdspn_jax.tasks.clevr.data import load_split
from msdspn_jax.tasks.clevr.scores import predict_all, score
from msdspn_jax.trained import calibration as calibrating
from msdspn_jax.trained.weights import box_model_path, load_model, set_calibration

HERE = Path(__file__).parent
# Scenes that neither training, nor its validation, nor the scores of the model have seen.
SEED = 20_001


def judged(model, num):
    """The sets predicted for fresh scenes, which of their elements are right, and the true sets."""
    config = dataclasses.replace(
        model.config, data="procedural", data_seed=SEED, val_size=num, cache_dir=None
    )
    images, objects = (np.asarray(x) for x in load_split(config, "val"))
    key = jax.random.key(0)
    found, _ = predict_all(model.predictor, model.variables, images, objects, key)
    return found, right_within(found, objects, calibrating.DISTANCE), objects


def number_of(objects):
    """How many real objects sets have."""
    return int((objects[..., CLEVR_LAYOUT.presence] > PRESENCE_THRESHOLD).sum())


def precisions(sets, objects):
    """Average precision by both protocols, as `msdspn predict --scenes` prints it."""
    return {k: v for k, v in score(sets, objects).items() if "ap_" in k and "mean" not in k}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=box_model_path(), help="a weights file")
    parser.add_argument("--num", type=int, default=2000, help="fresh scenes; half of them to fit")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the figure and numbers")
    parser.add_argument("--judge", action="store_true", help="judge the fit that is in the file")
    options = parser.parse_args()
    model = load_model(options.model)
    sets, right, objects = judged(model, options.num)
    half = options.num // 2
    fitted = model.calibration
    if not options.judge:
        fitted = calibrating.fit(sets[:half], right[:half], number_of(objects[:half]))
    elif fitted is None:
        parser.error(f"--judge: expected a fit in {options.model}, got none")

    sets, right, objects = sets[half:], right[half:], objects[half:]
    number, presence = number_of(objects), sets[..., CLEVR_LAYOUT.presence]
    scores = np.asarray(fitted.score(sets))
    scored = sets.copy()
    scored[..., CLEVR_LAYOUT.presence] = scores
    curves = {
        "presence, as it is": calibrating.reliability(presence, right),
        "calibrated score": calibrating.reliability(scores, right),
    }
    thresholds = np.linspace(0, 1, 101)
    kept = np.array(
        [calibrating.precision_and_recall(scores, right, number, t) for t in thresholds]
    ).T
    figure = clevr_plots.reliability(
        curves, threshold=fitted.threshold, by_threshold=(thresholds, *kept)
    )
    plots.save(figure, options.out / "reliability.png")
    precision, recall = calibrating.precision_and_recall(scores, right, number, fitted.threshold)
    found = {
        "step": model.step,
        "device": device_name(),
        "date": date.today().isoformat(),
        "calibration": fitted.to_json(),
        "distance": calibrating.DISTANCE,
        "held_out_scenes": options.num - half,
        "precision": precision,
        "recall": recall,
        # What ranks objects decides as well: it is the score in `msdspn predict`.
        "ranked_by_presence": precisions(sets, objects),
        "ranked_by_score": precisions(scored, objects),
        "error": {name: curve.error for name, curve in curves.items()},
        "bins": {
            name: {
                "score": curve.score.tolist(),
                "right": curve.right.tolist(),
                "number": curve.number.tolist(),
            }
            for name, curve in curves.items()
        },
    }
    (options.out / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
    if not options.judge:
        set_calibration(options.model, fitted)
    print(json.dumps({name: value for name, value in found.items() if name != "bins"}, indent=1))


if __name__ == "__main__":
    main()
