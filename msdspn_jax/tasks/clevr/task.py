"""CLEVR object property prediction (paper, section 4.3): ``msdspn train clevr``."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from msdspn_jax.tasks.clevr.config import Config
from msdspn_jax.tasks.clevr.data import load_split, sampling
from msdspn_jax.tasks.clevr.model import MONITOR, build_predictor, outer_optimizer
from msdspn_jax.tasks.clevr.report import report
from msdspn_jax.tasks.clevr.scores import draw_figures, predict_all, score
from msdspn_jax.tasks.evaluation import inner_scores
from msdspn_jax.training.task import Task

__all__ = [
    "MONITOR",
    "Config",
    "build",
    "build_predictor",
    "load_split",
    "outer_optimizer",
    "report",
]


def build(config: Config) -> Task:
    """The task that a configuration describes."""
    predictor = build_predictor(config)

    def loss(variables, batch, keys, *, stage, axis_name):
        losses, prediction, state = predictor.loss(
            variables, batch["images"], batch["objects"], keys, inner_steps=stage,
            axis_name=axis_name,
        )  # fmt: skip
        inner = {name: jnp.mean(x) for name, x in inner_scores(prediction.minimum).items()}
        return jnp.mean(losses), (inner, state)

    def evaluate(variables, split, key, *, stage=None):
        images, objects = load_split(config, split)
        # In the first half of training, those that it is trained with; the log says how many.
        steps = config.inner.eval_num_steps or stage
        found, inner = predict_all(predictor, variables, images, objects, key, inner_steps=steps)
        return inner | score(found, objects) | ({"inner_steps": steps} if steps else {})

    def figures(variables, folder):
        draw_figures(predictor, variables, *load_split(config, "val"), Path(folder))

    if config.fresh:
        training_set = "fresh scenes"
    else:
        training_set = config.train_size or "as published"
    return Task(
        name="clevr",
        init=predictor.init,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(config),
        monitor=MONITOR,
        stage=config.stages(),
        staged_evaluation=True,
        figures=figures,
        describe={
            "train_size": training_set,
            "val_size": config.val_size,
            "test_size": config.test_size,
        },
        **sampling(config),
    )
