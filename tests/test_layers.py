"""Rooms and layers: an import goes to the same room, or to one that comes before it."""

import ast
from pathlib import Path

import pytest

import msdspn_jax as ms

ROOT = Path(ms.__file__).parent

# A layer a line, the first at the bottom; modules of one line do not import each other, except
# inside a folder, whose own order follows below.
LAYERS = """
errors
_check
_closures _cores _files _markdown _options _progress _memory _varying
_cache
ranks
pooling projections energy acceleration
products set_encoder
adjoints
descent
step_size
matching
losses box_losses equivariance metrics
models
plots
clevr
training
tasks
trained
bench
commands
cli
"""
# Inside clevr/, where the order is fixed as well.
CLEVR = """
vectors objects
camera
entries
scene
metrics slots
render
sampling
files
cache
tfds procedural
plots
"""
# msdspn_jax/__init__.py imports the core and the models; what it offers may be used above them.
FRONT_DOOR = ""

# Arrows that point the wrong way, as (from, to).
EXCEPTIONS: set[tuple] = {
    # Average precision and its layout are public names, and need no more than the core does.
    ("", "clevr.metrics"),
    ("", "clevr.objects"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it: "clevr.render.trace"."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports() -> list[tuple[str, str, tuple[str, ...]]]:
    """Every import within the package, those inside functions too: (from, to, names)."""
    arrows = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [(alias.name, ()) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: line {node.lineno}: a relative import"
                found = [(node.module or "", tuple(alias.name for alias in node.names))]
            else:
                continue
            for target, names in found:
                if target.split(".")[0] != "msdspn_jax":
                    continue
                target = target.removeprefix("msdspn_jax").removeprefix(".")
                submodules = [f"{target}.{name}".strip(".") for name in names]
                arrows += [(module, sub, ()) for sub in submodules if sub in MODULES]
                rest = tuple(
                    n for n, sub in zip(names, submodules, strict=True) if sub not in MODULES
                )
                if rest or not names:
                    arrows.append((module, target, rest))
    return arrows


def ranks(text: str) -> dict[str, int]:
    return {room: i for i, line in enumerate(text.strip().splitlines()) for room in line.split()}


def points_up(source: str, target: str) -> bool:
    layer, inside = ranks(LAYERS), ranks(CLEVR)
    if FRONT_DOOR in (source, target):
        if source == FRONT_DOOR:
            return layer[room(target)] > layer["models"]
        return layer[room(source)] <= layer["models"]
    a, b = room(source), room(target)
    if a != b:
        return layer[b] >= layer[a]
    if a == "clevr" and source != "clevr" and target != "clevr":
        a, b = source.split(".")[1], target.split(".")[1]
        return a != b and inside[b] >= inside[a]
    return False


def room(module: str) -> str:
    return module.split(".")[0]


ARROWS = imports()


def test_every_module_has_a_layer():
    assert {room(m) for m in MODULES if m} <= ranks(LAYERS).keys()
    assert {m.split(".")[1] for m in MODULES if m.startswith("clevr.")} <= ranks(CLEVR).keys()


def test_no_import_points_to_a_later_layer():
    wrong = {(a, b) for a, b, _ in ARROWS if points_up(a, b)}
    assert wrong - EXCEPTIONS == set()
    assert EXCEPTIONS - wrong == set(), "mended: strike it from the list"


def test_no_modules_import_each_other_in_a_circle():
    targets: dict[str, set[str]] = {}
    for a, b, _ in ARROWS:
        # A package's own front page imports what lies in it, or is imported by it: not both.
        if a != b and (a, b) not in EXCEPTIONS:
            targets.setdefault(a, set()).add(b)

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(targets.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in MODULES:
        visit(module, ())


def test_training_imports_neither_tasks_nor_trained():
    assert not {
        (a, b) for a, b, _ in ARROWS if room(a) == "training" and room(b) in ("tasks", "trained")
    }


def test_private_names_stay_in_their_room():
    wrong = {
        (a, b, name)
        for a, b, names in ARROWS
        for name in names
        if name.startswith("_") and not name.endswith("__") and room(a) != room(b)
    }
    assert wrong == set()


def test_private_attributes_of_other_rooms_are_not_used():
    """``module._name``, where the module was imported from another room."""
    wrong = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        foreign = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msdspn_jax"):
                package = (node.module or "").removeprefix("msdspn_jax").removeprefix(".")
                for alias in node.names:
                    target = f"{package}.{alias.name}".strip(".")
                    if target in MODULES and room(target) != room(module):
                        foreign[alias.asname or alias.name] = target
        wrong += [
            (module, foreign[node.value.id], node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in foreign
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    assert wrong == []


def test_no_public_name_is_also_a_module():
    assert not {name for name in ms.__all__ if name in MODULES}


@pytest.mark.parametrize(
    ("source", "target", "up"),
    [
        ("pooling", "ranks", False),
        ("ranks", "pooling", True),
        ("pooling", "energy", True),
        ("clevr.files", "clevr.objects", False),
        ("clevr.objects", "clevr.files", True),
        ("training.loop", "training.state", False),
        ("training.loop", "trained.run", True),
        ("", "models.set_predictor", False),
        ("", "plots", True),
        ("commands.train", "", False),
        ("energy", "", True),
    ],
)
def test_the_rule_itself(source, target, up):
    assert points_up(source, target) == up
