"""A trained predictor as a compiled program that needs no model code: StableHLO with its weights.

An artefact is a zip file of three parts: ``model.jax_export`` (what `jax.export` serialises: uint8
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

from msdspn_jax.clevr import objects as clevr
from msdspn_jax.errors import UserError

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_PROGRAM, _SETTINGS = "model.jax_export", "settings.json"

#: How to run an artefact without msdspn_jax: ``python predict.py ARTEFACT IMAGE``.
EXAMPLE = """\
import json, sys, zipfile
import jax, jax.export, numpy as np
from PIL import Image

artefact = zipfile.ZipFile(sys.argv[1])
settings = json.loads(artefact.read("settings.json"))
predict = jax.jit(jax.export.deserialize(bytearray(artefact.read("model.jax_export"))).call)
image = Image.open(sys.argv[2]).convert("RGB").resize([settings["size"]] * 2, Image.BILINEAR)
for y in np.asarray(predict(np.asarray(image)[None]))[0]:
    if y[settings["presence"]] > settings["threshold"]:
        words = [a["values"][y[slice(*a["features"])].argmax()] for a in settings["attributes"]]
        print(*words, settings["position_scale"] * y[slice(*settings["position"])])
"""


class Artefact(NamedTuple):
    """A program read back.

    Attributes:
      predict: ``images uint8 [batch, size, size, 3] -> float32 [batch, set_size, 19]``, jittable.
      settings: what ``settings.json`` holds.
    """

    predict: Callable[[UInt8[Array, "batch size size 3"]], Float[Array, "batch n 19"]]
    settings: dict[str, Any]


def save_artefact(
    path: str | Path,
    predict: Callable[[UInt8[Array, "batch size size 3"]], Float[Array, "batch n 19"]],
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
      UserError: the file cannot be written, or ``flatbuffers`` is not installed.
    """
    from msdspn_jax.trained.run import package_versions
    from msdspn_jax.trained.weights import write_bytes

    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise ValueError(f"platforms must be of {', '.join(PLATFORMS)}, got {list(platforms)}")
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
            f"predict must return float32 [batch, n, {clevr.NUM_FEATURES}],"
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
    try:
        program = bytes(exported.serialize())
    except ImportError as error:
        raise UserError(f"this needs flatbuffers: pip install flatbuffers ({error})") from error
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        parts = {
            _PROGRAM: program,
            _SETTINGS: (json.dumps(settings, indent=2, default=str) + "\n").encode(),
            "predict.py": EXAMPLE.encode(),
        }
        for name, content in parts.items():
            # ZipInfo's own date is fixed, and so are the bytes.
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    write_bytes(Path(path), data.getvalue())
    return settings


def load_artefact(path: str | Path) -> Artefact:
    """Read what `save_artefact` wrote; no model code is needed, nor imported.

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
        raise UserError(f"{path}: not an artefact, or damaged ({error})") from error
    if any(settings.get(name) != value for name, value in layout_settings().items()):
        raise UserError(f"{path}: its features are not laid out as this version's are")
    try:
        exported = export.deserialize(bytearray(program))
    except ImportError as error:
        raise UserError(f"this needs flatbuffers: pip install flatbuffers ({error})") from error
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
    return Artefact(exported.call, settings)


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


def difference(
    artefact: Artefact,
    predict: Callable[[UInt8[Array, "batch size size 3"]], Float[Array, "batch n 19"]],
    *,
    batch: int = 2,
) -> float:
    """Largest absolute difference between artefact and model, on images of noise, on this device.

    For a minimiser that has not converged, rounding can grow with every inner step: expect about
    1e-6 where the program runs on what it was traced on, more across devices.
    """
    size = artefact.settings["size"]
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    pair = [np.asarray(jax.jit(f)(images)) for f in (artefact.predict, predict)]
    return float(np.abs(pair[0] - pair[1]).max())
