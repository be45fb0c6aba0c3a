"""What holds for the package as a whole: its import, its names."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from processes import environment

import msdspn_jax as ms
from msdspn_jax import cli

HEAVY = ("jaxopt", "tensorflow_datasets", "grain", "matplotlib", "sklearn", "orbax", "tyro", "rich")


def run(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )


def test_import_is_clean_and_light():
    code = f"import sys, msdspn_jax; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = run(code, "-W", "error")
    assert result.returncode == 0, result.stderr
    flax_alone = run(code.replace("msdspn_jax", "flax.linen, optax"))
    assert set(ast.literal_eval(result.stdout)) <= set(ast.literal_eval(flax_alone.stdout))


def test_every_public_name_is_documented():
    for name in ms.__all__:
        thing = getattr(ms, name)
        if callable(thing) and name != "Energy":
            assert (thing.__doc__ or "").strip(), name


# --- what the core does without ---

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirement_names(requirements):
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}


def test_the_table_of_extras_is_that_of_the_project():
    named: dict[str, set[str]] = {}
    for package, extra in cli.EXTRAS.values():
        named.setdefault(extra, set()).add(package.lower().replace("_", "-"))
    for extra, packages in named.items():
        assert packages == requirement_names(PROJECT["optional-dependencies"][extra]), extra
    core = requirement_names(PROJECT["dependencies"])
    assert core == {"jax", "jaxlib", "flax", "optax", "numpy", "scipy", "jaxtyping"}


def test_what_is_imported_is_asked_for():
    root = Path(ms.__file__).parent
    imported: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                imported.setdefault(name.split(".")[0], set()).add(str(path.relative_to(root)))
    others = imported.keys() - set(sys.stdlib_module_names) - {"msdspn_jax", "msdspn_command"}
    core = {"jax", "jaxlib", "flax", "optax", "numpy", "scipy", "jaxtyping"}
    assert others - core <= cli.EXTRAS.keys()


@pytest.mark.parametrize(
    ("blocked", "argv", "words"),
    [
        ("tyro", ["demo"], "msdspn demo needs tyro: pip install 'msdspn-jax[app]'"),
        ("sklearn", ["demo"], "msdspn demo needs scikit-learn: pip install 'msdspn-jax[app]'"),
        ("tyro", ["train", "digits"], "msdspn train needs tyro: pip install 'msdspn-jax[app]'"),
        (
            "orbax",
            ["train", "random-sets", "--steps", "1", "--hidden-dim", "4", "--val-size", "4"],
            "msdspn train needs orbax-checkpoint: ",
        ),
        ("safetensors", ["export", "--weights", "w"], "msdspn export needs safetensors: "),
        (
            "PIL",
            ["render", "--seed", "0", "--num", "1", "--out", "o"],
            "msdspn render needs pillow: ",
        ),
    ],
)
def test_a_verb_without_its_extra_says_which(blocked, argv, words, tmp_path):
    code = f"import sys; sys.modules[{blocked!r}] = None; from msdspn_jax import cli; "
    code += "sys.exit(cli.main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_other_import_errors_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "msdspn_jax.commands.demo", None)
    with pytest.raises(ImportError):
        cli.main(["demo"])


CORE_EXAMPLE = """
import jax, jax.numpy as jnp, optax
import msdspn_jax as ms

encoder = ms.SetEncoder(hidden_dim=16, latent_dim=8, set_size=4)
energy = ms.latent_energy(encoder.apply, proximity=0.1)
key = jax.random.key(0)
sets = jax.random.normal(key, (3, 4, 2))
params = encoder.init(key, sets)
start = jnp.zeros_like(sets)
context = ms.Context(latent=encoder.apply(params, sets), initial_sets=start)

def loss(params):
    minimum = ms.minimise(
        energy, params, context, start + 0.1 * sets,
        optimizer=optax.sgd(1.0, momentum=0.9, nesterov=True), num_steps=3,
    )
    return ms.hungarian_loss(minimum.sets, sets).mean()

value, gradient = jax.value_and_grad(loss)(params)
assert jnp.isfinite(value) and jnp.isfinite(optax.tree.norm(gradient)), value
print(ms.__version__)
"""


@pytest.mark.slow
def test_the_core_alone_installs_and_runs(tmp_path):
    root = Path(__file__).parents[1]
    clean = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "notebooks")
    shutil.copytree(root, source, ignore=ignored)
    python = tmp_path / "venv" / "bin" / "python"

    def call(*command):
        result = subprocess.run(
            [*map(str, command)],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=clean,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    call(sys.executable, "-m", "venv", tmp_path / "venv")
    constraint = ["--constraint", root / "requirements.lock"]
    call(python, "-m", "pip", "install", "--quiet", *constraint, source)
    assert call(python, "-c", CORE_EXAMPLE).split() == [PROJECT["version"]]
    assert call(tmp_path / "venv" / "bin" / "msdspn", "--version").split() == [PROJECT["version"]]
    refused = subprocess.run(
        [tmp_path / "venv" / "bin" / "msdspn", "demo"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=clean,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "msdspn demo needs tyro: pip install 'msdspn-jax[app]'" in refused.stderr
