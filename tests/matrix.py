"""Run the suite on the versions of Python and JAX that are supported, as far as they are here.

``python tests/matrix.py [PYTEST ARGUMENTS]``, or ``make test-matrix``. Each pair gets a virtual
environment in .matrix/. The table at the end says what ran, and why the rest did not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"
PYTHONS = ("3.11", "3.12", "3.13")
JAXES = ("0.10.0", "0.10.*", "0.11.*")  # the oldest, and the newest of each minor version


def call(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, check=False, capture_output=True,
                          text=True)  # fmt: skip


def outcome(python: str, jax: str, arguments: list[str]) -> str:
    """One cell: the closing line of pytest, or why there is none."""
    found = shutil.which(f"python{python}")
    if found is None or call(found, "--version").returncode:  # A shim of pyenv may be there alone.
        return f"not run: no python{python} on this machine"
    folder = FOLDER / f"py{python}-jax{jax.replace('.*', '')}"
    own = folder / "bin" / "python"
    if not own.exists() and call(found, "-m", "venv", folder).returncode:
        return f"not run: python{python} makes no virtual environment"
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Not the lock file: it holds one version of JAX, and what goes with that.
    done = call(*install, "--editable", ".[dev]", f"jax=={jax}", f"jaxlib=={jax}")
    if done.returncode:
        return f"not run: {done.stderr.strip().splitlines()[-1]}"
    versions = call(own, "-c", "import jax, flax, optax; print(jax.__version__, flax.__version__, "
                    "optax.__version__)").stdout.split()  # fmt: skip
    tested = call(own, "-m", "pytest", "-n", "2", "--dist", "worksteal", *arguments)
    lines = tested.stdout.strip().splitlines() or tested.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    names = ", ".join(f"{n} {v}" for n, v in zip(("jax", "flax", "optax"), versions, strict=False))
    return "; ".join([f"{names}: {lines[-1]}", *failed])


def main(arguments: list[str]) -> int:
    results = {}
    for python in PYTHONS:
        for jax in JAXES:
            results[python, jax] = outcome(python, jax, arguments)
            print(f"Python {python}, JAX {jax}: {results[python, jax]}", flush=True)
    ran = {pair: text for pair, text in results.items() if not text.startswith("not run")}
    print(f"\nran {len(ran)} of {len(results)} pairs")
    bad = [text for text in ran.values() if " failed" in text or " error" in text]
    return int(bool(bad) or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
