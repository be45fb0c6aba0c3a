"""Score the model in the box on fresh procedural scenes, and on a folder of other renderings.

    python experiments/clevr/box_model.py [--scenes FOLDER] [--num 2000]

FOLDER holds images/*.png and one *_scenes.json. Writes box_model.json and box_model.png beside
this file: average precision by both protocols, by the number of inner steps and by the number of
initial sets. Puts the tables into README.md and the first into the model's card, between marks.
"""

import argparse
import dataclasses
import json
import time
from datetime import date
from pathlib import Path

import jax
import numpy as np

from msdspn_jax import _markdown, plots
from msdspn_jax._memory import keep_freed_memory
from msdspn_jax.bench.layer import device_name
from msdspn_jax.clevr.files import read_image, read_scenes, resize_image
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.clevr.objects import encode
from msdspn_jax.clevr.plots import average_precision_by_steps
from msdspn_jax.tasks.clevr.data import load_split
from msdspn_jax.tasks.clevr.scores import predict_all, score
from msdspn_jax.tasks.summary import Result, put_into, write_results
from msdspn_jax.trained.weights import box_model_path, load_model

HERE = Path(__file__).parent
STEPS = (10, 20, 40, 60, 80, 100)
STARTS = (1, 2, 4)


def other_scenes(folder, size):
    """Images and objects of a folder of renderings."""
    (file,) = folder.glob("*_scenes.json")
    scenes = read_scenes(file)
    images = [resize_image(read_image(folder / "images" / s.image_filename), size) for s in scenes]
    return np.stack(images), np.stack([encode(s.objects) for s in scenes])


def cells(scores, prefix):
    return [f"{100 * scores[f'{prefix}{t:g}']:.1f}" for t in AP_THRESHOLDS]


def scenes_of(found):
    """How the scenes of each kind are called."""
    names = {
        "procedural": "fresh procedural scenes",
        "other": "scenes rendered by Blender",
        "odd": "of them, to which the renderer was not fitted",
    }
    return {k: f"{found[k]['num']:,} {name}" for k, name in names.items() if k in found}


def table(found, steps, starts):
    """Markdown: average precision of the model as it is shipped, by scenes and protocol, %."""
    protocols = {"per image": "ap_", "data set": "dataset_ap_"}
    how = f"{steps} inner steps from {starts} initial set{'s' * (starts > 1)}"
    lines = []
    for name, scenes in scenes_of(found).items():
        for protocol, prefix in protocols.items():
            scores = cells(found[name]["by_starts"][starts], prefix)
            lines.append([scenes, protocol, *scores])
            scenes = "the same"
    return _markdown.table([how, "protocol", *AP_NAMES], lines)


def starts_table(found):
    """Markdown: average precision per image by the number of initial sets, %, and its cost."""
    lines = []
    for name, scenes in scenes_of({k: v for k, v in found.items() if k != "odd"}).items():
        for starts, scores in found[name]["by_starts"].items():
            seconds = f"{scores['seconds_per_image']:.3f}"
            lines.append([scenes, starts, *cells(scores, "ap_"), seconds])
            scenes = "the same"
    return _markdown.table(["scenes", "initial sets", *AP_NAMES, "seconds an image"], lines)


