"""A trained predictor as a compiled program that needs no model code: StableHLO with its weights.

A program is a zip file of three parts: ``model.jax_export`` (what `jax.export` serialises: uint8
[batch, size, size, 3] to float32 [batch, set_size, 19], any batch), ``settings.json`` (image side,
threshold, inner steps, what the 19 features mean) and ``predict.py``, `EXAMPLE`, which runs it with
JAX, NumPy and Pillow alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, UInt8

from msdspn_jax._files import as_user_error, write_bytes
from msdspn_jax.clevr import objects as clevr
from msdspn_jax.errors import UserError
from msdspn_jax.training.run_folder import package_versions

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_PROGRAM, _SETTINGS = "model.jax_export", "settings.json"

#: How to run a program without msdspn_jax: ``python predict.py PROGRAM IMAGE``.
EXAMPLE = """\
import json, sys, zipfile
import jax, jax.export, numpy as np
from PIL import Image

program = zipfile.ZipFile(sys.argv[1])
settings = json.loads(program.read("settings.json"))
predict = jax.jit(jax.export.deserialize(bytearray(program.read("model.jax_export"))).call)
image = Image.open(sys.argv[2]).convert("RGB").resize([settings["size"]] * 2, Image.BILINEAR)
for y in np.asarray(predict(np.asarray(image)[None]))[0]:
    if y[settings["presence"]] > settings["threshold"]:
        words = [a["values"][y[slice(*a["features"])].argmax()] for a in settings["attributes"]]
        print(*words, settings["position_scale"] * y[slice(*settings["position"])])
"""


Predict = Callable[[UInt8[Array, "batch size size 3"]], Float[Array, "batch n 19"]]


class Program(NamedTuple):
    """A program read back.

    Attributes:
        predict: ``images uint8 [batch, size, size, 3] -> float32 [batch, set_size, 19]``, jittable.
        settings: what ``settings.json`` holds.
        source: the file that it was read from.
    """

    predict: Predict
    settings: dict[str, Any]
    source: str


def save_program(
    path: str | Path,
    predict: Predict,
    *,
    size: int,
    threshold: float = clevr.PRESENCE_THRESHOLD,
    platforms: Sequence[str] = PLATFORMS,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Lower ``predict`` for all platforms and any batch, and write it.

    Args:
        path: the file to write; whole or not at all. The same program gives the same bytes.
        predict: pure and jittable; the weights that it closes over become part of the program.
        size: side of the images.
        threshold: from which presence on an element is an object, for whoever runs the program.
        platforms: what the program shall run on; it can be lowered without them.
        facts: anything else worth keeping in the settings.

    Returns:
        The settings.

    Raises:
        ValueError: ``predict`` does not return float32 [batch, n, 19], or an unknown platform.
        UserError: the file cannot be written.
    """
    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise ValueError(
            f"platforms: expected some of {', '.join(PLATFORMS)}, got {list(platforms)}"
        )
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    with _without_source_locations():
        exported = export.export(jax.jit(predict), platforms=tuple(platforms))(images)
    (out,) = exported.out_avals if len(exported.out_avals) == 1 else (None,)
    if (
        out is None
        or len(out.shape) != 3
        or out.shape[2] != clevr.NUM_FEATURES
        or out.dtype != jnp.float32
    ):
        raise ValueError(
            f"predict: expected it to return float32 [batch, n, {clevr.NUM_FEATURES}],"
            f" got {exported.out_avals}"
        )
    settings = {
        "format": FORMAT,
        "size": size,
        "set_size": int(out.shape[1]),
        "threshold": float(threshold),
        **layout_settings(),
        "platforms": list(exported.platforms),
        "versions": package_versions(),
        **(facts or {}),
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        parts = {
            _PROGRAM: bytes(exported.serialize()),
            _SETTINGS: (json.dumps(settings, indent=2, default=str) + "\n").encode(),
            "predict.py": EXAMPLE.encode(),
        }
        for name, content in parts.items():
            # ZipInfo's own date is fixed, and so are the bytes.
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    with as_user_error(path):
        write_bytes(path, data.getvalue())
    return settings


def load_program(path: str | Path) -> Program:
    """Read what `save_program` wrote; no model code is needed, nor imported.

    Raises:
        UserError: no such file; not such a file, a damaged one, or one of a newer version; the
            program is not for this machine's accelerator.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            settings = json.loads(archive.read(_SETTINGS))
            program = archive.read(_PROGRAM)
        if settings["format"] > FORMAT:
            raise UserError(
                f"{path}: of format {settings['format']}, which a newer msdspn_jax wrote;"
                f" this one reads up to {FORMAT}"
            )
        for name in ("size", "set_size", "threshold", "platforms", "versions"):
            settings[name]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise half a dozen types for damaged files.
        raise UserError(f"{path}: not an exported program, or damaged ({error})") from error
    if any(settings.get(name) != value for name, value in layout_settings().items()):
        raise UserError(f"{path}: its features are not laid out as this version's are")
    try:
        exported = export.deserialize(bytearray(program))
    except ImportError:
        raise
    except Exception as error:
        made, here = settings["versions"].get("jax"), jax.__version__
        raise UserError(
            f"{path}: JAX {here} does not read this program, which JAX {made} wrote ({error})"
        ) from error
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform == "cuda" and "rocm" in jax.devices()[0].client.platform_version.lower():
        platform = "rocm"
    if platform not in exported.platforms:
        raise UserError(
            f"{path}: the program is for {', '.join(exported.platforms)}, this machine has"
            f" {platform}; JAX_PLATFORMS={exported.platforms[0]} may do"
        )
    return Program(exported.call, settings, str(path))


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Paths and line numbers of the machine that exports are nothing that a program needs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def layout_settings() -> dict[str, Any]:
    """What the features of an element mean, as JSON can hold it."""
    return {
        "position": [clevr.CLEVR_LAYOUT.position.start, clevr.CLEVR_LAYOUT.position.stop],
        "position_scale": clevr.CLEVR_LAYOUT.position_scale,
        "attributes": [
            {
                "name": name,
                "features": [clevr.SLICES[name].start, clevr.SLICES[name].stop],
                "values": list(values),
            }
            for name, values in clevr.ATTRIBUTES.items()
        ],
        "presence": clevr.CLEVR_LAYOUT.presence,
    }


def difference(program: Program, predict: Predict, *, batch: int = 2) -> float:
    """Largest absolute difference between program and model, on images of noise, on this device.

    For a minimiser that has not converged, rounding can grow with every inner step: expect about
    1e-6 where the program runs on what it was traced on, more across devices.
    """
    size = program.settings["size"]
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    pair = [np.asarray(jax.jit(f)(images)) for f in (program.predict, predict)]
    return float(np.abs(pair[0] - pair[1]).max())
