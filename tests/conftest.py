"""How tests compile."""

import os


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
