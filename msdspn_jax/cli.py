"""``msdspn``: finds the verb, then imports what that verb needs and nothing else."""

from __future__ import annotations

import importlib
import sys
import warnings

from msdspn_command import HELP, VERBS, show_usage

# These have a flag for the cache of compiled programs, or measure how long it takes to compile.
_OWN_CACHE = ("train", "grid", "evaluate", "bench")

#: Packages that the core does without: by the name of the module, what to install and which extra
#: of msdspn-jax brings it.
EXTRAS = {
    "PIL": ("pillow", "app"),
    "flatbuffers": ("flatbuffers", "app"),
    "matplotlib": ("matplotlib", "app"),
    "orbax": ("orbax-checkpoint", "app"),
    "rich": ("rich", "app"),
    "safetensors": ("safetensors", "app"),
    "sklearn": ("scikit-learn", "app"),
    "tensorboardX": ("tensorboardX", "app"),
    "tyro": ("tyro", "app"),
    "array_record": ("array_record", "clevr"),
    "grain": ("grain", "clevr"),
    "importlib_resources": ("importlib_resources", "clevr"),
    "tensorflow_datasets": ("tensorflow-datasets", "clevr"),
    "submitit": ("submitit", "slurm"),
    "wandb": ("wandb", "wandb"),
}


def missing_package(error: BaseException | None) -> str | None:
    """Which package of an extra an error is about, and how to install it; None for others."""
    while error is not None:
        # Some libraries raise an error of their own from the one that names the module.
        module = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
        if module in EXTRAS:
            package, extra = EXTRAS[module]
            return f"{package}: pip install 'msdspn-jax[{extra}]'"
        error = error.__cause__
    return None


def main(argv: list[str] | None = None) -> int:
    """Run ``msdspn``; returns the exit code (0 good, 2 user error, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in HELP:
        return show_usage(argv)
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        from msdspn_jax import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"msdspn: no verb {verb!r}.{hint} See msdspn --help.", file=sys.stderr)
        return 2
    from msdspn_jax._cache import enable_compilation_cache
    from msdspn_jax._memory import keep_freed_memory
    from msdspn_jax.errors import UserError

    keep_freed_memory()
    if verb not in _OWN_CACHE:
        enable_compilation_cache()
    show_as_ever = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if category is not UserWarning:  # Deprecations and the like: for developers, with the line.
            return show_as_ever(message, category, filename, lineno, file, line)
        print(f"msdspn {verb}: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        return importlib.import_module(f"msdspn_jax.commands.{verb}").main(rest)
    except UserError as error:
        print(f"msdspn {verb}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        print(f"msdspn {verb} needs {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"msdspn {verb}: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.showwarning = show_as_ever


if __name__ == "__main__":
    sys.exit(main())
