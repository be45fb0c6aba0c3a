"""Every Python block of the README and the guide runs, verbatim, top to bottom; so do examples."""

import ast
import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import msdspn_jax as ms

ROOT = Path(__file__).parents[1]
# Its blocks need the commands between them: tests/test_own_pages.py runs both.
WITH_COMMANDS = {"docs/own_data.md"}
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("**/*.md"))]
MODULES = sorted({thing.__module__ for name in ms.__all__ if callable(thing := getattr(ms, name))
                  and thing.__module__.startswith("msdspn_jax")})  # fmt: skip


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "page",
    [
        # Recipes are many: half a minute of compiling.
        pytest.param(page, marks=pytest.mark.slow if page == "docs/recipes.md" else ())
        for page in PAGES
        if blocks(page) and page not in WITH_COMMANDS
    ],
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    # The guide goes on with the README's example.
    for block in blocks("README.md") if page == "docs/guide.md" else ():
        exec(block, namespace)
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), namespace)


def test_the_readme_has_a_block():
    assert blocks("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    """`file.py::test`, or `…::test` for another one of the file named before."""
    file = None
    for path, name in re.findall(r"`((?:[\w/]+\.py)|…)::(\w+)`", (ROOT / page).read_text()):
        file = ROOT / "tests" / path if path != "…" else file
        assert file is not None, name
        assert re.search(rf"^def {name}\(", file.read_text(), re.M), f"{file}::{name}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:\n")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


def test_every_public_name_is_in_the_reference():
    """Which lists what the package imports from its modules."""
    imported = {alias.name for node in ast.parse((ROOT / "msdspn_jax/__init__.py").read_text()).body
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("msdspn_jax.")
                for alias in node.names}  # fmt: skip
    # An alias, which is assigned.
    assert imported == set(ms.__all__) - {"minimize"}


def test_broken_links_are_found(tmp_path):
    links = runpy.run_path(str(ROOT / "docs" / "_links.py"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").write_text('<h1 id="a">A</h1><a href="../#b">up</a>')
    good = '<p id="b"><a href="there/#a"></a><a href="https://x.y/z"></a></p>'
    (tmp_path / "index.html").write_text(good)
    assert links["broken"](tmp_path) == []
    (tmp_path / "index.html").write_text(good + '<a href="gone/"><img src="x.png"><a href="#c">')
    found = links["broken"](tmp_path)
    assert [line.split(": ", 2)[2] for line in found] == [
        "no such file", "no such file", "no such anchor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    globals_ = vars(module) | {"jax": jax, "jnp": jnp, "ms": ms}
    results = doctest.testmod(module, globs=globals_)
    assert results.failed == 0


def test_every_public_function_has_an_example():
    without = [
        name for name in ms.__all__
        if inspect.isfunction(thing := getattr(ms, name)) and ">>>" not in (thing.__doc__ or "")
    ]  # fmt: skip
    assert without == []
