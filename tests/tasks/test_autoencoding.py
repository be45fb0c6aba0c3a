"""The data of the first two experiments, and that their models learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.adjoints import identity, neumann, unrolled
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.autoencoding import digits, random_sets
from msdspn_jax.training.config import Devices
from msdspn_jax.training.parallel import StepRunner


def test_random_sets_are_standard_normal_and_each_its_own():
    sets = random_sets.indexed_sets(jax.random.key(0), jnp.arange(500), n=4, d=3)
    assert sets.shape == (500, 4, 3)
    assert abs(float(sets.mean())) < 0.05
    assert abs(float(sets.std()) - 1) < 0.05
    assert len(np.unique(np.asarray(sets))) > 5900
    again = random_sets.indexed_sets(jax.random.key(0), jnp.array([7]), n=4, d=3)
    np.testing.assert_array_equal(again[0], sets[7])
    with pytest.raises(ValueError, match="n, d: expected integers >= 1, got 0 and 3"):
        random_sets.draw_sets(jax.random.split(jax.random.key(0), 2), n=0, d=3)


@pytest.mark.parametrize(("min_intensity", "n"), list(enumerate(digits.SET_SIZES, 1)))
def test_digits_as_points_hold_the_pixels(min_intensity, n):
    from sklearn.datasets import load_digits

    points = digits.load_point_sets(min_intensity=min_intensity)
    assert points.sets.shape == (1797, n, 4)
    assert points.sets[..., 3].sum(1).max() == n
    # Back to pixels: nothing lost, nothing added.
    images = np.zeros((1797, 8, 8))
    which, element = np.nonzero(points.sets[..., 3])
    x, y, intensity, _ = points.sets[which, element].T
    images[which, np.rint(2 * y + 3.5).astype(int), np.rint(2 * x + 3.5).astype(int)] = intensity
    original = load_digits().images
    np.testing.assert_allclose(images * 16, np.where(original >= min_intensity, original, 0))
    assert not points.sets[points.sets[..., 3] == 0].any()
    with pytest.raises(ValueError, match="min_intensity: expected an integer in 1 … 16, got 17"):
        digits.load_point_sets(min_intensity=17)


def test_digit_splits_are_disjoint_complete_and_fixed_by_the_seed():
    splits = digits.split_indices(0)
    assert {k: len(v) for k, v in splits.items()} == digits.SPLITS
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    np.testing.assert_array_equal(splits["val"], digits.split_indices(0)["val"])
    assert (splits["val"] != digits.split_indices(1)["val"]).any()


def small(**flags):
    sizes = {"set_size": 2, "set_dim": 2, "hidden_dim": 8, "latent_dim": 8}
    sizes |= {"inner": Inner(num_steps=2), "batch_size": 8, "val_size": 13, "test_size": 13}
    return random_sets.Config(**(sizes | flags))


@pytest.mark.parametrize("fresh", [True, False])
def test_training_sets_recur_only_without_fresh(fresh):
    task = random_sets.build(small(fresh=fresh, train_size=16))
    key = jax.random.key(0)
    batches = [np.asarray(task.sample(key, t, jnp.arange(8))) for t in range(4)]
    first, second = (np.concatenate(batches[i : i + 2]) for i in (0, 2))
    same = {s.tobytes() for s in first} == {s.tobytes() for s in second}
    assert same is not fresh
    assert len({s.tobytes() for s in first}) == 16


def test_validation_is_the_mean_over_exactly_its_sets():
    """13 sets in batches of 8: the filling of the last batch must not count."""
    variables = random_sets.build(small()).init(jax.random.key(0))
    key = jax.random.key(5)
    task = random_sets.build(small())
    found = task.evaluate(variables, "val", key)
    whole = random_sets.build(small(batch_size=13)).evaluate(variables, "val", key)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert found["loss"] > 0
    with pytest.raises(ValueError, match="split: expected one of 'val', 'test', got 'train'"):
        task.evaluate(variables, "train", key)


def test_defaults_are_the_published_settings():
    config = random_sets.Config()
    assert (config.hidden_dim, config.latent_dim, config.batch_size) == (512, 512, 128)
    assert (config.resolved_learning_rate(), config.steps) == (1e-3, 20_000)
    assert config.train_size == 64_000
    inner = config.resolved_inner()
    assert (inner.num_steps, inner.step_size, inner.momentum) == (20, 1.0, 0.9)
    assert (inner.adjoint, inner.pool, inner.proximity) == (identity(), "fspool", 0.1)
    dspn = random_sets.Config(model="dspn").resolved_inner()
    assert (dspn.momentum, dspn.adjoint) == (0.0, unrolled())
    given = random_sets.Config(inner=Inner(adjoint="neumann:3"))
    assert given.resolved_inner().adjoint == neumann(3)
    assert digits.Config().resolved_inner().step_size == 3.0


def test_model_and_adjoint_must_agree():
    with pytest.raises(ValueError, match="adjoint: expected unrolled for model dspn, got identity"):
        random_sets.Config(model="dspn", inner=Inner(adjoint=identity()))


def test_loss_falls():
    config = small(
        learning_rate=1e-2, hidden_dim=16, latent_dim=16, devices=Devices(steps_per_dispatch=40)
    )
    runner = StepRunner(random_sets.build(config), config)
    chunk = runner.run(runner.place(runner.init()), 0, 40)
    loss = chunk.metrics["loss"][:, 0]
    assert chunk.done == 40
    assert not chunk.status.any()
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["chamfer", "hungarian"])
def test_digits_are_learnt(loss):
    config = digits.Config(
        loss=loss, hidden_dim=32, latent_dim=32, inner=Inner(num_steps=4), min_intensity=14,
        learning_rate=3e-3, devices=Devices(steps_per_dispatch=60),
    )  # fmt: skip
    runner = StepRunner(digits.build(config), config)
    chunk = runner.run(runner.place(runner.init()), 0, 60)
    values = chunk.metrics["loss"][:, 0]
    assert values[-5:].mean() < 0.7 * values[:5].mean()


@pytest.mark.slow
def test_authors_loss_is_reached():
    """n = d = 4, 10 inner steps, 1,000 steps: the authors' code reaches 0.00243 (one seed)."""
    config = random_sets.Config(
        set_size=4, set_dim=4, inner=Inner(num_steps=10), steps=1000, fresh=True, val_size=1280
    )
    task = random_sets.build(config)
    runner = StepRunner(task, config)
    state, step = runner.place(runner.init()), 0
    while step < 1000:
        chunk = runner.run(state, step, 50)
        state, step = chunk.state, step + 50
    found = task.evaluate(runner.fetch(state).variables, "val", runner.keys[0].evaluation)
    assert found["loss"] < 0.0035
