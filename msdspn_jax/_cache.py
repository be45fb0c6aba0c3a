"""Compiled programs kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
