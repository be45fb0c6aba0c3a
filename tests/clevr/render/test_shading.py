import numpy as np

from msdspn_jax.clevr.render.shading import srgb


def test_srgb_curve():
    x = np.linspace(0, 1, 1001)
    curve = np.where(x < 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(srgb(x)) - curve).max() < 1e-4
