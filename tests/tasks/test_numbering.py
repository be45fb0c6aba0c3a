"""Class-specific numbering: data, loss, accuracy, models, task and report."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdspn_jax.adjoints import identity
from msdspn_jax.errors import UserError
from msdspn_jax.losses import numbering_assignment, numbering_loss
from msdspn_jax.matching.assignment import INVALID
from msdspn_jax.metrics import numbering_accuracy
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.numbering.config import MODELS, Config
from msdspn_jax.tasks.numbering.data import (
    draw_batch,
    draw_classes,
    fold_in_each,
    number_within_classes,
)
from msdspn_jax.tasks.numbering.equivariance import (
    PUBLISHED_EQUIVARIANCE,
    PUBLISHED_READING,
    model_equivariance,
)
from msdspn_jax.tasks.numbering.model import build_model
from msdspn_jax.tasks.numbering.task import build
from msdspn_jax.trained import run as trained_runs
from msdspn_jax.training.config import Devices, Outer, Run
from msdspn_jax.training.run_folder import write_decoding

KEY = jax.random.key(0)


def small(model="deep-sets", **changes):
    defaults = {
        "set_size": 5,
        "num_classes": 3,
        "hidden_dim": 8,
        "latent_dim": 8,
        "width": 8,
        "inner": Inner(num_steps=3),
        "batch_size": 4,
        "train_size": 10,
        "val_size": 11,
        "test_size": 6,
    }
    return Config(model=model, **(defaults | changes))


# --- data ---


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_numbers_count_earlier_elements_of_the_class(classes):
    expected = [classes[:i].count(c) for i, c in enumerate(classes)]
    assert number_within_classes(jnp.array(classes)).tolist() == expected


def test_example_of_the_paper():
    assert number_within_classes(jnp.array([0, 1, 1, 0])).tolist() == [0, 0, 1, 1]


def test_batch_is_a_function_of_its_keys():
    keys = fold_in_each(KEY, jnp.arange(6))
    batch = draw_batch(keys, n=7, num_classes=4)
    chex.assert_shape(batch.inputs, (6, 7, 4))
    chex.assert_shape(batch.targets, (6, 7, 7))
    chex.assert_trees_all_equal(
        batch.targets.argmax(-1), number_within_classes(batch.inputs.argmax(-1))
    )
    half = draw_batch(keys[3:], n=7, num_classes=4)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[3:], batch), half)


def test_augmentation_permutes_and_numbers_anew():
    keys = fold_in_each(KEY, jnp.zeros(20, int))
    plain = draw_batch(keys, n=7, num_classes=3)
    moved = draw_batch(keys, n=7, num_classes=3, permutation_keys=fold_in_each(KEY, jnp.arange(20)))
    chex.assert_trees_all_equal(plain.inputs.sum(1), moved.inputs.sum(1))
    assert len({bytes(np.asarray(x)) for x in moved.inputs}) > 5
    chex.assert_trees_all_equal(
        moved.targets.argmax(-1), number_within_classes(moved.inputs.argmax(-1))
    )


def test_classes_per_set():
    keys = jax.random.split(KEY, 40)
    classes = jax.vmap(lambda k: draw_classes(k, n=12, num_classes=5, classes_per_set=2))(keys)
    counts = [len(set(row.tolist())) for row in classes]
    assert max(counts) == 2
    assert len(set(np.asarray(classes).ravel().tolist())) == 5
    with pytest.raises(ValueError, match="classes_per_set"):
        draw_classes(KEY, n=3, num_classes=2, classes_per_set=3)


def test_all_classes_are_equally_frequent():
    classes = draw_batch(jax.random.split(KEY, 500), n=8, num_classes=4).inputs.mean((0, 1))
    chex.assert_trees_all_close(classes, jnp.full(4, 0.25), atol=0.03)


# --- loss and accuracy ---


@pytest.mark.parametrize("cost", ["l2", "ce"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_matching_is_the_best_within_classes(cost, scale):
    # Costs far above 1000, the constant of the paper, must not spill over into other classes.
    batch = draw_batch(jax.random.split(KEY, 8), n=5, num_classes=2)
    prediction = scale * jax.random.normal(KEY, (8, 5, 5))
    found = numbering_assignment(prediction, batch.targets, batch.inputs, cost=cost)
    if cost == "l2":
        pairs = jnp.linalg.norm(prediction[:, :, None] - batch.targets[:, None], axis=-1)
    else:
        pairs = -jax.nn.log_softmax(prediction) @ batch.targets.swapaxes(1, 2)
    loss = numbering_loss(prediction, batch.targets, batch.inputs, cost=cost)
    pairs, classes = np.asarray(pairs), np.asarray(batch.inputs.argmax(-1))
    for b in range(8):
        allowed = [
            p for p in itertools.permutations(range(5)) if (classes[b][list(p)] == classes[b]).all()
        ]
        best = min(float(pairs[b][np.arange(5), list(p)].sum()) for p in allowed)
        assert (classes[b][found[b]] == classes[b]).all()
        assert float(pairs[b][np.arange(5), found[b]].sum()) == pytest.approx(best, rel=1e-5)
        assert float(loss[b]) == pytest.approx(best / 5, rel=1e-5)


def test_any_order_within_a_class_is_right():
    batch = draw_batch(jax.random.split(KEY, 6), n=6, num_classes=2)
    reverse = jnp.zeros((6, 6), int)
    for b, classes in enumerate(np.asarray(batch.inputs.argmax(-1))):
        number = np.asarray(number_within_classes(jnp.array(classes)))
        size = np.bincount(classes, minlength=2)[classes]
        reverse = reverse.at[b].set(size - 1 - number)
    prediction = jax.nn.one_hot(reverse, 6)
    assignment = numbering_assignment(prediction, batch.targets, batch.inputs)
    accuracy = numbering_accuracy(prediction, batch.targets, assignment)
    chex.assert_trees_all_equal(accuracy.micro, jnp.ones(6))
    chex.assert_trees_all_equal(accuracy.macro, jnp.ones(6))
    chex.assert_trees_all_close(
        numbering_loss(prediction, batch.targets, batch.inputs), jnp.zeros(6)
    )
    # One element wrong: 5 of 6 elements, no set.
    wrong = prediction.at[:, 0].set(jax.nn.one_hot(5, 6))
    assignment = numbering_assignment(wrong, batch.targets, batch.inputs)
    accuracy = numbering_accuracy(wrong, batch.targets, assignment)
    chex.assert_trees_all_close(accuracy.micro, jnp.full(6, 5 / 6), atol=1e-6)
    chex.assert_trees_all_equal(accuracy.macro, jnp.zeros(6))


def test_gradient_is_finite_at_a_perfect_prediction():
    batch = draw_batch(jax.random.split(KEY, 2), n=4, num_classes=2)
    grads = jax.grad(lambda p: numbering_loss(p, batch.targets, batch.inputs).sum())(batch.targets)
    chex.assert_trees_all_equal(grads, jnp.zeros_like(grads))


def test_nan_is_reported():
    batch = draw_batch(jax.random.split(KEY, 2), n=4, num_classes=2)
    bad = batch.targets.at[0, 0, 0].set(jnp.nan)
    loss = jax.jit(numbering_loss)(bad, batch.targets, batch.inputs)
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])
    found = jax.jit(numbering_assignment)(bad, batch.targets, batch.inputs)
    assert (found[0] == INVALID).all()
    assert not jax.jit(numbering_accuracy)(batch.targets, batch.targets, found).micro[0]
    with pytest.raises(ValueError, match="finite"):
        numbering_loss(bad, batch.targets, batch.inputs)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": jnp.zeros((2, 4, 3))}, "target"),
        ({"classes": jnp.zeros((2, 3, 2))}, "classes"),
        ({"cost": "l1"}, "cost"),
    ],
)
def test_bad_input(change, message):
    batch = draw_batch(jax.random.split(KEY, 2), n=4, num_classes=2)
    arguments = {"prediction": batch.targets, "target": batch.targets, "classes": batch.inputs}
    with pytest.raises(ValueError, match=message):
        numbering_loss(**(arguments | change))


# --- models ---


@pytest.mark.parametrize("name", MODELS)
def test_check_marks_of_fresh_models_are_the_published(name):
    config = small(name)
    params = jax.jit(build_model(config).init)(KEY)
    report = model_equivariance(config, params, key=KEY, num_permutations=3)
    found = (report.set_equivariant, report.multiset_equivariant)
    assert found == PUBLISHED_EQUIVARIANCE[name], str(report)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("idspn", False), ("transformer-random-pe", True)])
def test_the_other_reading_of_randomness(name, expected):
    reading = {"model": "elements", "elements": "model"}[PUBLISHED_READING[name]]
    config = small(name)
    params = jax.jit(build_model(config).init)(KEY)
    report = model_equivariance(
        config, params, key=KEY, noise_belongs_to=reading, num_permutations=3
    )
    assert report.set_equivariant == report.multiset_equivariant == expected


def test_sum_pooling_makes_idspn_set_equivariant():
    config = small("idspn", inner=Inner(num_steps=3, pool="sum"))
    params = jax.jit(build_model(config).init)(KEY)
    assert model_equivariance(config, params, key=KEY, num_permutations=3).set_equivariant


def test_published_settings():
    config = Config()
    assert (config.set_size, config.num_classes, config.steps, config.batch_size) == (
        64,
        4,
        50_000,
        128,
    )
    assert (config.hidden_dim, config.latent_dim) == (256, 256)
    inner = config.resolved_inner()
    assert (inner.num_steps, inner.max_grad_norm, inner.projection) == (20, 40.0, "simplex")
    assert Config(model="dspn").resolved_inner().max_grad_norm == np.inf
    assert config.steps_at_evaluation == 20
    assert Config(model="bilstm").steps_at_evaluation is None
    for changes in ({"train_size": 0}, {"classes_per_set": 9}, {"val_size": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Config(**changes)


# --- task ---


def test_fixed_training_set_and_augmentation():
    def inputs(config):
        sample = build(config).sample
        return np.concatenate(
            [np.asarray(sample(KEY, step, jnp.arange(4)).inputs) for step in range(5)]
        )

    fixed = {bytes(x) for x in inputs(small())}
    assert len(fixed) == 10
    again = inputs(small())
    chex.assert_trees_all_equal(inputs(small()), again)
    counts = {tuple(x.sum(0)) for x in again}
    moved = inputs(small(augment=True))
    assert {tuple(x.sum(0)) for x in moved} == counts
    assert not {bytes(x) for x in moved} <= fixed
    fresh = {bytes(x) for x in inputs(small(fresh=True))}
    assert len(fresh) > 15


def test_data_does_not_depend_on_the_split_of_the_batch():
    task = build(small(augment=True))
    whole = task.sample(KEY, 3, jnp.arange(4))
    part = task.sample(KEY, 3, jnp.arange(2, 4))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[2:], whole), part)


@pytest.mark.parametrize(
    "name", ["idspn", pytest.param("transformer-random-pe", marks=pytest.mark.slow)]
)
def test_loss_and_evaluation(name, tmp_path):
    task = build(small(name))
    variables = jax.jit(task.init)(KEY)
    batch = task.sample(KEY, 0, jnp.arange(4))
    keys = jax.random.split(KEY, 4)
    step = jax.jit(lambda p: task.loss({"params": p}, batch, keys, stage=None, axis_name=None))
    loss, (metrics, state) = step(variables["params"])
    assert state is None
    assert np.isfinite(loss)
    assert ("inner_energy" in metrics) == (name == "idspn")
    # 11 validation samples do not fill the chunk of the second evaluation.
    one = task.evaluate(variables, "val", KEY)
    assert set(one) == {"loss", *metrics}
    assert one == task.evaluate(variables, "val", KEY)
    if name == "idspn":
        task.figures(variables, tmp_path)
        assert (tmp_path / "numbering.png").stat().st_size > 1000


def test_evaluation_is_the_mean_over_the_split():
    whole = jax.jit(build(small(val_size=11)).init)(KEY)
    by_size = [
        build(small(batch_size=batch, val_size=11)).evaluate(whole, "val", KEY)["loss"]
        for batch in (1, 4)
    ]
    assert by_size[0] == pytest.approx(by_size[1], rel=1e-5)


def test_inner_steps_at_evaluation():
    variables = jax.jit(build(small("idspn")).init)(KEY)
    energy = [
        build(small("idspn", inner=Inner(num_steps=3, eval_num_steps=steps))).evaluate(
            variables, "val", KEY
        )["inner_energy"]
        for steps in (None, 9)
    ]
    assert energy[0] != energy[1]


def test_training_lowers_the_loss():
    import optax

    config = small("idspn", learning_rate=1e-2, fresh=True)
    task = build(config)
    params = jax.jit(task.init)(KEY)["params"]

    @jax.jit
    def step(params, state, i):
        batch = task.sample(KEY, i, jnp.arange(4))
        keys = fold_in_each(KEY, jnp.arange(4))
        loss, grads = jax.value_and_grad(
            lambda p: task.loss({"params": p}, batch, keys, stage=None, axis_name=None)[0]
        )(params)
        updates, state = task.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = task.optimizer.init(params), []
    for i in range(120):
        params, state, loss = step(params, state, i)
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


# --- report ---


@pytest.mark.slow
def test_report(tmp_path, capsys):
    from msdspn_jax.tasks.numbering import report as numbering_report
    from msdspn_jax.training.loop import train

    with pytest.raises(UserError, match="--runs: expected a folder with finished runs"):
        numbering_report.report(["--runs", str(tmp_path)], trained_runs)
    config = small(
        replicates=2,
        steps=1,
        run=Run(progress=False, tensorboard=False, dir=str(tmp_path / "run")),
        devices=Devices(compilation_cache=False),
    )
    train(build(config), config)
    output = tmp_path / "report"
    argv = ["--runs", str(tmp_path), "--out", str(output)]
    assert numbering_report.report(argv, trained_runs) == 0
    text = (output / "results.md").read_text()
    assert "test split, 2 seeds" in text
    assert "| DeepSets | 0.0; 0.0 |" in text
    assert text.strip() in capsys.readouterr().out
    assert (output / "accuracy_n5_3_classes.png").stat().st_size > 1000
    assert len(json.loads((output / "results.json").read_text())) == 1


def test_rows_hold_runs_that_differ_in_seed_and_samples(tmp_path):
    from msdspn_jax.tasks.numbering.report import Row, Scores, group_by_problem, table

    def run(accuracy, **changes):
        config = dataclasses.replace(small(), **changes)
        return Scores(tmp_path, config, 1, {"macro_accuracy": accuracy})

    muon = Outer(optimizer="muon")
    scores = [
        run([0.1, 0.2]),
        run([0.6], seed=2),
        run([0.6], seed=2),
        run([0.9], fresh=True, augment=True),
        run([0.5], learning_rate=0.01),
        run([0.7], outer=muon, steps=7),
        run([0.4], set_size=4),
    ]
    groups = group_by_problem(scores)
    assert [len(members) for members in groups.values()] == [6, 1]
    rows = table(groups[small().set_size, small().num_classes])
    cell = rows[Row("deep-sets", False)][10]
    assert (cell.seeds, cell.mean, cell.std) == pytest.approx((3, 30.0, 700**0.5))
    assert rows[Row("deep-sets", True)][0][:3] == (90.0, 0.0, 1)
    assert rows[Row("deep-sets", False, "learning_rate 0.01")][10].mean == 50
    assert rows[Row("deep-sets", False, "Muon, 7 steps of 4")][10].mean == 70
    # Two that read alike in short are told apart.
    rows = table([run([0.7], outer=muon), run([0.6], outer=muon, learning_rate=0.3)])
    assert len(rows) == 2


def test_changes_are_said_in_words(tmp_path):
    from msdspn_jax.tasks.numbering.report import Scores, rows_of

    changed = Inner(num_steps=3, late_num_steps=7, momentum=0.5)
    scores = [
        Scores(tmp_path, small("idspn", **changes), 1, {"macro_accuracy": [0.5]})
        for changes in ({}, {"inner": changed, "outer": Outer(average=0.999)})
    ]
    assert [str(row) for row in rows_of(scores)] == [
        "iDSPN",
        "iDSPN: 7 inner steps in the second half, inner momentum 0.5, averaged weights",
    ]


def test_scores_kept_are_those_of_the_best_checkpoint(tmp_path):
    from types import SimpleNamespace

    from msdspn_jax.tasks.numbering.report import score_run

    def runs(step, value):
        def evaluate(variables, split, key):
            return {"macro_accuracy": value}

        task = dataclasses.replace(build(small()), evaluate=evaluate)
        run = SimpleNamespace(step=step, variables=[{}], config=small(), task=task)
        return SimpleNamespace(
            load_run=lambda folder: run, read_config=lambda folder: ("numbering", small())
        )

    (tmp_path / "checkpoints").mkdir()
    assert score_run(tmp_path, "test", runs(10, 0.1)).values == {"macro_accuracy": [0.1]}
    assert score_run(tmp_path, "test", runs(10, 0.7)).values == {"macro_accuracy": [0.1]}
    assert score_run(tmp_path, "test", runs(90, 0.9))[2:] == (90, {"macro_accuracy": [0.9]})
    # A record has no checkpoints, and is as it was kept.
    (tmp_path / "checkpoints").rmdir()
    assert score_run(tmp_path, "test", runs(95, 1.0)).step == 90


def test_a_seed_that_was_trained_twice_counts_its_hours_once(tmp_path):
    from msdspn_jax.tasks.numbering.report import Row, Scores, table

    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3600, "split": "train", "loss": 1.0, "steps_per_second": 1.0}\n'
    )
    score = Scores(tmp_path, small(), 1, {"macro_accuracy": [0.5]})
    cell = table([score, score])[Row("deep-sets", False)][10]
    assert (cell.seeds, cell.hours) == (1, pytest.approx(1.0))


def test_cells():
    from msdspn_jax.tasks.numbering.report import Cell, Row, markdown

    assert str(Cell(96.84, 0.61, 6)) == "96.8±0.6"
    assert str(Cell(50.0, 0.0, 1)) == "50.0"
    cells = {640: Cell(12.3, 4.5, 3, 0.51), 0: Cell(99.0, 0.1, 3, 2)}
    rows = {Row("idspn", False, "Muon"): cells}
    text = markdown(rows, (64, 4))
    assert "640 | fresh | hours a seed | published, 640" in text
    assert "| iDSPN: Muon | 12.3±4.5 | 99.0±0.1 | 0.51; 2 | 96.8±0.6 | 98.1±0.3 |" in text
    assert "published" not in markdown(rows, (8, 4))  # Another problem than the paper's.


def test_other_decodings_are_shown_where_they_were_tried(tmp_path):
    from msdspn_jax.tasks.numbering.report import Scores, decoded, decodings_table, summary

    def run(name, tried=(), **changes):
        folder = tmp_path / name
        folder.mkdir()
        for step, inner, split, value in tried:
            write_decoding(folder, step, inner, {split: {"macro_accuracy": [value]}})
        config = dataclasses.replace(small(), **changes)
        return Scores(folder, config, 1, {"macro_accuracy": [0.5]})

    more, softer = {"num_steps": 20}, {"num_steps": 20, "momentum": 0.8, "num_starts": 4}
    # One run has more steps, and one more setting; what both have counts, of the last step.
    scores = [
        run("a", [(5, more, "val", 0.7), (5, softer, "val", 0.8), (5, softer, "test", 0.9),
                  (5, {"num_steps": 10}, "val", 0.1), (4, softer, "val", 0.0)]),
        run("b", [(5, more, "val", 0.6), (5, softer, "val", 0.9), (5, softer, "test", 1.0)],
            seed=1),
        run("c", augment=True),
        run("d", [(5, {"step_size": 2.0}, "val", 1.0)], train_size=20),
    ]  # fmt: skip
    assert [x.words for x in decoded(scores[:2])] == [
        "20 steps, 4 initial sets, momentum 0.8",
        "20 steps",
    ]
    long = "20 steps, 4 initial sets, momentum 0.8"
    assert decodings_table(scores).splitlines() == [
        f"| trained | hours a seed | step size 2 | 20 steps | {long} |",
        "|---|---|---|---|---|",
        "| DeepSets; 10 samples | < 0.001 |  | 70.0; 60.0 | 80.0; 90.0 (test: 90.0; 100.0) |",
        "| DeepSets; 20 samples | < 0.001 | 100.0 |  |  |",
    ]
    # Of three rows, what one alone has is left out.
    three = [*scores, run("e", [(5, more, "val", 0.3)], train_size=30)]
    assert decodings_table(three, common=True).startswith("| trained | hours a seed | 20 steps |\n")
    assert decodings_table(scores[2:3]) == ""
    # The README's table has the test score of what is best on validation.
    full = [
        Scores(score.folder, dataclasses.replace(small("idspn"), train_size=640), 1, score.values)
        for score in scores[:1]
    ]
    (row,) = summary({(8, 3): full})
    assert row.ours == "50.0; decoded with 20 steps, 4 initial sets, momentum 0.8: 90.0"


def test_straight_through_without_a_projection_is_said():
    straight = Inner(num_steps=3, adjoint=identity(straight_through=True))
    free = dataclasses.replace(straight, projection="none")
    idle = "warning: --inner.adjoint: straight-through is identity without a projection"
    assert idle not in small("idspn", inner=straight).remarks()
    assert idle in small("idspn", inner=free).remarks()


def test_straight_through_has_rows_of_its_own(tmp_path):
    from msdspn_jax.tasks.numbering.report import Scores, rows_of, summary

    straight = Inner(num_steps=3, adjoint=identity(straight_through=True))
    scores = [
        Scores(tmp_path, small("idspn", train_size=640, inner=inner), 1, {"macro_accuracy": [x]})
        for inner, x in ((Inner(num_steps=3), 0.5), (straight, 0.75))
    ]
    assert [str(row) for row in rows_of(scores)] == ["iDSPN", "iDSPN: straight-through"]
    # Of an n between the published and the small one there is no row.
    rows = [(row.case, row.ours) for row in summary({(8, 3): scores, (16, 3): scores})]
    assert rows == [("iDSPN", "50.0"), ("iDSPN, straight-through", "75.0")]
