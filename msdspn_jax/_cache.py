"""Compiled programs kept between runs, and traced ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    import jax

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


def traced_once(function: Callable[..., Any], name: str, *settings: Any) -> Callable[..., Any]:
    """``jax.jit(function)``, traced at most once on this machine where a cache is kept.

    Short commands take longer to trace than to run. The traced program is kept beside the compiled
    ones (`enable_compilation_cache`), under a name made of all that it depends on: ``name`` and
    ``settings``, the shapes of the arguments, the files of this package, JAX's version, platform
    and number types. Whatever is wrong with the file, the function is traced as ever.

    Args:
        function: of arrays, without side effects.
        name: which function this is.
        settings: all that it closes over, each with a ``repr`` that says what it is.
    """
    import jax
    import jax.export

    traced = jax.jit(function)
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not folder:
        return traced

    def call(*arguments: Any) -> Any:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.dtypes.result_type(x)), arguments
        )
        path = _file(folder, "traced", name, settings, str(shapes))
        try:
            exported = jax.export.deserialize(bytearray(path.read_bytes()))
        except Exception:  # Not there, or damaged: flatbuffers raises many types.
            try:
                exported = jax.export.export(traced)(*shapes)
                write_bytes(path, bytes(exported.serialize()))
            except Exception:  # A full disk, or what cannot be written down.
                return traced(*arguments)
        return jax.jit(exported.call)(*arguments)

    return call


def shapes_once(function: Callable[..., Any], name: str, *settings: Any) -> Any:
    """``jax.eval_shape`` of a function of a key, kept as `traced_once` keeps programs.

    Args:
        function: ``key -> nested dictionaries of arrays``.
        name: which function this is.
        settings: all that it closes over.
    """
    import jax

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


def _file(folder: str, kind: str, *what: Any) -> Path:
    """A name made of all that a traced program depends on."""
    import jax

    facts = (
        what,
        _package_files(),
        jax.__version__,
        jax.default_backend(),
        jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    )
    return Path(folder) / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()}"


def _package_files() -> list[tuple[str, int, int]]:
    """Name, size and time of the package's files: another version traces another program."""
    found = []
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        status = file.stat()
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
