import dataclasses

import pytest

from msdspn_jax import tasks
from msdspn_jax.commands import train
from msdspn_jax.errors import UserError
from msdspn_jax.tasks import recipes

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
