"""The loop, its checkpoints and its guard rails, in this process; faults from outside and many
devices are in test_faults.py and test_parallel.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_tasks
from PIL import Image
from training_tasks import compiled_once, configured, no_figures  # noqa: F401

from msdspn_jax.errors import UserError
from msdspn_jax.trained import run
from msdspn_jax.training import logging, loop, run_folder, state
from msdspn_jax.training.checkpoints import Checkpoints, checksum, is_disk_full
from msdspn_jax.training.config import TrainConfig, from_dict
from msdspn_jax.training.task import epoch_positions

training_tasks.register()


def train(folder: Path, **flags) -> loop.Outcome:
    config = configured(run_dir=str(folder), **flags)
    return loop.train(training_tasks.build(config), config)


def history(folder: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    lines = run_folder.read_metrics(folder)
    return [{k: v for k, v in x.items() if not k.startswith("steps_per_second")} for x in lines]


def assert_same_run(a: loop.Outcome, b: loop.Outcome) -> None:
    chex.assert_trees_all_equal(a.state, b.state)
    assert history(a.folder) == history(b.folder)


# --- data ---


@pytest.mark.parametrize("size", [1, 7, 64, 50])
def test_every_epoch_is_a_permutation(size):
    batch = 6
    steps = -(-3 * size // batch)
    key = jax.random.key(3)
    order = np.concatenate(
        [
            epoch_positions(key, t, jnp.arange(batch), batch_size=batch, size=size)
            for t in range(steps)
        ]
    )
    epochs = [order[e * size : (e + 1) * size].tolist() for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size >= 50:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("passed", [2**31, 2**32, 2**40])
def test_long_runs_go_on_in_permutations(passed):
    """The epoch in which the number of examples passes what 32 bits hold."""
    size, batch, key = 50, 1024, jax.random.key(3)
    first = passed // size * size
    step, skipped = divmod(first, batch)
    two = [
        epoch_positions(key, t, jnp.arange(batch), batch_size=batch, size=size)
        for t in (step, step + 1)
    ]
    epoch = np.concatenate(two)[skipped : skipped + size]
    assert sorted(epoch.tolist()) == list(range(size))


def test_a_batch_too_large_for_the_data_is_refused():
    with pytest.raises(UserError, match="batch_size: expected at most 4294967 for a data set of"):
        epoch_positions(jax.random.key(0), 0, jnp.arange(1), batch_size=2**23, size=1000)


def test_any_part_of_a_batch_is_the_same_on_its_own():
    key = jax.random.key(0)
    whole = epoch_positions(key, 4, jnp.arange(8), batch_size=8, size=50)
    part = epoch_positions(key, 4, jnp.arange(4, 8), batch_size=8, size=50)
    assert whole[4:].tolist() == part.tolist()


# --- the loop ---


def test_training_writes_a_complete_run_folder_with_figures(tmp_path):
    outcome = train(tmp_path / "run", tensorboard=True)
    assert outcome.signal is None
    assert int(outcome.state.step) == 20
    lines = run_folder.read_metrics(tmp_path / "run")
    assert [(x["step"], x["split"]) for x in lines] == [
        (5, "train"), (10, "train"), (10, "val"), (15, "train"), (20, "train"), (20, "val"),
    ]  # fmt: skip
    assert lines[-1]["loss"] < lines[2]["loss"]
    assert (tmp_path / "run" / "figures" / "curves.png").stat().st_size > 1000
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    record = run_folder.read_record(tmp_path / "run")
    assert record["task"] == "toy"
    assert record["versions"]["jax"] == jax.__version__
    assert record["config"]["noise"] == 0.1


def test_tensorboard_gets_scalars_and_figures_while_training(tmp_path, monkeypatch):
    real = training_tasks.build

    def figures(variables, folder):
        # One colour a step of training: pictures of the same name must not be one another's.
        Image.new("RGB", (8, 8), (len(drawn), 0, 0)).save(folder / "predictions.png")
        drawn.append(variables["params"]["w"].tolist())

    monkeypatch.setattr(
        training_tasks, "build", lambda c: dataclasses.replace(real(c), figures=figures)
    )
    drawn: list[list[float]] = []
    folder = train(tmp_path / "run", tensorboard=True, figures_every=5).folder
    assert len(drawn) == 4
    assert len({tuple(w) for w in drawn}) == 4
    (events,) = folder.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert content.count(b"train/loss") == 4
    assert content.count(b"val/loss") == 2
    assert content.count(b"predictions") == content.count(b"\x89PNG") == 4


def test_the_step_that_compiles_counts_for_no_rate(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        logging.Progress, "update", lambda self, step, values: rates.append(self.rate(step))
    )
    train(tmp_path / "run", steps=3)
    assert rates[0] == 0 < rates[-1]


def test_progress_line_says_how_it_goes(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock[0])
    progress = logging.Progress(configured(steps=1000, progress=True), first_step=0)
    values = {"loss": 0.25, "accuracy": 0.5, "inner_gradient_norm": 0.125, "other": 1.0}
    progress.update(1, values)
    assert capsys.readouterr().err == "compiling the first step …\n"
    clock[0] = 20.0
    progress.update(100, values)
    assert capsys.readouterr().err == (
        "step 100/1000  loss 0.25  accuracy 0.5  inner gradient 0.125  5 steps/s  0:03:00 left\n"
    )


def test_training_line_is_the_mean_over_its_steps(tmp_path):
    every = train(tmp_path / "a", log_every=1)
    fifth = train(tmp_path / "b", log_every=5)
    single = [x["loss"] for x in history(every.folder) if x["split"] == "train"]
    means = [x["loss"] for x in history(fifth.folder) if x["split"] == "train"]
    np.testing.assert_allclose(means, np.reshape(single, (4, 5)).mean(1), rtol=1e-12)


ALL = {"batch_norm": True, "stages": True, "replicates": 2}


@pytest.mark.parametrize("extra", [{"stages": True}, {"host_data": True}])
def test_length_of_a_dispatch_never_changes_the_numbers(tmp_path, extra):
    one = train(tmp_path / "one", steps_per_dispatch=1, **extra)
    many = train(tmp_path / "many", steps_per_dispatch=50, checkpoint_every=100, **extra)
    assert_same_run(one, many)


def test_data_from_the_host_gives_the_numbers_of_data_on_device(tmp_path):
    a = train(tmp_path / "host", host_data=True)
    b = train(tmp_path / "device")
    chex.assert_trees_all_close(a.state, b.state, rtol=1e-6)


def test_data_as_an_argument_gives_the_numbers_of_data_as_a_constant(tmp_path):
    a = train(tmp_path / "argument", data_argument=True)
    b = train(tmp_path / "constant")
    chex.assert_trees_all_close(a.state, b.state, rtol=1e-6)


@pytest.mark.parametrize("extra", [{}, {"host_data": True}])
def test_one_step_a_dispatch_gives_the_numbers_of_many(tmp_path, extra):
    a = train(tmp_path / "single", steps_per_dispatch=1, bad_step=13, skip_bad_steps=1, **extra)
    b = train(tmp_path / "loop", bad_step=13, skip_bad_steps=1, **extra)
    assert int(a.state.skipped) == 1
    chex.assert_trees_all_close(a.state, b.state, rtol=1e-6)
    lines = [[x["loss"] for x in history(r.folder)] for r in (a, b)]
    np.testing.assert_allclose(*lines, rtol=1e-6)


def test_stages_change_the_loss_where_they_should(tmp_path):
    plain = train(tmp_path / "a", log_every=1, steps=8, learning_rate=1e-3)
    staged = train(tmp_path / "b", log_every=1, steps=8, learning_rate=1e-3, stages=True)
    a, b = (
        np.array([x["loss"] for x in history(r.folder) if x["split"] == "train"])
        for r in (plain, staged)
    )
    np.testing.assert_allclose(b / a, [1.0] * 7 + [2.0], rtol=1e-5)


def test_replicates_are_the_runs_of_their_seeds(tmp_path):
    together = train(tmp_path / "all", replicates=3, batch_norm=True, seed=5)
    alone = [train(tmp_path / str(s), seed=s, batch_norm=True) for s in (5, 6, 7)]
    for r, outcome in enumerate(alone):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, r=r: x[r], together.state.params),
            outcome.state.params,
            rtol=1e-5,
        )
    losses = [outcome.metrics["loss"] for outcome in alone]
    assert np.isclose(together.metrics["loss"], np.mean(losses), rtol=1e-4)
    assert np.isclose(together.metrics["loss_std"], np.std(losses, ddof=1), rtol=1e-3)
    assert len({round(x, 6) for x in losses}) == 3


def test_noise_is_another_for_every_step_and_example():
    config = configured(noise=1.0)
    task = training_tasks.build(config)
    start = state.init_state(task.init, task.optimizer, jax.random.key(0))
    # The same example eight times over: losses differ by the noise alone.
    batch = (jnp.ones((8, 4)), jnp.zeros(8), jnp.zeros(8))

    @jax.jit
    def loss(step, slots):
        _, metrics, _ = state.train_step(
            task, start._replace(step=step), batch, jax.random.key(1), slots,
            stage=None, axis_name=None, max_inner_energy=1e6,
        )  # fmt: skip
        return metrics["loss"]

    slots = jnp.arange(8)
    first = float(loss(jnp.int32(0), slots))
    assert first == float(loss(jnp.int32(0), slots))
    assert first != float(loss(jnp.int32(1), slots))
    assert first != float(loss(jnp.int32(0), slots + 8))


# --- resuming ---


@pytest.mark.parametrize("extra", [{}, ALL])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, extra):
    whole = train(tmp_path / "whole", **extra)
    # Not a multiple of log_every: the sums behind a half-finished line must survive as well.
    part = tmp_path / "part"
    interrupted = dict(extra, checkpoint_every=4, evaluate_every=10)
    with pytest.raises(_Stop):
        _stop_after(part, 13, **interrupted)
    resumed = train(part, resume=True, **interrupted)
    assert_same_run(whole, resumed)


class _Stop(Exception):
    pass


def _stop_after(folder: Path, step: int, **flags) -> None:
    """Train, and die between two steps."""
    config = configured(run_dir=str(folder), steps_per_dispatch=1, **flags)
    trainer = loop._Trainer(training_tasks.build(config), config, folder)
    account = trainer._account

    def dying(chunk):
        account(chunk)
        if trainer.step > step:
            raise _Stop

    trainer._account = dying  # type: ignore[method-assign]
    try:
        trainer.run()
    finally:
        trainer.checkpoints.wait()


def test_resume_with_nothing_there_starts_anew(tmp_path):
    fresh = train(tmp_path / "a")
    resumed = train(tmp_path / "b", resume="auto")
    assert_same_run(fresh, resumed)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    before = train(tmp_path / "run")
    after = train(tmp_path / "run", resume=True)
    assert_same_run(before, after)


def test_second_run_in_a_folder_is_refused(tmp_path):
    train(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="holds a run already; go on with it by --resume"):
        train(tmp_path / "run", steps=1)


def test_changed_config_is_refused_with_the_difference(tmp_path):
    train(tmp_path / "run", steps=5)
    with pytest.raises(UserError) as refused:
        train(tmp_path / "run", resume=True, steps=10, noise=0.5, log_every=7)
    assert "--noise: the run has 0.1, asked for 0.5" in str(refused.value)
    assert "--steps: the run has 5, asked for 10" in str(refused.value)
    assert "--log-every" not in str(refused.value)
    outcome = train(tmp_path / "run", resume=True, steps=10, noise=0.5, allow_config_change=True)
    assert int(outcome.state.step) == 10
    assert run_folder.read_record(tmp_path / "run")["config"]["noise"] == 0.5


def test_latest_and_best_checkpoints_are_kept(tmp_path):
    like = {"x": np.zeros(3)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in ((10, 5.0), (20, 1.0), (30, 2.0), (40, 3.0), (50, 4.0)):
        checkpoints.save({"x": np.full(3, float(step))}, step, {}, {"loss": loss})
    checkpoints.save({"x": np.full(3, 60.0)}, 60, {}, None)
    checkpoints.wait()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.steps() == [20, 50, 60]
    assert again.best_step() == 20
    assert again.read(20, like).state["x"].tolist() == [20, 20, 20]
    restored = again.read_latest(like)
    assert restored is not None
    assert restored.step == 60
    # What was best is remembered by the new process, too.
    again.save({"x": np.full(3, 70.0)}, 70, {}, {"loss": 9.0})
    again.wait()
    assert again.steps() == [20, 60, 70]


def test_load_run_gives_the_best_checkpoint(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0])
    real = training_tasks.build

    def build(config):
        return dataclasses.replace(real(config), evaluate=lambda *_: {"loss": next(losses)})

    monkeypatch.setattr(training_tasks, "build", build)
    train(tmp_path / "run", evaluate_every=5, checkpoint_every=100, replicates=1)
    loaded = run.load_run(tmp_path / "run")
    assert loaded.step == 10
    assert run.load_run(tmp_path / "run", checkpoint="latest").step == 20
    assert loaded.variables[0]["params"]["w"].shape == (4,)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        run.load_run(tmp_path / "run", checkpoint=7)


# --- damage ---


def _damage(path: Path, how: str) -> None:
    files = [p for p in path.rglob("*") if p.is_file()]
    data = [p for p in files if p.parent.name == "d"]
    if how == "truncated":
        for file in data:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "emptied":
        for file in files:
            file.write_bytes(b"")
    elif how == "missing":
        shutil.rmtree(path / "state")
    elif how == "flipped":
        for file in data:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "emptied", "missing", "flipped"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, how, capfd):
    whole = train(tmp_path / "whole")
    part = train(tmp_path / "part")
    _damage(part.folder / "checkpoints" / "20", how)
    resumed = train(part.folder, resume=True, progress=True)
    assert_same_run(whole, resumed)
    said = capfd.readouterr().err
    assert str(part.folder / "checkpoints" / "20") in said
    assert "resuming at step 15" in said
    assert (part.folder / "damaged_checkpoints" / "20").is_dir()


def test_all_checkpoints_damaged_is_an_error_that_names_them(tmp_path):
    outcome = train(tmp_path / "run")
    for path in (outcome.folder / "checkpoints").iterdir():
        _damage(path, "emptied")
    before = run_folder.read_metrics(outcome.folder)
    with pytest.raises(UserError, match=r"no checkpoint can be read:\n(.*\n)*.*checkpoints/20: "):
        train(outcome.folder, resume=True)
    # Nor is the next attempt a new beginning over what there was.
    for resume in (True, "auto"):
        with pytest.raises(UserError, match="no checkpoint is left but damaged ones, in "):
            train(outcome.folder, resume=resume)
    assert run_folder.read_metrics(outcome.folder) == before


def test_checksum_sees_values_shapes_and_types():
    trees = [{"x": np.zeros(4)}, {"x": np.zeros((2, 2))}, {"x": np.zeros(8, np.float32)}]
    trees.append({"x": np.array([0.0, 0, 0, -0.0])})
    assert len({checksum(tree) for tree in trees}) == 4
    assert checksum(trees[0]) == checksum({"x": np.zeros(4)})


# --- guard rails ---


def test_a_run_without_its_last_checkpoint_is_not_finished(tmp_path):
    outcome = train(tmp_path / "run")
    assert run_folder.is_finished(outcome.folder)
    shutil.rmtree(outcome.folder / "checkpoints" / "20")
    assert not run_folder.is_finished(outcome.folder)
    shutil.rmtree(outcome.folder / "checkpoints")  # A record, kept without them.
    assert run_folder.is_finished(outcome.folder)


def test_validation_curve_leaves_out_what_is_not_finite(tmp_path):
    outcome = train(tmp_path / "run")
    file = outcome.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if (line["split"], line["step"]) == ("val", 10):
            line["loss"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [step for step, *_ in run_folder.validation_curve(outcome.folder, "loss")] == [20]


def test_validation_curve_has_every_evaluation(tmp_path):
    """Those between two lines of training too, with the hours in proportion."""
    lines = [{"split": "val", "step": step, "loss": 1.0} for step in (50, 100, 150, 200)]
    speeds = ((100, None), (200, 100 / 3600))  # While the first was made, the program was compiled.
    lines += [{"split": "train", "step": n, "steps_per_second": x} for n, x in speeds]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = run_folder.validation_curve(tmp_path, "loss")
    np.testing.assert_allclose(
        curve, [(50, 0, 1), (100, 0, 1), (150, 0.5, 1), (200, 1, 1)], atol=1e-9
    )


def test_pauses_are_no_hours_of_training(tmp_path):
    speeds = (1.0, 1.1, 0.001, 0.9, 0.5)
    lines = [
        {"split": "train", "step": 3600 * (i + 1), "steps_per_second": speed}
        for i, speed in enumerate(speeds)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_folder.training_hours(tmp_path) == pytest.approx(1 + 1 / 1.1 + 2 / 0.9 + 2)


def test_a_pace_that_changes_for_good_is_no_pause(tmp_path):
    lines = [
        {"split": "train", "step": 36 * (i + 1), "steps_per_second": 1.0 if i < 60 else 0.2}
        for i in range(100)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_folder.training_hours(tmp_path) == pytest.approx(0.6 + 2.0, rel=0.2)


def test_scores_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    run_folder.write_evaluation(tmp_path, 3, "best", {"test": {"loss": float("nan"), "ap": 0.5}})
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    found = run_folder.read_evaluation(tmp_path)
    assert found is not None
    np.testing.assert_equal(found["metrics"]["test"], {"loss": np.nan, "ap": 0.5})
    run_folder.write_decoding(tmp_path, 3, {"num_steps": 4}, {"val": {"loss": [1.0, float("nan")]}})
    (decoding,) = run_folder.read_decodings(tmp_path)
    np.testing.assert_equal(decoding["metrics"], {"val": {"loss": [1.0, np.nan]}})


def test_seeds_without_a_good_step_do_not_hide_the_others():
    window = logging.Window(2)
    window.add({"loss": np.array([[1.0, 5.0], [3.0, 5.0]])}, np.array([[0, 1], [0, 1]]))
    assert window.summary() == {"loss": 2.0}


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "abc"}, "seed: expected an integer"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"seed": 2**32 - 1, "replicates": 2}, "seed: expected less than"),
        ({"batch_norm": "no"}, "batch_norm: expected one of True, False, got 'no'"),
        ({"outer": {"optimizer": "sgd"}}, "optimizer: expected one of 'adam', 'muon', got 'sgd'"),
        ({"outer": {"decay_steps": 5}}, "decay_steps: expected none with schedule published"),
        ({"devices": {"parallel": "all"}}, "parallel: expected one of 'none'"),
        ({"run": {"resume": "maybe"}}, "resume: expected one of 'auto', True, False"),
    ],
)
def test_words_that_no_field_takes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(training_tasks.Config, changes)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({}, "the loss is not finite"),
        ({"bad_gradient": True}, "the gradient is not finite"),
        ({"explode": True}, "the inner minimisation diverges: energy 1e\\+09"),
    ],
)
def test_bad_step_stops_with_step_and_last_good_checkpoint(tmp_path, fault, words):
    with pytest.raises(UserError, match=f"step 13: {words}") as stopped:
        train(tmp_path / "run", bad_step=13, **fault)
    assert "The last good checkpoint is that of step 10" in str(stopped.value)
    assert str(tmp_path / "run" / "checkpoints" / "10") in str(stopped.value)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [5, 10]


def test_bad_step_before_any_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step 2: .* No checkpoint was saved before\."):
        train(tmp_path / "run", bad_step=2)


def test_bad_step_is_left_out_and_counted_if_asked(tmp_path):
    with_bad = train(tmp_path / "bad", bad_step=13, skip_bad_steps=1, log_every=1)
    assert int(with_bad.state.step) == 20
    assert int(with_bad.state.skipped) == 1
    chex.assert_tree_all_finite(with_bad.state.params)
    steps = [x["step"] for x in history(with_bad.folder) if x["split"] == "train"]
    assert 14 not in steps
    assert 15 in steps


def test_going_on_with_fewer_skips_allowed_keeps_the_step(tmp_path):
    outer = {"outer": dataclasses.replace(training_tasks.Config().outer, average=0.9)}
    flags = {"bad_step": 3, "batch_norm": True} | outer
    whole = train(tmp_path / "a", skip_bad_steps=1, **flags)
    train(tmp_path / "b", steps=10, skip_bad_steps=1, **flags)
    end = train(tmp_path / "b", resume=True, allow_config_change=True, skip_bad_steps=0, **flags)
    assert int(end.state.step) == 20
    chex.assert_trees_all_equal(end.state, whole.state)


def test_a_batch_left_out_is_left_out_of_averaged_statistics(tmp_path):
    outer = dataclasses.replace(training_tasks.Config().outer, average=0.9)
    flags = {"outer": outer, "batch_norm": True, "bad_step": 13}
    outcome = train(tmp_path / "run", skip_bad_steps=1, **flags)
    average = outcome.state.opt_state
    assert average.model_state["count"] == outcome.state.model_state["count"] + 19
    chex.assert_tree_all_finite(average.model_state)


def test_skipped_step_leaves_parameters_untouched(tmp_path):
    upto = train(tmp_path / "a", steps=13)
    past = train(tmp_path / "b", steps=14, bad_step=13, skip_bad_steps=1, batch_norm=False)
    chex.assert_trees_all_equal(upto.state.params, past.state.params)
    chex.assert_trees_all_equal(upto.state.opt_state, past.state.opt_state)


def test_one_bad_replicate_leaves_the_others_alone(tmp_path):
    with pytest.raises(UserError, match=r"step 13: .* in replicate 0"):
        train(tmp_path / "run", replicates=2, bad_step=13)


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run folder .* Choose another"):
        train(tmp_path / "file" / "run")


def test_batch_that_cannot_be_shared():
    config = configured(batch_size=9, parallel="shard-map")
    task = training_tasks.build(config)
    with pytest.raises(UserError, match=r"--batch-size: expected a multiple of 2, .*, got 9"):
        loop.StepRunner(task, config, devices=jax.devices()[:1] * 2)


@pytest.mark.parametrize("field", ["batch_size", "replicates", "log_every", "learning_rate"])
def test_config_refuses_nonsense(field):
    with pytest.raises(ValueError, match=rf"{field}: expected .*, got 0"):
        configured(TrainConfig, **{field: 0})


def test_torn_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "val", "loss": 2.0}\n{"step": 2, "spl')
    assert [x["step"] for x in run_folder.read_metrics(tmp_path)] == [1]
    run_folder.truncate_metrics(tmp_path, 1)
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1]


# --- what a task may get wrong ---


def test_a_metric_called_as_a_field_of_the_log_is_refused(tmp_path):
    config = configured(run_dir=str(tmp_path / "run"))
    task = training_tasks.build(config)

    def evaluate(*arguments):
        return task.evaluate(*arguments) | {"step": 7.0}

    with pytest.raises(UserError, match="evaluate: expected no metric called 'step'"):
        loop.train(dataclasses.replace(task, evaluate=evaluate), config)


def test_a_metric_to_watch_that_there_is_not_is_refused(tmp_path):
    config = configured(run_dir=str(tmp_path / "run"))
    task = dataclasses.replace(training_tasks.build(config), monitor=("acuracy", "max"))
    with pytest.raises(UserError, match=r"monitor: expected a metric .*, loss, got acuracy"):
        loop.train(task, config)


def test_figures_that_cannot_be_drawn_cost_no_training(tmp_path, capsys):
    config = configured(run_dir=str(tmp_path / "run"), steps=4, figures_every=2, progress=True)

    def figures(variables, folder):
        raise ValueError("nothing to draw")

    task = dataclasses.replace(training_tasks.build(config), figures=figures)
    assert int(loop.train(task, config).state.step) == 4
    shown = capsys.readouterr().err
    for step in (2, 4):
        assert f"no figures at step {step}: ValueError: nothing to draw" in shown


def test_data_that_is_gone_at_validation_is_no_full_disk(tmp_path):
    config = configured(run_dir=str(tmp_path / "run"))

    def evaluate(variables, split, key):
        raise FileNotFoundError(2, "No such file or directory", "/data/val.npz")

    task = dataclasses.replace(training_tasks.build(config), evaluate=evaluate)
    with pytest.raises(UserError, match=r"validation failed: .*/data/val\.npz"):
        loop.train(task, config)


def test_the_disk_and_the_memory_are_told_apart():
    assert is_disk_full(RuntimeError("RESOURCE_EXHAUSTED: write failed"))
    assert is_disk_full(OSError(28, "No space left on device"))
    assert not is_disk_full(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))


def test_no_steps_still_evaluate_and_save(tmp_path):
    outcome = train(tmp_path / "run", steps=0)
    assert outcome.metrics.keys() == {"loss"}
    assert run.load_run(tmp_path / "run").step == 0


def test_damaged_decodings_are_not_written_over(tmp_path):
    run_folder.write_decoding(tmp_path, 5, {"num_steps": 9}, {"val": {"loss": [0.5]}})
    path = tmp_path / "decodings.json"
    path.write_text(path.read_text()[:-3])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"decodings.json is damaged"):
        run_folder.write_decoding(tmp_path, 5, {"num_steps": 3}, {"val": {"loss": [0.5]}})
    assert path.read_bytes() == before


def test_counts_have_a_mean_over_devices_too():
    found = jax.vmap(
        lambda x: state._mean_over("devices", state._as_floats({"count": x})), axis_name="devices"
    )(jnp.array([1, 4]))
    assert found["count"].tolist() == [2.5, 2.5]
