"""Building a task touches no data; the evaluation loop of all tasks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax import tasks
from msdspn_jax.clevr import cache, procedural, tfds
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.autoencoding import digits
from msdspn_jax.tasks.clevr import data as clevr_data
from msdspn_jax.tasks.evaluation import means, over_split
from msdspn_jax.tasks.sets import data as sets_data
from msdspn_jax.tasks.sets.format import Format

SMALL = {"size": 64, "encoder_width": 2, "latent_dim": 4, "hidden_dim": 4}
FORM = Format(
    kind="vectors", input_shape=(2,), set_size=3, names=("a",), shift=(0.0,), scale=(1.0,),
    input_shift=(0.0, 0.0), input_scale=(1.0, 1.0),
)  # fmt: skip
SOURCES = {
    "random sets": ("random-sets", {}),
    "random sets, fresh": ("random-sets", {"fresh": True}),
    "digits": ("digits", {}),
    "numbering": ("numbering", {}),
    "numbering, fresh": ("numbering", {"fresh": True}),
    "sets": ("sets", {"data": "/no/such/file.npz", "form": FORM}),
    "clevr, procedural": ("clevr", SMALL),
    "clevr, fresh": ("clevr", SMALL | {"fresh": True}),
    "clevr, on the host": ("clevr", SMALL | {"images_on": "host"}),
    "clevr, folder": ("clevr", SMALL | {"data": "folder", "data_dir": "/no/such/folder"}),
    "clevr, tfds": ("clevr", SMALL | {"data": "tfds", "data_dir": "/no/such/folder"}),
}


@pytest.fixture
def touched(monkeypatch):
    """Names of the loaders that were called; each raises."""
    called: list[str] = []
    for task in tasks.TASKS:  # what is imported later would keep the poison
        tasks.load(task)

    def poison(module, name):
        def refuse(*args, **kwargs):
            called.append(name)
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(module, name, refuse)

    for module, names in {
        clevr_data: ("load_split", "load_cache", "prepare_cache", "open_source"),
        digits: ("load_point_sets",),
        sets_data: ("read", "_arrays"),
        cache: ("load_cache", "prepare_cache"),
        tfds: ("open_source",),
        procedural: ("render",),
    }.items():
        for name in names:
            poison(module, name)
    for name in ("ProceduralScenes", "rendered_set", "procedural_examples"):
        poison(clevr_data, name)
    return called


@pytest.mark.parametrize(("task", "flags"), SOURCES.values(), ids=SOURCES.keys())
def test_building_touches_no_data(task, flags, touched):
    module = tasks.load(task)
    built = module.build(module.Config(**flags))
    assert built.name == task
    assert touched == []
    if task in ("digits", "clevr", "sets"):
        # Asked for, the data is looked for where the poison is.
        with pytest.raises(AssertionError):
            built.evaluate({}, "val", jnp.zeros(2))
        assert touched


def test_unknown_tasks_are_refused():
    with pytest.raises(UserError, match=r"task: expected one of random-sets, .*, got 'magic'"):
        tasks.load("magic")


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_split_is_scored_once_each_in_batches_of_one_size(batch_size):
    seen = []

    def scores_of(index):
        seen.append(len(index))
        return {"loss": jnp.asarray(index) ** 2.0}, index[:, None]

    scores, sets = over_split(scores_of, 7, batch_size=batch_size)
    np.testing.assert_array_equal(scores["loss"], np.arange(7) ** 2)
    np.testing.assert_array_equal(sets[:, 0], np.arange(7))
    assert set(seen) == {min(batch_size, 7)}
    assert means(scores) == {"loss": 13.0}
