"""Configurations of version 0.1.0 in the words of this one."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from msdspn_jax import tasks
from msdspn_jax.adjoints import conjugate_gradient, neumann, unrolled
from msdspn_jax.models.inner import Inner
from msdspn_jax.training.config import TrainConfig, from_dict
from msdspn_jax.training.legacy import flag_now, modernise

# What `TrainConfig.to_dict` of 0.1.0 gave for every task, as it was.
COMMON: dict[str, Any] = {
    "seed": 3, "steps": 7, "batch_size": 4, "learning_rate": 0.01, "run_dir": "runs/x",
    "resume": True, "allow_config_change": False, "replicates": 2, "log_every": 5,
    "evaluate_every": 6, "checkpoint_every": 7, "figures_every": 8, "keep_checkpoints": 9,
    "steps_per_dispatch": 10, "compilation_cache": False, "parallel": "pmap",
    "distributed": False, "coordinator": None, "num_processes": None, "process_id": None,
    "heartbeat_timeout": 11, "skip_bad_steps": 12, "max_inner_energy": 13.0,
    "tensorboard": False, "wandb": False, "progress": False,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "model": "idspn", "inner_steps": 20, "eval_inner_steps": None, "inner_learning_rate": 1.0,
    "momentum": None, "backward": "auto", "pool": "fspool", "hidden_dim": 512, "latent_dim": 512,
    "proximity": 0.1, "max_grad_norm": None,
}  # fmt: skip
OLD: dict[str, dict[str, Any]] = {
    "random-sets": COMMON | AUTOENCODER | {
        "set_size": 8, "set_dim": 8, "train_size": 64000, "fresh": False, "val_size": 6400,
        "test_size": 6400,
    },
    "digits": COMMON | AUTOENCODER | {
        "inner_learning_rate": 3.0, "hidden_dim": 256, "latent_dim": 128, "loss": "hungarian",
        "min_intensity": 5, "split_seed": 0,
    },
    "numbering": COMMON | {
        "model": "idspn", "train_size": 640, "augment": False, "set_size": 64, "num_classes": 4,
        "classes_per_set": None, "val_size": 6400, "test_size": 64000, "hidden_dim": 256,
        "latent_dim": 256, "width": 64, "inner_steps": 20, "eval_inner_steps": None,
        "inner_momentum": None, "max_inner_grad_norm": None, "gradient": None, "pool": "fspool",
    },
    "clevr": COMMON | {
        "model": "idspn", "data": "procedural", "data_dir": None, "cache_dir": None,
        "images_on": "device", "train_size": 0, "val_size": 1000, "test_size": 15000,
        "data_seed": 0, "render_quality": "default", "size": 128, "set_size": 10,
        "min_objects": 3, "max_objects": 10, "encoder": "resnet18", "encoder_width": 64,
        "compute_dtype": "float32", "latent_dim": 512, "hidden_dim": 512, "pool": "fspool",
        "inner_steps": 20, "late_inner_steps": 40, "eval_inner_steps": None,
        "inner_learning_rate": 1.0, "momentum": None, "max_grad_norm": 10.0, "backward": "auto",
        "rate_drop": 0.9, "slot_dim": 64, "slot_iterations": 3, "position_weight": 1.0,
        "warmup_steps": 1000,
    },
}  # fmt: skip


def read(task: str, **changes: Any) -> Any:
    values = modernise(task, OLD[task] | changes)
    return from_dict(tasks.load(task).Config, json.loads(json.dumps(values)))


@pytest.mark.parametrize("task", OLD)
@pytest.mark.parametrize("model", ["idspn", "dspn"])
def test_defaults_of_then_are_those_of_now(task, model):
    config = read(task, model=model)
    published = tasks.load(task).Config(model=model)
    inner = published.resolved_inner()
    if (task, model) == ("clevr", "dspn"):  # It clipped then, which the authors' does not do.
        inner = dataclasses.replace(inner, max_grad_norm=10.0)
    assert config.resolved_inner() == inner
    assert config.hidden_dim == published.hidden_dim


@pytest.mark.parametrize("task", OLD)
def test_flags_of_all_tasks_are_kept(task):
    config: TrainConfig = read(task)
    assert (config.seed, config.steps, config.batch_size, config.replicates) == (3, 7, 4, 2)
    assert config.learning_rate == 0.01
    run = config.run
    assert (run.dir, run.resume, run.tensorboard, run.progress) == ("runs/x", True, False, False)
    numbers = (run.log_every, run.evaluate_every, run.checkpoint_every, run.figures_every)
    assert (*numbers, run.keep_checkpoints) == (5, 6, 7, 8, 9)
    devices = config.devices
    assert (devices.parallel, devices.steps_per_dispatch, devices.heartbeat_timeout) == (
        "pmap", 10, 11
    )  # fmt: skip
    assert (config.safety.skip_bad_steps, config.safety.max_inner_energy) == (12, 13.0)


def test_image_encoders_had_no_norm_before_the_end():
    assert tasks.load("clevr").Config().encoder_end_norm
    assert not read("clevr").encoder_end_norm
    recorded = json.loads(json.dumps(tasks.load("clevr").Config().to_dict()))
    del recorded["encoder_end_norm"]
    assert not modernise("clevr", recorded)["encoder_end_norm"]
    assert modernise("clevr", recorded | {"encoder_end_norm": True})["encoder_end_norm"]


def test_settings_of_the_inner_loop_are_kept():
    config = read(
        "random-sets", inner_steps=3, eval_inner_steps=4, inner_learning_rate=2.0, momentum=0.0,
        backward="neumann:2", pool="sum", proximity=0.5, max_grad_norm=6.0,
    )  # fmt: skip
    assert config.inner == Inner(
        num_steps=3, eval_num_steps=4, step_size=2.0, momentum=0.0, adjoint=neumann(2),
        pool="sum", proximity=0.5, max_grad_norm=6.0,
    )  # fmt: skip
    assert read("random-sets").resolved_inner().max_grad_norm == math.inf
    config = read(
        "numbering", inner_momentum=0.5, max_inner_grad_norm=7.0,
        gradient="conjugate_gradient:4:0.01",
    )  # fmt: skip
    inner = config.resolved_inner()
    assert (inner.momentum, inner.max_grad_norm) == (0.5, 7.0)
    assert inner.adjoint == conjugate_gradient(4, damping=0.01)
    assert (inner.projection, inner.proximity) == ("simplex", 0.0)
    config = read("clevr", inner_steps=5, late_inner_steps=6, pool="relation")
    assert (config.inner.num_steps, config.inner.late_num_steps) == (5, 6)
    assert config.steps_at_evaluation == 6
    assert config.inner.pool == "relation"


def test_zero_and_none_meant_something():
    assert read("clevr", learning_rate=0.0).resolved_learning_rate() == 1e-3
    assert read("clevr").fresh
    assert read("clevr").train_size is None
    real = read("clevr", data="folder", data_dir="here")
    assert (real.fresh, real.train_size) == (False, None)
    assert read("clevr", train_size=9).train_size == 9
    for size in (0, None):
        assert read("numbering", train_size=size).fresh
    assert not read("numbering").fresh


def test_a_model_is_what_its_adjoint_says():
    """0.1.0 let iDSPN be unrolled: that is DSPN, with the momentum and clipping of iDSPN."""
    config = read("numbering", gradient="unrolled")
    inner = config.resolved_inner()
    assert (config.model, inner.adjoint) == ("dspn", unrolled())
    assert (inner.momentum, inner.max_grad_norm) == (0.9, 40.0)


def test_models_without_an_inner_loop():
    config = read("numbering", model="bilstm", inner_steps=3)
    assert config.steps_at_evaluation is None
    assert read("clevr", model="slot-mlp", learning_rate=0).resolved_learning_rate() == 4e-4


@pytest.mark.parametrize("task", OLD)
def test_what_this_version_writes_stays_as_it_is(task):
    config = read(task)
    values = json.loads(json.dumps(config.to_dict()))
    assert modernise(task, values) == values
    assert from_dict(type(config), values) == config
    # Without the groups that never change the numbers, as in weights files.
    values = config.numerical()
    assert modernise(task, values) == values
    assert from_dict(type(config), values).inner == config.inner


def test_flags_that_have_another_name():
    assert flag_now("inner_steps") == "--inner.num-steps"
    assert flag_now("backward") == flag_now("gradient") == "--inner.adjoint"
    assert flag_now("steps") is None
