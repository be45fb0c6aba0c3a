"""How tests compile, and that annotations hold while they run."""

import os
import pathlib
import sys

import jaxtyping
import pytest

# Every annotation of the package is checked on every call, shapes included. Before the first import
# of the package, hence here and not in a fixture.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
jaxtyping.install_import_hook("msdspn_jax", "typechecker.check")


def pytest_configure(config):
    """Compile quickly rather than well where only fast tests run.

    They are hundreds of small programs, each run for a moment; this takes a third off the whole.
    Slow tests run theirs for long, and get good ones.
    """
    if config.option.markexpr == "not slow":
        import jax

        os.environ.setdefault(
            "JAX_DISABLE_MOST_OPTIMIZATIONS", "1"
        )  # for processes that tests start
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def without_hook():
    """Users have no hook: they see the package's own errors, which tests of errors look at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
