"""Compiled programs kept on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from msdspn_jax import _cache


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def counted(name="double", factor=2):
    traces = []

    def function(x):
        traces.append(x.shape)
        return factor * x

    return _cache.compiled_once(function, name, factor), traces


def kept(folder):
    return list(folder.glob("program-*"))


def test_a_second_call_traces_nothing_and_gives_the_same(folder):
    x = jnp.arange(3.0)
    first, traces = counted()
    np.testing.assert_array_equal(first(x), 2 * x)
    assert traces == [(3,)]
    again, traces = counted()
    np.testing.assert_array_equal(again(x), 2 * x)
    assert traces == []


def test_other_settings_shapes_types_and_files_are_other_programs(folder, monkeypatch):
    x = jnp.arange(3.0)
    counted()[0](x)
    np.testing.assert_array_equal(counted(factor=3)[0](x), 3 * x)
    np.testing.assert_array_equal(counted()[0](x[:2]), 2 * x[:2])
    assert counted()[0](x.astype(jnp.int32)).dtype == jnp.int32
    monkeypatch.setattr(_cache, "_package_files", list)
    function, traces = counted()
    function(x)
    assert traces == [(3,)]
    assert len(kept(folder)) == 5


def test_another_generator_of_random_numbers_is_another_program(folder):
    def draw():
        return _cache.compiled_once(lambda x: x + jax.random.normal(jax.random.key(0)), "draw")(1.0)

    threefry = draw()
    with jax.default_prng_impl("rbg"):
        assert draw() == 1.0 + jax.random.normal(jax.random.key(0)) != threefry
    assert len(kept(folder)) == 2


def test_a_damaged_file_is_made_anew(folder):
    x = jnp.arange(3.0)
    counted()[0](x)
    kept(folder)[0].write_bytes(b"\0" * 40)
    for expected in ([(3,)], []):
        function, traces = counted()
        np.testing.assert_array_equal(function(x), 2 * x)
        assert traces == expected


def test_programs_stay_out_of_the_cache_of_jax(folder):
    """From there they would come back such that they cannot be kept."""
    names = (
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    compilation_cache.reset_cache()
    try:
        for name in names:
            jax.config.update(name, -1)
        counted()[0](jnp.arange(3.0))
        assert list(folder.iterdir()) == kept(folder)
        # Unless others have put them there.
        jax.jit(lambda x: 3 * x)(jnp.arange(3.0))
        assert len(list(folder.iterdir())) > 1
        for _ in range(2):
            function, _ = counted(factor=3)
            np.testing.assert_array_equal(function(jnp.arange(3.0)), [0, 3, 6])
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_without_a_folder_or_with_a_full_disk_it_is_jit(folder, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(_cache, "write_bytes", full)
    np.testing.assert_array_equal(counted()[0](jnp.ones(2)), 2 * jnp.ones(2))
    assert not kept(folder)
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_array_equal(counted()[0](jnp.ones(2)), 2 * jnp.ones(2))


def test_shapes_are_found_once(folder):
    def init(key):
        calls.append(key)
        return {"params": {"kernel": jnp.zeros((2, 3)), "count": jnp.zeros((), jnp.int32)}}

    calls = []
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init(None))
    for number in (1, 0):
        calls = []
        assert _cache.shapes_once(init, "variables", 3) == expected
        assert len(calls) == number
    (file,) = folder.glob("shapes-*")
    file.write_text("[]")
    assert _cache.shapes_once(init, "variables", 3) == expected
    jax.config.update("jax_compilation_cache_dir", None)
    assert _cache.shapes_once(init, "variables", 3) == expected
