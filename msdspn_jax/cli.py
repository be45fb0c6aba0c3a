"""``msdspn``: finds the verb, then imports what that verb needs and nothing else."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "train": "train a model: msdspn train TASK",
    "evaluate": "score a trained run on its validation and test splits",
    "show": "summary of a run: settings, metrics, figures",
    "grid": "train many settings of one task, skipping what is finished",
    "report": "tables and charts of a task, ours beside the published",
    "data": "prepare and check data sets",
    "predict": "find the objects in images: pictures and a CLEVR scenes file",
    "export": "a trained model as one file, or as a program without its code",
    "render": "render CLEVR-like scenes",
    "bench": "measure time and memory, beside other libraries",
    "demo": "digits as sets, trained and drawn in under two minutes",
}

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

EPILOG = """\
Start here:
  msdspn demo                                     see it work on real digits
  msdspn train random-sets --set-size 4 --set-dim 4 --inner.num-steps 10 --steps 1000
  msdspn train TASK --help                        every flag of an experiment
  msdspn show RUN                                 look at a run folder
"""


def usage() -> str:
    """The text of ``msdspn --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return f"""\
usage: msdspn VERB ...

Set prediction with multiset-equivariant networks (DSPN, iDSPN) in JAX.

Verbs (each has its own --help):
{verbs}

{EPILOG}"""


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
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if argv else 2
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
    from msdspn_jax._memory import keep_freed_memory
    from msdspn_jax.errors import UserError

    keep_freed_memory()
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


if __name__ == "__main__":
    sys.exit(main())
