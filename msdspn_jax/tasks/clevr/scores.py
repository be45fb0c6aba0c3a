"""Scores of CLEVR object property prediction, and figures of where a model errs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from msdspn_jax._cores import compiler_options
from msdspn_jax._files import as_json
from msdspn_jax.clevr import metrics
from msdspn_jax.clevr.objects import CLEVR_LAYOUT
from msdspn_jax.tasks.clevr.model import Predictor
from msdspn_jax.tasks.evaluation import inner_scores, means, over_split
from msdspn_jax.training.task import Variables

# The evaluation of test-time compute, beside the number of steps of the configuration.
_STEPS_TRIED = (10, 20, 40, 80)


# One program for every evaluation of a configuration: jit's cache is by identity otherwise.
@functools.lru_cache(maxsize=16)
def _scorer(predictor: Predictor, inner_steps: int | None):
    @functools.partial(jax.jit, compiler_options=compiler_options())
    def run(variables, images, objects, keys):
        prediction = predictor.predict(variables, images, keys, inner_steps=inner_steps)
        scores = {"loss": predictor.distance(prediction, objects)}
        return prediction.objects, scores | inner_scores(prediction.minimum)

    return run


def predict_all(
    predictor: Predictor,
    variables: Variables,
    images: UInt8[np.ndarray, "num size size 3"],
    objects: Float[np.ndarray, "num n 19"],
    key: Key[Array, ""],
    *,
    inner_steps: int | None = None,
) -> tuple[Float[np.ndarray, "num n 19"], dict[str, float]]:
    """Predict every image, a batch at a time.

    Returns:
        The predicted sets, and means over the images: ``loss`` (of training, in this model's own
        units) and how the inner minimisation went.
    """
    run = _scorer(predictor, inner_steps)

    def of_batch(index):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index))
        return run(variables, images[index], objects[index], keys)

    batch_size = predictor.config.batch_size
    predicted, scores = over_split(of_batch, len(images), batch_size=batch_size)
    return predicted, means(scores)


def score(
    prediction: Float[np.ndarray, "num n 19"], objects: Float[np.ndarray, "num n 19"]
) -> dict[str, float]:
    """Average precision at every published threshold, in [0, 1].

    ``ap_0.125`` and so on by protocol per_image, ``ap_mean`` their mean; ``dataset_ap_0.125`` and
    so on by protocol dataset. See `metrics.average_precision`. A prediction that is not finite
    finds nothing; how many there are is said by ``not_finite``, where there are any.
    """
    found: dict[str, float] = {}
    finite = np.all(np.isfinite(prediction), (1, 2))
    if not np.all(finite):
        found["not_finite"] = float(np.sum(~finite))
        # Nowhere near an object, and ranked behind all others.
        nothing = np.zeros_like(prediction[:1])
        nothing[..., :3], nothing[..., -1] = 1e6, -1e6
        prediction = np.where(np.reshape(finite, (-1, 1, 1)), prediction, nothing)
    protocols: dict[str, metrics.Protocol] = {"ap": "per_image", "dataset_ap": "dataset"}
    for prefix, protocol in protocols.items():
        values = metrics.average_precision(prediction, objects, protocol=protocol)
        found |= {
            f"{prefix}_{threshold:g}": float(value)
            for threshold, value in zip(metrics.AP_THRESHOLDS, values, strict=True)
        }
        if protocol == "per_image":
            found["ap_mean"] = float(np.mean(values))
    return found


def draw_figures(
    predictor: Predictor,
    variables: Variables,
    images: UInt8[np.ndarray, "num size size 3"],
    objects: Float[np.ndarray, "num n 19"],
    folder: Path,
) -> None:
    """Draw predictions, curves and errors into ``folder``.

    predictions.png; precision_recall.png; errors.png; for idspn and dspn also inner_steps.png, with
    its numbers in inner_steps.json: average precision by number of inner steps.
    """
    from msdspn_jax import plots
    from msdspn_jax.clevr import plots as clevr_plots

    config = predictor.config
    key = jax.random.key(0)
    prediction, _ = predict_all(predictor, variables, images, objects, key)
    count = min(6, len(images))
    panels = clevr_plots.scenes(
        list(images[:count]), list(prediction[:count]), list(objects[:count])
    )
    plots.save(panels, folder / "predictions.png")
    curves = {
        "AP" + ("∞" if np.isinf(threshold) else f"{threshold:g}"): metrics.precision_recall(
            prediction, objects, threshold
        )
        for threshold in metrics.AP_THRESHOLDS
    }
    plots.save(clevr_plots.precision_recall_curves(curves), folder / "precision_recall.png")
    plots.save(_error_figure({config.model: prediction}, objects), folder / "errors.png")
    if config.steps_at_evaluation is None:
        return
    steps = sorted({*_STEPS_TRIED, config.steps_at_evaluation})
    by_steps = {}
    for num_steps in steps:
        tried, inner = predict_all(
            predictor, variables, images, objects, key, inner_steps=num_steps
        )
        by_steps[num_steps] = inner | score(tried, objects)
    (folder / "inner_steps.json").write_text(as_json(by_steps, indent=1) + "\n")
    names = [f"ap_{threshold:g}" for threshold in metrics.AP_THRESHOLDS]
    lines = {k: np.array([values[name] for name in names]) for k, values in by_steps.items()}
    figure = clevr_plots.average_precision_by_steps(
        lines, metrics.AP_THRESHOLDS, protocol="per image"
    )
    plots.save(figure, folder / "inner_steps.png")


def _error_figure(predictions: Mapping[str, np.ndarray], objects: np.ndarray):
    """Errors by attribute, and distance by number of objects, of one or several models."""
    from msdspn_jax.clevr import plots as clevr_plots

    by_attribute, by_number = {}, {}
    for name, prediction in predictions.items():
        wrong = metrics.attribute_errors(prediction, objects)
        attributes = (*CLEVR_LAYOUT.attributes, "presence")
        by_attribute[name] = {a: float(np.nanmean(wrong[a])) for a in attributes}
        means = metrics.mean_by_number_of_objects(wrong["position"], objects)
        by_number[name] = {number: float(value) for number, value in means.items()}
    return clevr_plots.errors(by_attribute, by_number)
