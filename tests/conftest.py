"""How tests compile."""

import os


def pytest_configure(config):
    """The fast tests compile hundreds of small programs and run each for a moment: compile quickly.

    That takes a third off the whole run. Slow tests run their programs for long; they get good ones.
    """
    if config.option.markexpr == "not slow":
        import jax

        os.environ.setdefault(
            "JAX_DISABLE_MOST_OPTIMIZATIONS", "1"
        )  # for processes that tests start
        jax.config.update("jax_disable_most_optimizations", True)
