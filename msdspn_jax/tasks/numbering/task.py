"""Class-specific numbering (paper, section 4.1): ``msdspn train numbering``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from msdspn_jax import _check
from msdspn_jax.losses import numbering_assignment, numbering_loss
from msdspn_jax.metrics import numbering_accuracy
from msdspn_jax.tasks.evaluation import inner_scores, means, over_split
from msdspn_jax.tasks.numbering.config import Config
from msdspn_jax.tasks.numbering.data import NumberingBatch, draw_batch, fold_in_each, split_keys
from msdspn_jax.tasks.numbering.model import NumberingModel, build_model
from msdspn_jax.tasks.numbering.plots import draw_predictions
from msdspn_jax.tasks.numbering.report import report
from msdspn_jax.training.outer import outer_optimizer
from msdspn_jax.training.task import Task, epoch_positions

__all__ = ["Config", "build", "report"]


def build(config: Config) -> Task:
    """The task that a configuration describes."""
    model = build_model(config)
    sizes = config.sizes()
    split_sizes = {"val": config.val_size, "test": config.test_size}

    def sample(key, step, slots):
        key_order, key_samples, key_augment = (jax.random.fold_in(key, i) for i in range(3))
        if config.fresh:
            keys = fold_in_each(jax.random.fold_in(key_samples, step), slots)
        else:
            index = epoch_positions(
                key_order, step, slots, batch_size=config.batch_size, size=config.train_size
            )
            keys = fold_in_each(key_samples, index)
        augment = fold_in_each(jax.random.fold_in(key_augment, step), slots)
        return draw_batch(keys, **sizes, permutation_keys=augment if config.augment else None)

    def loss(variables, batch, keys, *, stage, axis_name):
        del axis_name
        scores = _score(model, variables["params"], batch, keys, num_steps=stage)
        averages = {name: jnp.mean(value) for name, value in scores.items()}
        return averages.pop("loss"), (averages, None)

    @jax.jit
    def score(params, sample_keys, noise_keys):
        batch = draw_batch(sample_keys, **sizes)
        return _score(model, params, batch, noise_keys, **config.at_evaluation)

    def evaluate(variables, split, key):
        _check.require_choice("split", split, split_sizes)

        def scores_of(index):
            index = jnp.asarray(index)
            return score(variables["params"], split_keys(split, index), fold_in_each(key, index))

        return means(over_split(scores_of, split_sizes[split], batch_size=8 * config.batch_size))

    def figures(variables, folder):
        draw_predictions(config, variables["params"], Path(folder) / "numbering.png")

    return Task(
        name="numbering",
        init=lambda key: {"params": model.init(key)},
        sample=sample,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        monitor=("macro_accuracy", "max"),
        stage=config.stages(),
        figures=figures,
        describe={
            "train_size": "fresh samples" if config.fresh else config.train_size,
            "val_size": config.val_size,
            "test_size": config.test_size,
        },
    )


def _score(
    model: NumberingModel, params: PyTree, batch: NumberingBatch, keys, **options: Any
) -> dict[str, jax.Array]:
    """Loss and accuracies of every set, and how the inner minimisation went, if there is one."""
    noise = model.draw_noise(keys, batch.inputs.shape[1])
    prediction, minimum = model.apply(params, batch.inputs, noise, **options)
    assignment = numbering_assignment(prediction, batch.targets, batch.inputs, cost=model.cost)
    accuracy = numbering_accuracy(prediction, batch.targets, assignment)
    loss = numbering_loss(
        prediction, batch.targets, batch.inputs, cost=model.cost, assignment=assignment
    )
    scores = {"loss": loss, "micro_accuracy": accuracy.micro, "macro_accuracy": accuracy.macro}
    return scores | inner_scores(minimum)
