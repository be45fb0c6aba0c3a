"""Every Python block of the README and the guide runs, verbatim, top to bottom; so do examples."""

import doctest
import importlib
import inspect
import re
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
    "page", [page for page in PAGES if blocks(page) and page not in WITH_COMMANDS]
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
