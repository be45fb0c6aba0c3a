"""A trained predictor as a compiled program that needs no model code: StableHLO with its weights.

A program is a zip file of three parts: ``model.jax_export`` (what `jax.export` serialises: uint8
[batch, size, size, 3] to float32 [batch, set_size, 19], any batch), ``settings.json`` (image side,
threshold, inner steps, what the 19 features mean) and ``predict.py``, `EXAMPLE`, which runs it with
JAX, NumPy and Pillow alone.

A program is native code: XLA compiles it to machine code and runs it with the rights of whoever
runs it. `load_program` refuses what none of our own exports has (other custom calls, other shapes,
talk with the outside), which catches damage and accidents. It does not make a program from an
untrusted source safe.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxtyping import Array, Float, UInt8

from msdspn_jax._files import as_user_error, write_bytes
from msdspn_jax.clevr import objects as clevr
from msdspn_jax.clevr.files import read_bytes
from msdspn_jax.errors import UserError
from msdspn_jax.training.run_folder import package_versions

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_PROGRAM, _SETTINGS = "model.jax_export", "settings.json"
_MAX_BYTES = {_PROGRAM: 2**29, _SETTINGS: 2**20}
#: All that exports of our models call: JAX's check that the batch has the size it is said to have.
_CUSTOM_CALLS = ("shape_assertion",)
_DIALECTS = ("builtin", "func", "stablehlo", "chlo", "sdy")
_OUTSIDE = tuple(f"stablehlo.{x}" for x in ("infeed", "outfeed", "send", "recv"))

#: How to run a program without msdspn_jax: ``python predict.py PROGRAM IMAGE``.
EXAMPLE = """\
# A program is native code, run with your rights: run only what you trust.
import json, sys, zipfile
import jax, jax.export, numpy as np
from PIL import Image, ImageOps

program = zipfile.ZipFile(sys.argv[1])
settings = json.loads(program.read("settings.json"))
predict = jax.jit(jax.export.deserialize(bytearray(program.read("model.jax_export"))).call)
image = ImageOps.exif_transpose(Image.open(sys.argv[2], formats=["PNG", "JPEG", "WEBP", "BMP"]))
if image.mode.startswith("I"):  # 16 bits: the high byte
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
grey = Image.new("RGBA", image.size, (128, 128, 128, 255))  # behind what is transparent
image = Image.alpha_composite(grey, image.convert("RGBA")).convert("RGB")
image = image.resize([settings["size"]] * 2, Image.BILINEAR)
for y in np.asarray(predict(np.asarray(image)[None]))[0]:
    if y[settings["presence"]] > settings["threshold"]:
        words = [a["values"][y[slice(*a["features"])].argmax()] for a in settings["attributes"]]
        print(*words, settings["position_scale"] * y[slice(*settings["position"])])
"""


Predict = Callable[[UInt8[Array, "batch size size 3"]], Float[Array, "batch n 19"]]


class Signature(NamedTuple):
    """What a program takes and gives, without the batch: dtype and shape of every input."""

    inputs: tuple[tuple[np.dtype, tuple[int, ...]], ...]
    output: tuple[int, int]
    """[n, features], float32."""


class Program(NamedTuple):
    """A program read back.

    Attributes:
        predict: ``images uint8 [batch, size, size, 3] -> float32 [batch, set_size, 19]``, jittable;
            of the task sets, what `signature` says.
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
        threshold: from which presence on an element is an object, for whoever runs the program;
            from 0 to 1.
        platforms: what the program shall run on; it can be lowered without them.
        facts: anything else worth keeping in the settings.

    Returns:
        The settings.

    Raises:
        ValueError: ``predict`` does not return float32 [batch, n, 19], an unknown platform, or a
            threshold outside of 0 to 1.
        UserError: the file cannot be written.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    exported = lower(predict, images, platforms=platforms)
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
    write_program(path, exported, settings, EXAMPLE)
    return settings


def lower(predict: Callable[..., Any], *arguments: Any, platforms: Sequence[str]) -> Any:
    """Lower a function for all platforms: `jax.export.Exported`.

    Raises:
        ValueError: an unknown platform.
    """
    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise ValueError(
            f"platforms: expected some of {', '.join(PLATFORMS)}, got {list(platforms)}"
        )
    with _without_source_locations():
        return export.export(jax.jit(predict), platforms=tuple(platforms))(*arguments)


