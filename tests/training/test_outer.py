import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_tasks
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax.trained.run import load_run
from msdspn_jax.training import loop
from msdspn_jax.training.config import Outer, TrainConfig
from msdspn_jax.training.outer import Averaged, averaged, muon, outer_optimizer

training_tasks.register()


def train(folder, **flags):
    config = configured(run_dir=str(folder), **flags)
    return loop.train(training_tasks.build(config), config)


def rates(outer, steps=10, rate=0.5):
    """The learning rate of every step, from steps of plain signs: Adam at constant gradients."""
    config = TrainConfig(learning_rate=rate, steps=steps, outer=outer)
    optimizer = outer_optimizer(config)
    params, gradient = jnp.zeros(1), jnp.ones(1)
    state, lengths = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        lengths.append(-float(updates[0]))
    return np.array(lengths)


def test_schedules():
    np.testing.assert_allclose(rates(Outer()), 0.5, rtol=1e-4)
    np.testing.assert_allclose(rates(Outer(schedule="constant", warmup_steps=4))[:5],
                               [0.125, 0.25, 0.375, 0.5, 0.5], rtol=1e-4)  # fmt: skip
    linear = rates(Outer(schedule="linear", decay_steps=4))
    np.testing.assert_allclose(linear, [0.5] * 7 + [0.375, 0.25, 0.125], rtol=1e-4)
    cosine = rates(Outer(schedule="cosine"))
    np.testing.assert_allclose(cosine[[0, 5]], [0.5, 0.25], rtol=1e-4)
    assert np.all(np.diff(cosine) < 0)


def test_muon_gives_kernels_steps_of_equal_singular_values():
    params = {"dense": jnp.zeros((6, 4)), "conv": jnp.zeros((3, 3, 2, 5)), "bias": jnp.zeros(4)}
    key = jax.random.key(0)
    gradient = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    optimizer = outer_optimizer(TrainConfig(outer=Outer(optimizer="muon"), learning_rate=1.0))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name in ("dense", "conv"):
        matrix = updates[name].reshape(-1, updates[name].shape[-1])
        values = jnp.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz leaves them within a factor of about 1.5 of each other.
        assert values.max() < 2 * values.min()
    # Adam: whatever the size of the gradient.
    lengths = jnp.abs(updates["bias"])
    chex.assert_trees_all_close(lengths, jnp.full(4, lengths[0]), rtol=1e-3)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (9, 8), (3, 3, 4, 6), (1, 1, 4, 30)], ids=str)
def test_muon_is_that_of_optax(shape):
    # Singular values over three decades, as those of gradients are.
    rows = np.prod(shape[:-1])
    values = 10.0 ** -jnp.linspace(0, 3, shape[-1])
    kernel = jax.random.normal(jax.random.key(0), (rows, shape[-1])) * values
    gradient = {"kernel": kernel.reshape(shape), "bias": jnp.array([1e-3, -2.0])}
    params = jax.tree.map(jnp.ones_like, gradient)
    dimensions = optax.contrib.MuonDimensionNumbers(tuple(range(len(shape) - 1)), len(shape) - 1)
    theirs = optax.contrib.muon(
        0.1,
        beta=0.9,
        weight_decay=0.3,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={"kernel": dimensions, "bias": None},
    )

    def two_updates(optimizer):
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return optimizer.update(jax.tree.map(jnp.sin, gradient), state, params)[0]

    updates = jax.jit(lambda: (two_updates(muon(0.1, 0.9, 0.3)), two_updates(theirs)))()
    chex.assert_trees_all_close(*updates, rtol=1e-3, atol=1e-4)


def test_clipping_limits_the_gradient_that_the_optimiser_sees():
    big = TrainConfig(outer=Outer(max_grad_norm=1.0, optimizer="adam"))
    optimizer = outer_optimizer(big)
    params = jnp.zeros(2)
    _, state = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(params), params)
    first_moment = state[1][0].mu
    np.testing.assert_allclose(first_moment, [0.06, 0.08], rtol=1e-4)


def test_the_average_is_that_of_the_parameters():
    optimizer = averaged(optax.sgd(1.0), 0.5)
    params = jnp.zeros(())
    state = optimizer.init(params)
    mean = 0.0
    for step in range(6):
        updates, state = optimizer.update(jnp.float32(-1.0), state, params)
        params = optax.apply_updates(params, updates)
        kept = min(0.5, (1 + step) / (10 + step))
        mean = kept * mean + (1 - kept) * float(params)
    np.testing.assert_allclose(state.params, mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"average": 1.0}, r"average: expected a number in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum: expected"),
        ({"warmup_steps": 5}, "warmup_steps: expected 0 with schedule published"),
        ({"weight_decay": -1.0}, "weight_decay: expected"),
        ({"decay_steps": 0}, "decay_steps: expected"),
    ],
)
@pytest.mark.usefixtures("without_hook")
def test_settings_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Outer(**flags)


def test_averaged_weights_have_statistics_that_fit(tmp_path):
    flags = {"batch_norm": True, "steps": 40, "outer": Outer(average=0.9)}
    outcome = train(tmp_path / "run", **flags)
    state = outcome.state
    assert isinstance(state.opt_state, Averaged)
    averaged_params = state.variables_to_keep["params"]
    assert not np.allclose(averaged_params["w"], state.params["w"])
    run = load_run(tmp_path / "run", checkpoint="latest")
    chex.assert_trees_all_equal(run.variables[0]["params"], averaged_params)
    # Refitted, not merely copied from the weights in training.
    kept, raw = (jax.tree.leaves(s) for s in (run.variables[0]["state"], state.model_state))
    assert any(not np.allclose(a, b) for a, b in zip(kept, raw, strict=True))


def test_a_resumed_run_has_the_same_average(tmp_path):
    flags = {"batch_norm": True, "outer": Outer(average=0.9), "checkpoint_every": 7}
    whole = train(tmp_path / "whole", steps=20, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in ("14", "20"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    again = train(tmp_path / "cut", steps=20, resume=True, **flags)
    chex.assert_trees_all_equal(again.state, whole.state)
