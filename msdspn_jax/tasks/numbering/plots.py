"""Pictures of numbered multisets."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from msdspn_jax.losses import numbering_assignment
from msdspn_jax.tasks.numbering.config import Config
from msdspn_jax.tasks.numbering.data import draw_batch, fold_in_each, split_keys
from msdspn_jax.tasks.numbering.model import build_model


def draw_predictions(config: Config, params: PyTree, path: Path, *, num_sets: int = 6) -> None:
    """Draw validation multisets with the predicted numbers in them; wrong elements are crossed."""
    import matplotlib
    from matplotlib.figure import Figure

    from msdspn_jax import plots

    # A row of at most 16 elements stays readable.
    shown = min(config.set_size, 16)
    index = jnp.arange(num_sets)
    batch = draw_batch(split_keys("val", index), **config.sizes())
    model = build_model(config)
    noise = model.draw_noise(fold_in_each(jax.random.key(0), index), config.set_size)
    prediction, _ = jax.jit(
        lambda params, inputs, noise: model.apply(params, inputs, noise, **config.at_evaluation)
    )(params, batch.inputs, noise)
    assignment = numbering_assignment(prediction, batch.targets, batch.inputs, cost=model.cost)
    expected = jnp.take_along_axis(batch.targets.argmax(-1), assignment, axis=1)
    number, classes = np.asarray(prediction.argmax(-1)), np.asarray(batch.inputs.argmax(-1))
    right = number == np.asarray(expected)
    figure = Figure(figsize=(0.45 * shown + 1.5, 0.5 * num_sets + 0.6))
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["tab10"]
    for row in range(num_sets):
        for column in range(shown):
            place = (column, num_sets - row)
            axes.scatter(*place, s=240, color=colors(classes[row, column] % 10), alpha=0.85)
            axes.text(*place, str(number[row, column]), ha="center", va="center", color="white")
            if not right[row, column]:
                axes.scatter(*place, s=330, marker="x", color="black", linewidth=1.5)
        share = f"{right[row].mean():.0%} right"
        axes.text(shown - 0.2, num_sets - row, share, va="center", fontsize=9)
    title = f"{config.model}: color is the class, the number is predicted"
    if shown < config.set_size:
        title += f" (first {shown} of {config.set_size})"
    axes.set(xlim=(-0.7, shown + 1.6), ylim=(0.3, num_sets + 0.7))
    axes.set_title(title, fontsize=10)
    axes.axis("off")
    plots.save(figure, path, dpi=120, tight=True)