def write_program(
    path: str | Path, exported: export.Exported, settings: dict[str, Any], example: str
) -> None:
    """Write a program, its settings and the script that runs it; the same give the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        parts = {
            _PROGRAM: bytes(exported.serialize()),
            _SETTINGS: (json.dumps(settings, indent=2, default=str) + "\n").encode(),
            "predict.py": example.encode(),
        }
        for name, content in parts.items():
            # ZipInfo's own date is fixed, and so are the bytes.
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    with as_user_error(path):
        write_bytes(path, data.getvalue())


def load_program(path: str | Path, *, task: str = "clevr") -> Program:
    """Read what `save_program` wrote; no model code is needed, nor imported.

    The program is native code, which runs in this process: see this module's docstring.
    `trained.isolated` runs one in a process of its own.

    Args:
        path: the zip file.
        task: clevr, or sets for what `set_program.save_set_program` wrote.

    Raises:
        UserError: no such file; not such a file, a damaged one, or one of a newer version or
            another task; a program that does what no export of ours does; or it is not for this
            machine's accelerator.
    """
    path = Path(path)
    program, settings = _read_parts(path, task)
    try:
        exported = export.deserialize(bytearray(program))
        problem = _foreign(exported, settings)
    except ImportError:
        raise
    except Exception as error:
        made, here = settings["versions"].get("jax"), jax.__version__
        raise UserError(
            f"{path}: JAX {here} does not read this program, which JAX {str(made)[:40]} wrote"
            f" ({str(error)[:300]})"
        ) from error
    if problem is not None:
        raise UserError(f"{path}: refused, no export of msdspn_jax has {problem}")
    platform = platform_here()
    if platform not in exported.platforms:
        raise UserError(
            f"{path}: the program is for {', '.join(exported.platforms)}, this machine has"
            f" {platform}; JAX_PLATFORMS={exported.platforms[0]} may do"
        )
    return Program(exported.call, settings, str(path))


def platform_here() -> str:
    """The platform of this machine, by the name that programs have for it."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    rocm = platform == "cuda" and "rocm" in jax.devices()[0].client.platform_version.lower()
    return "rocm" if rocm else platform


def signature(settings: dict[str, Any]) -> Signature:
    """What the program with these settings, once they are checked, must take and give."""
    if settings.get("task") != "sets":
        side = settings["size"]
        image = (np.dtype(np.uint8), (side, side, 3))
        return Signature((image,), (settings["set_size"], clevr.NUM_FEATURES))
    kind, shape = settings["kind"], tuple(settings["input_shape"])
    inputs: list[tuple[np.dtype, tuple[int, ...]]]
    inputs = [(np.dtype(np.uint8 if kind == "images" else np.float32), shape)]
    if kind == "sets":
        inputs.append((np.dtype(np.bool_), shape[:1]))
    features = len(settings["names"]) + settings["presence"]
    return Signature(tuple(inputs), (settings["set_size"], features))


