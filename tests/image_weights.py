"""Weights and images of tests/golden/image_model.npz, by a formula of integers.

Needs NumPy alone: golden/make_image_model.py runs beside the authors' code.
"""

import numpy as np


def numbers(shape, index):
    """Numbers in [-1, 1] that any language can make."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    return (2.0 * ((31 * i * i + 17 * i + 101 * index) % 1009) / 1008 - 1).reshape(shape)


def weights(shapes):
    """The weights with which the golden file was made."""
    state = {}
    for index, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        x = numbers(shape, index)
        if name.endswith("running_var"):
            x = 1 + 0.5 * x
        elif name.endswith("_set_0"):
            x = 0.1 * x
        elif "pool" in name:
            x = x * (3 / shape[0]) ** 0.5
        elif len(shape) == 4:
            x = x * (6 / np.prod(shape[1:])) ** 0.5
        elif len(shape) == 2:
            x = x / shape[1] ** 0.5
        else:
            x = 0.4 + 0.2 * x if name.endswith("weight") else 0.3 * x
        state[name] = x
    return state
