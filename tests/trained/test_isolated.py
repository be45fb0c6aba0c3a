"""What a program does in its own process ends nothing in ours."""

import os
import signal
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msdspn_jax import cli
from msdspn_jax.errors import UserError
from msdspn_jax.trained import program as programs
from msdspn_jax.trained.isolated import IsolatedProgram

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


def mean(images):
    return (
        jnp.zeros((images.shape[0], 10, 19))
        + images.astype(jnp.float32).mean((1, 2, 3))[:, None, None]
    )


def endless(images):
    zero = images[0, 0, 0, 0].astype(jnp.float32)
    return mean(images) + jax.lax.while_loop(lambda x: x < 1, lambda x: x * 0, zero)


def greedy(images):
    # Every row of it is needed at once.
    x = jnp.arange(2.0**29) + images[0, 0, 0, 0]
    return mean(images) + jnp.sort(jnp.sin(x))[-1]


def save(path, predict):
    programs.save_program(path, predict, size=4, platforms=("cpu",))
    return path


@pytest.mark.slow
def test_batches_are_predicted_until_it_is_closed(tmp_path):
    path = save(tmp_path / "a.zip", mean)
    with IsolatedProgram(path) as program:
        assert program.settings["size"] == 4
        assert program.source == str(path)
        for batch in (1, 3, 2):
            images = np.random.default_rng(batch).integers(0, 256, (batch, 4, 4, 3), np.uint8)
            expected = np.asarray(mean(images))
            np.testing.assert_allclose(program.predict(images).result(), expected, rtol=1e-6)
        process = program._process
    assert process.poll() is not None
    with pytest.raises(UserError, match=r"none\.zip: no such file"):
        IsolatedProgram(tmp_path / "none.zip")


@pytest.mark.slow
def test_a_process_that_ends_is_a_user_error(tmp_path):
    path = save(tmp_path / "a.zip", mean)
    with IsolatedProgram(path) as program:
        os.kill(program._process.pid, signal.SIGSEGV)
        with pytest.raises(UserError, match=r"a\.zip: the program was stopped: .*SIGSEGV"):
            program.predict(IMAGES).result()
    with IsolatedProgram(save(path, endless), time_limit=20) as program:  # Its start counts.
        start = time.monotonic()
        with pytest.raises(UserError, match="stopped: no answer in 20 seconds"):
            program.predict(IMAGES).result()
        assert time.monotonic() - start < 60
    program = IsolatedProgram(save(path, greedy), memory_limit=2**30)
    with program, pytest.raises(UserError, match="stopped: more than 1 GiB of memory"):
        program.predict(IMAGES).result()


@pytest.mark.slow
def test_the_verb_says_what_became_of_a_program(tmp_path, capsys):
    from PIL import Image

    path = save(tmp_path / "a.zip", endless)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    argv = ["predict", "--program", path, tmp_path / "a.png", "--out", tmp_path / "out"]
    assert cli.main([*map(str, argv), "--time-limit", "20"]) == 2
    assert "a.zip: the program was stopped: no answer in 20 seconds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("settings.json", "{}")
    assert cli.main([*map(str, argv)]) == 2
    assert "not an exported program, or damaged" in capsys.readouterr().err
