"""That the annotations of the package are checked while its tests run."""

import ast
import importlib
import pathlib
import re

import jax.numpy as jnp
import jaxtyping
import pytest

import msdspn_jax as ms

FOLDER = pathlib.Path(ms.__file__).parent
SHAPED = re.compile(r"\b(Bool|Float|Int|Key|Real|UInt8)\[")


def annotations(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield node.annotation
        if isinstance(node, ast.FunctionDef) and node.returns:
            yield node.returns


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda p: p.stem)
def test_shapes_can_be_read(path):
    # Of an annotation that it cannot evaluate, jaxtyping makes Any, and says nothing.
    shaped = {ast.unparse(a) for a in annotations(ast.parse(path.read_text()))}
    shaped = {text for text in shaped if SHAPED.search(text)}
    if shaped:
        parts = path.relative_to(FOLDER.parent).with_suffix("").parts
        names = vars(importlib.import_module(".".join(parts).removesuffix(".__init__")))
        for text in shaped:
            eval(text, dict(names))


def test_shapes_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'weight'"):
        ms.fspool(jnp.ones((3, 2)), jnp.ones((4, 2)))


@pytest.mark.usefixtures("without_hook")
def test_users_see_the_errors_of_the_package():
    with pytest.raises(ValueError, match=r"weight: expected \[n, c\]"):
        ms.fspool(jnp.ones((3, 2)), jnp.ones((4, 2)))
