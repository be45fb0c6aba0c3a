"""Tiny tasks for the tests of the training room; importable by subprocesses as well."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.training.config import Run, RunFlags, TrainConfig
from msdspn_jax.training.outer import outer_optimizer
from msdspn_jax.training.task import Task, epoch_positions


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Linear regression, with whatever a test wants to go wrong."""

    steps: int = 20
    batch_size: int = 8
    run: RunFlags = Run(  # noqa: RUF009 (a value)
        log_every=5, evaluate_every=10, checkpoint_every=5, tensorboard=False, progress=False
    )
    noise: float = 0.1
    """Noise in the model: a different number for every example and step."""
    batch_norm: bool = False
    stages: bool = False
    host_data: bool = False
    bad_step: int | None = None
    """The step with a NaN in its loss."""
    bad_gradient: bool = False
    """… in its gradient alone."""
    explode: bool = False
    """Report an inner energy of 1e9 at the bad step."""
    delay: float = 0.0
    """Seconds that a step's data take (needs host_data)."""
    data_argument: bool = False
    """Hand the data set to the steps as an argument."""


def configured(config_type: type[TrainConfig] = Config, /, **flags: Any) -> Any:
    """A configuration from its flags: those of groups as the command line has them."""
    config = config_type()
    values: dict[str, Any] = {}
    for name, value in flags.items():
        name = {"run_dir": "dir"}.get(name, name)
        for group in ("run", "devices", "safety"):
            if hasattr(getattr(config, group), name):
                current = values.get(group, getattr(config, group))
                values[group] = dataclasses.replace(current, **{name: value})
                break
        else:
            values[name] = value
    return dataclasses.replace(config, **values)


def build(config: Config) -> Task:
    data = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    target = data @ np.array([1.0, -2.0, 0.5, 3.0], np.float32)

    def init(key):
        variables = {"params": {"w": jax.random.normal(key, (4,)), "b": jnp.zeros(())}}
        if config.batch_norm:
            variables["state"] = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
        return variables

    def sample(key, step, slots, placed=None):
        assert (placed is not None) == config.data_argument
        indices = epoch_positions(key, step, slots, batch_size=config.batch_size, size=50)
        if config.host_data:
            time.sleep(config.delay)
            indices = np.asarray(indices)
            return data[indices], target[indices], np.full(len(slots), step)
        x, y = placed or (jnp.asarray(data), jnp.asarray(target))
        return x[indices], y[indices], jnp.full(len(slots), step)

    def loss(variables, batch, keys, *, stage, axis_name):
        x, y, step = batch
        params, state = variables["params"], None
        if config.batch_norm:
            mean = jnp.mean(x, 0)
            if axis_name is not None:
                mean = jax.lax.pmean(mean, axis_name)
            old = variables["state"]
            state = {"mean": 0.9 * old["mean"] + 0.1 * mean, "count": old["count"] + 1}
            x = x - mean
        noise = jax.vmap(lambda k: jax.random.normal(k))(keys)
        error = x @ params["w"] + params["b"] - y + config.noise * noise
        value = jnp.mean(error**2) * (1.0 if stage is None else stage)
        is_bad = step[0] == (-1 if config.bad_step is None else config.bad_step)
        if config.bad_gradient:
            # √0 has no finite derivative.
            value += jnp.sqrt(jnp.where(is_bad, 0.0 * params["b"], 1.0)) - 1.0 * ~is_bad
        elif not config.explode:
            value = jnp.where(is_bad, jnp.nan, value)
        metrics = {"inner_energy": jnp.where(is_bad & config.explode, 1e9, 1.0)}
        return value, (metrics, state)

    def evaluate(variables, split, key):
        w = np.asarray(variables["params"]["w"])
        b = np.asarray(variables["params"]["b"])
        return {"loss": float(np.mean((data @ w + b - target) ** 2))}

    return Task(
        name="toy",
        init=init,
        sample=sample,
        loss=loss,
        evaluate=evaluate,
        optimizer=outer_optimizer(dataclasses.replace(config, learning_rate=0.1)),
        stage=(lambda step: 1.0 if step < 7 else 2.0) if config.stages else lambda step: None,
        host_data=config.host_data,
        data=(lambda: (data, target)) if config.data_argument else None,
    )


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """Most runs here are the same few programs: compiled once, also for subprocesses."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each worker a folder in the session's.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    settings = {
        "jax_compilation_cache_dir": str(base / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Runs end without pictures, except in tests that are named for them."""
    if "figures" not in request.node.name:
        draw_nothing(monkeypatch)


def draw_nothing(monkeypatch) -> None:
    from msdspn_jax.training import loop

    monkeypatch.setattr(loop._Trainer, "_draw_all", lambda self: None)


def register() -> None:
    """Make ``msdspn train toy`` work in this process."""
    from msdspn_jax import tasks

    sys.modules["msdspn_jax.tasks.toy"] = sys.modules[__name__]
    tasks.TASKS["toy"] = tasks.Entry("toy", "for tests")


if __name__ == "__main__":
    sys.modules["training_tasks"] = sys.modules["__main__"]
    register()
    draw_nothing(pytest.MonkeyPatch())
    from msdspn_jax.cli import main

    sys.exit(main(sys.argv[1:]))
