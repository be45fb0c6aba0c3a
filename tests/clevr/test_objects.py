import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax.clevr.objects import (
    ATTRIBUTES,
    COLOR_RGB,
    COLORS,
    MAX_OBJECTS,
    NUM_FEATURES,
    SLICES,
    ClevrObject,
    decode,
    encode,
    encode_features,
)

OBJECTS = (
    ClevrObject("cube", "large", "metal", "red", (-1.95, 2.1, 0.7)),
    ClevrObject("sphere", "small", "rubber", "cyan", (0.5, -1.25, 0.35)),
)


def test_layout_is_the_published_one():
    names = [name for group in ("material", "color", "shape", "size") for name in ATTRIBUTES[group]]
    assert NUM_FEATURES == 3 + len(names) + 1 == 19
    first, second, *rest = encode(OBJECTS)
    chex.assert_shape([first, second], (19,))
    np.testing.assert_allclose(first[:3] * 3, OBJECTS[0].position, rtol=1e-6)
    assert [names[i] for i in np.nonzero(first[3:18])[0]] == ["metal", "red", "cube", "large"]
    assert [names[i] for i in np.nonzero(second[3:18])[0]] == ["rubber", "cyan", "sphere", "small"]
    assert first[18] == second[18] == 1
    assert not np.any(rest)
    stops = [SLICES[name].stop for name in SLICES]
    starts = [SLICES[name].start for name in SLICES]
    assert starts == [0, *stops[:-1]], "the groups leave a gap or overlap"
    for name, values in ATTRIBUTES.items():
        assert SLICES[name].stop - SLICES[name].start == len(values)
    assert len(COLOR_RGB) == len(COLORS)


@hypothesis.given(
    positions=st.lists(
        st.tuples(*[st.floats(-8, 8, width=32)] * 3), min_size=0, max_size=MAX_OBJECTS
    ),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_round_trip_is_exact(positions, seed):
    rng = np.random.default_rng(seed)
    objects = [
        ClevrObject(
            **{name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()},
            position=position,
        )
        for position in positions
    ]
    array = encode(objects)
    assert array.dtype == np.float32
    chex.assert_shape(array, (10, 19))
    again = decode(array)
    assert [o.words for o in again] == [o.words for o in objects]
    for ours, theirs in zip(again, objects, strict=True):
        np.testing.assert_allclose(ours.position, theirs.position, rtol=2e-7, atol=1e-44)
    np.testing.assert_array_equal(encode(again), array)
    assert decode(encode(again)) == again


def test_encode_features_agrees_on_device_and_on_host():
    rng = np.random.default_rng(0)
    position = rng.uniform(-3, 3, (4, 10, 3)).astype(np.float32)
    indices = {n: rng.integers(len(v), size=(4, 10)) for n, v in ATTRIBUTES.items()}
    present = rng.random((4, 10)) < 0.7
    host = encode_features(position, **indices, present=present)
    device = jax.jit(encode_features)(
        jnp.asarray(position), **jax.tree.map(jnp.asarray, indices), present=jnp.asarray(present)
    )
    assert host.dtype == device.dtype == np.float32
    chex.assert_trees_all_close(host, np.asarray(device), rtol=2e-7)
    assert not host[~present].any()
    assert (host[present][:, 3:].sum(-1) == 5).all()


def test_decode_reads_predictions():
    prediction = np.zeros((3, 19))
    prediction[:, 18] = [0.9, 0.5, 0.2]
    prediction[0, [4, 9, 14, 17]] = [0.3, 2.0, 0.8, 0.1]
    prediction[0, 0] = 1 / 3
    (only,) = decode(prediction)
    assert str(only) == "small red metal cube at (1.00, 0.00, 0.00)"
    assert only.score == pytest.approx(0.9)
    assert len(decode(prediction, threshold=0.1)) == 3


@pytest.mark.usefixtures("without_hook")
def test_bad_arguments_are_named():
    one = OBJECTS[0]
    with pytest.raises(ValueError, match="at most 10, got 11"):
        encode([one] * 11)
    with pytest.raises(ValueError, match=r"shape \[n, 19\], got \(10, 18\)"):
        decode(np.zeros((10, 18)))
    with pytest.raises(ValueError, match="expected finite values"):
        decode(np.full((10, 19), np.nan))
    with pytest.raises(ValueError, match="material: expected one of 'rubber', 'metal', got 'wood'"):
        ClevrObject("cube", "small", "wood", "red", (0, 0, 0))
