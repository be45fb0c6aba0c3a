"""What checks the annotations of the package while its tests run (see `conftest`)."""

from beartype import BeartypeConf, beartype

# What is not checked, and why.
EXCLUDED = {
    "msdspn_jax.models.inner.Inner.__init__": "the annotations are what the command line takes; "
    "in code and in files a word stands for an adjoint, and a function for a projection",
}

# An int may stand for a float, as everywhere in Python.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """The function, its arguments and result checked at every call."""
    if f"{function.__module__}.{function.__qualname__}" in EXCLUDED:
        return function
    return _check(function)
