"""Compiled programs kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from msdspn_jax._cores import num_cores
from msdspn_jax._files import write_bytes

VARIABLE = "MSDSPN_COMPILATION_CACHE"


def user_cache_folder() -> Path:
    """Where this user's caches belong on this system."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "msdspn_jax"


def enable_compilation_cache() -> Path | None:
    """Turn JAX's persistent compilation cache on; returns its folder.

    None where it stays off: ``MSDSPN_COMPILATION_CACHE=off``, a cache that JAX has been told of
    already, or a folder that cannot be made.
    """
    asked = os.environ.get(VARIABLE)
    if asked == "off" or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    folder = Path(asked) if asked else user_cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a command of two seconds has dozens.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def compiled_once(function: Callable[..., Any], name: str, *settings: Any) -> Callable[..., Any]:
    """``jax.jit(function)``, compiled at most once on this machine where a cache is kept.

    Short commands take longer to trace and to lower than to run, and JAX's own cache needs both
    done to know its entry. So the executable is kept beside those (`enable_compilation_cache`),
    under a name made of all that it depends on: ``name`` and ``settings``, the arguments' shapes,
    the files of this package, versions, processor and flags. Whatever is wrong with the file, the
    function is compiled as ever. As JAX's cache, the folder holds native code: it is this user's.

    Args:
        function: of arrays, without side effects; it runs on the first device.
        name: which function this is.
        settings: all that it closes over, each with a ``repr`` that says what it is.
    """
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    compiled = jax.jit(function)
    if not folder:
        return compiled
    programs: dict[str, Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.dtypes.result_type(x)), arguments
        )
        key = str(shapes)
        if key not in programs:
            path = _file(folder, "program", name, settings, key, _machine())
            with contextlib.suppress(Exception):  # Not there, damaged, foreign: many types.
                program = _unpacked(path.read_bytes())
                result = jax.block_until_ready(program(*arguments))
                programs[key] = program
                return result
            made = _compiled(compiled.lower(*shapes))
            programs[key] = made
            with contextlib.suppress(Exception):  # A full disk, or what cannot be written down.
                data = pickle.dumps(serialize_executable.serialize(made))
                # What came from a file once lacks parts when it is written again, which shows only
                # when it runs.
                jax.block_until_ready(_unpacked(data)(*arguments))
                write_bytes(path, data)
        return programs[key](*arguments)

    return call


def _unpacked(data: bytes) -> Callable[..., Any]:
    # Our own file, in a folder of native code: to unpickle it risks nothing more.
    parts = pickle.loads(data)
    return serialize_executable.deserialize_and_load(*parts, execution_devices=jax.devices()[:1])


def _compiled(lowered: Any) -> Any:
    """Compile, and keep it out of JAX's own cache, from which it could not be written again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)


def _machine() -> tuple[Any, ...]:
    """What an executable depends on beside its program: processor, accelerator, flags."""
    device = jax.devices()[0]
    features = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):  # A home folder may be shared by unequal machines.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    version = device.client.platform_version
    return features, num_cores(), device.device_kind, version, os.environ.get("XLA_FLAGS")


def shapes_once(function: Callable[..., Any], name: str, *settings: Any) -> Any:
    """``jax.eval_shape`` of a function of a key, kept as `compiled_once` keeps programs.

    Args:
        function: ``key -> nested dictionaries of arrays``.
        name: which function this is.
        settings: all that it closes over.
    """

    def written(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: written(value) for key, value in tree.items()}
        return [list(tree.shape), str(tree.dtype)]

    def read(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: read(value) for key, value in tree.items()}
        return jax.ShapeDtypeStruct(tuple(tree[0]), tree[1])

    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    path = _file(folder, "shapes", name, settings) if folder else None
    try:
        return read(json.loads(path.read_text()))  # pyright: ignore[reportOptionalMemberAccess]
    except Exception:  # No cache, not in it, or damaged.
        shapes = jax.eval_shape(function, jax.random.key(0))
    if path is not None:
        with contextlib.suppress(OSError):
            write_bytes(path, json.dumps(written(shapes)).encode())
    return shapes


# Settings of JAX that make another program of the same function.
_TRACED = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)


def _file(folder: str, kind: str, *what: Any) -> Path:
    """A name made of all that the trace of a function depends on."""
    facts = (
        what,
        _package_files(),
        jax.__version__,
        jax.default_backend(),
        *(getattr(jax.config, name) for name in _TRACED),
    )
    return Path(folder) / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()}"


def _package_files() -> list[tuple[str, int, int]]:
    """Name, size and time of the package's files: another version traces another program."""
    found = []
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        status = file.stat()
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