def in_short(model, found, hours):
    """Rows of the README's summary."""
    names = {"procedural": "fresh scenes of our renderer", "other": "scenes rendered by Blender"}
    shown = [name for name in names if name in found]
    config = model.config
    starts = config.inner.eval_num_starts or 1
    scores = {name: found[name]["by_starts"][starts] for name in found if name in (*names, "odd")}
    ours = {
        name: ", ".join(f"{100 * of[f'ap_{t:g}']:.1f}" for t in AP_THRESHOLDS[2:5])
        for name, of in scores.items()
    }
    if "odd" in found:
        names["other"] = f"{found['other']['num']} {names['other']}"
        ours["other"] += (
            f"; {found['odd']['num']} to which the renderer was not fitted: {ours['odd']}"
        )
    return [
        Result(
            "[CLEVR](experiments/clevr/README.md), three to ten objects: average precision per"
            f" image at {', '.join(map(str, AP_THRESHOLDS[2:5]))} CLEVR units, %, iDSPN",
            names[name],
            "98.2, 95.8, 76.9 (the real data set)" if name == shown[0] else "",
            ours[name],
            f"{config.size} x {config.size} pixels{', not 128' * (config.size != 128)}; encoder of"
            f" width {config.encoder_width}, not 64; {model.step:,} steps of {config.batch_size},"
            f" not 54,700; decoded {'once' if starts == 1 else f'from {starts} initial sets'} with"
            f" {config.inner.eval_num_steps} inner steps; 1 seed",
            hours,
            # It scores; how the model was trained: see the card.
            "python experiments/clevr/box_model.py --scenes REFERENCES --hours 15.6",
        )
        for name in shown
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=Path, help="folder of other renderings")
    parser.add_argument("--num", type=int, default=2000, help="fresh procedural scenes")
    parser.add_argument("--model", type=Path, default=box_model_path())
    parser.add_argument("--hours", default="", help="that its training took, for the summary")
    options = parser.parse_args()
    keep_freed_memory()
    model = load_model(options.model)
    config = dataclasses.replace(model.config, test_size=options.num, cache_dir=None)
    data = {"procedural": load_split(config, "test")}
    if options.scenes:
        data["other"] = other_scenes(options.scenes, config.size)
    found = {"step": model.step, "device": device_name(), "date": date.today().isoformat()}
    last = model.config.steps_at_evaluation
    for name, (images, objects) in data.items():
        images, objects = np.asarray(images), np.asarray(objects)
        found[name] = {"num": len(images), "by_steps": {}, "by_starts": {}}
        ways = [(steps, 1) for steps in (*STEPS, last)] + [(last, starts) for starts in STARTS]
        for steps, starts in dict.fromkeys(ways):
            of = model.with_starts(starts)

            def predict(num, of=of, steps=steps, images=images, objects=objects):
                key = jax.random.key(0)
                return predict_all(
                    of.predictor, of.variables, images[:num], objects[:num], key, inner_steps=steps
                )

            predict(min(len(images), of.config.batch_size))  # Compiles.
            started = time.perf_counter()
            sets, inner = predict(len(images))
            seconds = (time.perf_counter() - started) / len(images)
            scores = {k: float(v) for k, v in score(sets, objects).items()}
            result = scores | inner | {"seconds_per_image": seconds}
            if starts == 1:
                found[name]["by_steps"][steps] = result
            if steps == last:
                found[name]["by_starts"][starts] = result
                if name == "other":  # The renderer's constants were fitted on the even ones.
                    odd = found.setdefault("odd", {"num": len(sets[1::2]), "by_starts": {}})
                    scores_of_odd = score(sets[1::2], objects[1::2])
                    odd["by_starts"][starts] = {k: float(v) for k, v in scores_of_odd.items()}
            shown = json.dumps({k: round(100 * v, 1) for k, v in scores.items()})
            print(name, steps, starts, shown, flush=True)
    (HERE / "box_model.json").write_text(json.dumps(found, indent=1) + "\n")
    write_results(HERE, in_short(model, found, options.hours), "box")
    shipped = table(found, last, model.config.inner.eval_num_starts or 1)
    for page in (HERE / "README.md", box_model_path().with_suffix(".md")):
        put_into(page, shipped, "box_model.py")
    put_into(HERE / "README.md", starts_table(found), "box_model.py, initial sets")
    by_steps = found["procedural"]["by_steps"]
    curves = {n: np.array([by_steps[n][f"ap_{t:g}"] for t in AP_THRESHOLDS]) for n in STEPS}
    figure = average_precision_by_steps(curves, AP_THRESHOLDS, protocol="per image")
    plots.save(figure, HERE / "box_model.png")


if __name__ == "__main__":
    main()
