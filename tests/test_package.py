"""What holds for the package as a whole: its import, its names."""

import ast
import subprocess
import sys

import msdspn_jax as ms

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