def _read_parts(path: Path, task: str) -> tuple[bytes, dict[str, Any]]:
    """The serialised program and the settings, every one that is used checked."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    data = read_bytes(path, limit=_MAX_BYTES[_PROGRAM])
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            settings = json.loads(_unzip(archive, _SETTINGS))
            program = _unzip(archive, _PROGRAM)
        if settings["format"] > FORMAT:
            raise UserError(
                f"{path}: of format {str(settings['format'])[:40]}, which a newer msdspn_jax wrote;"
                f" this one reads up to {FORMAT}"
            )
        made = "sets" if settings.get("task") == "sets" else "clevr"
        if made != task:
            how = "--data FILE" if made == "sets" else "IMAGE..."
            raise UserError(
                f"{path}: a program of msdspn train {made}, which is run by msdspn predict {how}"
            )
        for name, (expected, valid) in _VALID[task].items():
            if not valid(settings[name]):
                raise ValueError(f"{name}: expected {expected}, got {str(settings[name])[:80]}")
        if task == "sets" and len(settings["input_shape"]) != _AXES[settings["kind"]]:
            raise ValueError(f"input_shape: not one of {settings['kind']}")
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise half a dozen types for damaged files.
        raise UserError(
            f"{path}: not an exported program, or damaged ({str(error)[:300]})"
        ) from error
    layout = layout_settings() if task == "clevr" else {}
    if any(settings.get(name) != value for name, value in layout.items()):
        raise UserError(f"{path}: its features are not laid out as this version's are")
    return program, settings


def _unzip(archive: zipfile.ZipFile, name: str) -> bytes:
    """One part, of no more than its limit: a few bytes can unpack to gigabytes."""
    with archive.open(name) as file:
        data = file.read(_MAX_BYTES[name] + 1)
    if len(data) > _MAX_BYTES[name]:
        raise ValueError(f"{name} unpacks to more than {_MAX_BYTES[name]} bytes")
    return data


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(n, 1, 10**6) for n in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 1000 and all(
        isinstance(name, str) for name in value
    )  # fmt: skip


_AXES = {"images": 3, "vectors": 1, "sets": 2}
_OF_ALL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "set_size": ("1 to 1000", lambda x: _is_whole(x, 1, 1000)),
    "threshold": ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1),
    "platforms": ("a list", lambda x: isinstance(x, list)),
    "versions": ("an object", lambda x: isinstance(x, dict)),
}
#: What `predict` relies on in the settings of a program: what is expected, and whether it is so.
_VALID: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "clevr": {"size": ("1 to 4096", lambda x: _is_whole(x, 1, 4096))} | _OF_ALL,
    "sets": {
        "kind": ("images, vectors or sets", lambda x: isinstance(x, str) and x in _AXES),
        "input_shape": ("a list of numbers from 1 to 1000000", _is_shape),
        "names": ("a list of words", _are_names),
        "presence": ("true or false", lambda x: isinstance(x, bool)),
    }
    | _OF_ALL,
}


def _foreign(exported: export.Exported, settings: dict[str, Any]) -> str | None:
    """What a program has that none of our own exports has; None where there is nothing."""
    inputs, output = signature(settings)
    if (len(exported.in_avals), len(exported.out_avals)) != (len(inputs), 1):
        return "so many inputs or outputs"
    if exported.nr_devices != 1:
        return "so many devices"
    kinds = ["input"] * len(inputs) + ["output"]
    avals = (*exported.in_avals, *exported.out_avals)
    expectations = (*inputs, (np.dtype(np.float32), output))
    for kind, aval, (dtype, tail) in zip(kinds, avals, expectations, strict=True):
        if len(aval.shape) != 1 + len(tail) or aval.shape[1:] != tail or aval.dtype != dtype:
            expected = f"{dtype} [batch, {', '.join(map(str, tail))}]"
            return f"the {kind} {aval}; expected {expected}"
        if export.is_symbolic_dim(aval.shape[0]) is False:
            return f"the {kind} {aval}, which is of one batch size"
    call = jax.tree.structure(((0,) * len(inputs), {})), jax.tree.structure(0)
    if (exported.in_tree, exported.out_tree) != call:
        return f"the arguments {exported.in_tree} -> {exported.out_tree}"
    if exported.ordered_effects or exported.unordered_effects or exported.disabled_safety_checks:
        return "effects, or safety checks turned off"
    for operation, target in sorted(_operations(exported.mlir_module_serialized), key=str):
        if operation == "stablehlo.custom_call" and target not in _CUSTOM_CALLS:
            return f"the custom call {target!r}"
        if operation.split(".")[0] not in _DIALECTS or operation in _OUTSIDE:
            return f"the operation {operation}"
    return None


def _operations(module: bytes) -> set[tuple[str, str | None]]:
    """Every kind of operation in a serialised module; of custom calls also the target."""
    found: set[tuple[str, str | None]] = set()
    with mlir.make_ir_context() as context:

        def visit(operation: Any) -> ir.WalkResult:
            target = None
            if operation.name == "stablehlo.custom_call":
                target = ir.StringAttr(operation.attributes["call_target_name"]).value
            found.add((operation.name, target))
            return ir.WalkResult.ADVANCE

        stablehlo.deserialize_portable_artifact(context, module).operation.walk(visit)
    return found


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


def noise(settings: dict[str, Any], *, batch: int = 2) -> list[np.ndarray]:
    """Inputs of a program: pixels and numbers at random, all elements of a set there."""
    rng, arguments = np.random.default_rng(0), []
    for dtype, shape in signature(settings).inputs:
        if dtype == np.uint8:
            arguments.append(rng.integers(0, 256, (batch, *shape), np.uint8))
        elif dtype == np.bool_:
            arguments.append(np.ones((batch, *shape), bool))
        else:
            arguments.append(rng.normal(size=(batch, *shape)).astype(dtype))
    return arguments


def difference(program: Program, predict: Predict, arguments: Sequence[np.ndarray]) -> np.ndarray:
    """Largest absolute difference between program and model by feature, on this device.

    For a minimiser that has not converged, rounding can grow with every inner step: expect about
    1e-6 where the program runs on what it was traced on, more across devices.
    """
    pair = [np.asarray(jax.jit(f)(*arguments)) for f in (program.predict, predict)]
    return np.abs(pair[0] - pair[1]).max((0, 1))
