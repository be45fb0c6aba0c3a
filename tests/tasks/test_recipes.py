import dataclasses
import json
import os

import pytest

from msdspn_jax import tasks
from msdspn_jax._files import write_text
from msdspn_jax.commands import grid, train
from msdspn_jax.errors import UserError
from msdspn_jax.tasks import recipes
from msdspn_jax.training import loop
from msdspn_jax.training.run_folder import config_difference, training_hours

CLEVR = tasks.load("clevr")


def test_every_recipe_reads_and_builds_an_optimiser():
    assert {"published", "fast"} <= set(recipes.names(CLEVR))
    for name in recipes.names(CLEVR):
        config = recipes.read(CLEVR, name)
        assert CLEVR.outer_optimizer(config) is not None


def test_published_is_the_default():
    default, published = CLEVR.Config().resolved(), recipes.read(CLEVR, "published").resolved()
    assert published == default


def test_flags_beside_a_recipe_win(tmp_path):
    argv = ["--steps", "7", "--recipe", "fast", "--outer.average=0.5", "--run-dir", str(tmp_path)]
    config = train.parse("clevr", argv)
    recipe = recipes.read(CLEVR, "fast")
    assert (config.steps, config.outer.average) == (7, 0.5)
    assert config.outer == dataclasses.replace(recipe.outer, average=0.5)
    assert config.size == recipe.size == 64


def test_a_recipe_counts_when_a_run_is_gone_on_with(tmp_path):
    begun = train.parse("clevr", ["--recipe", "fast", "--steps", "7", "--run-dir", str(tmp_path)])
    write_text(tmp_path / "config.json", json.dumps({"task": "clevr", "config": begun.to_dict()}))
    # Of tyro, underscores are as good as dashes.
    argv = ["--run_dir", str(tmp_path), "--resume"]
    assert train.parse("clevr", argv).steps == 7
    again = train.parse("clevr", [*argv, "--recipe", "fast", "--steps", "7"])
    assert again.numerical() == begun.numerical()
    other = train.parse("clevr", [*argv, "--recipe", "published"])
    assert "--encoder-width" in " ".join(config_difference(begun, other))
    with pytest.raises(UserError, match="--recipe: expected one of this task's"):
        train.parse("clevr", [*argv, "--recipe", "nonsense"])


def test_a_grid_of_recipes_can_be_given_again(tmp_path):
    (cell,) = grid.expand("clevr", ["--recipe", "fast", "--steps", "7"])
    config = grid._config("clevr", cell, tmp_path)
    write_text(
        tmp_path / cell.name / "config.json",
        json.dumps({"task": "clevr", "config": config.to_dict()}),
    )
    grid._check_unchanged("clevr", cell, tmp_path)
    (other,) = grid.expand("clevr", ["--recipe", "published", "--steps", "7"])
    with pytest.raises(UserError, match="was begun with other flags"):
        grid._check_unchanged("clevr", other, tmp_path)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("steps = 3\n[inner]\nadjoint = 'neumann:2'\n")
    config = recipes.read(CLEVR, str(path))
    assert (config.steps, str(config.inner.adjoint)) == (3, "neumann:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "expected fields that this version of msdspn_jax knows, got stepps"),
        ("steps = 'many'", "steps"),
        ("steps = ", "--recipe"),
        ("inner = 3", "--recipe"),
    ],
)
@pytest.mark.usefixtures("without_hook")
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        recipes.read(CLEVR, str(path))


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"\(fast, published\).* got 'quick'"):
        recipes.read(CLEVR, "quick")


@pytest.mark.slow
def test_at_equal_time_the_fast_recipe_is_far_ahead_of_the_published(tmp_path):
    """Ten minutes each, on the same images and with the same network (MINUTES: others)."""
    hours = float(os.environ.get("MINUTES", "10")) / 60
    images = {"size": 64, "train_size": 20_000, "val_size": 500, "cache_dir": str(tmp_path)}

    def trained(name, steps):
        config = recipes.read(CLEVR, name)
        folder = tmp_path / f"{name}-{steps}"
        run = dataclasses.replace(
            config.run, dir=str(folder), evaluate_every=steps, log_every=10, tensorboard=False
        )
        config = dataclasses.replace(config, **images, encoder_width=32, steps=steps, run=run)
        return loop.train(CLEVR.build(config), config).metrics, training_hours(folder)

    scores = {}
    for name in ("published", "fast"):
        _, taken = trained(name, 20)
        scores[name], taken = trained(name, round(20 * hours / taken))
        assert taken < 1.5 * hours  # The second half has twice the inner steps.
    # Not AP∞, where a guess has 0.05.
    for threshold, least in (("ap_1", 0.02), ("ap_0.5", 0.005)):
        assert scores["fast"][threshold] > max(least, 4 * scores["published"][threshold])
