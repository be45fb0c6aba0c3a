"""How tests compile, and that annotations hold while they run."""

import os
import pathlib
import subprocess
import sys

import jaxtyping
import pytest

# Every annotation of the package is checked on every call, shapes included. Before the first import
# of the package, hence here and not in a fixture.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
jaxtyping.install_import_hook("msdspn_jax", "typechecker.check")


# XLA's older code generator, and one module of code a program: half of the time to compile.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """Compile quickly rather than well where only fast tests run.

    They are thousands of small programs, each run for a moment, and compiling them is most of the
    time. Slow tests run theirs for long, and get good ones. Through the environment, which the
    processes that tests start inherit.
    """
    if config.option.markexpr != "not slow":
        return
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if QUICK not in flags and _known(QUICK):
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}".strip()
    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # It may have been imported before.


def _known(flags):
    """Whether this version of XLA has these flags: with one that it has not, it aborts."""
    start = "import jax; jax.devices()"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True)
    return done.returncode == 0


@pytest.fixture
def without_hook():
    """Users have no hook: they see the package's own errors, which tests of errors look at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
