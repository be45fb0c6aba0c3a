"""The command ``msdspn``: its help, and the way to the rest.

A module of its own, because to import anything of ``msdspn_jax`` is to import JAX. Help need not
wait for that.
"""

from __future__ import annotations

import os
import sys

HELP = ("-h", "--help", "help")

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
    "demo": "what predicting sets is about, in two minutes and one picture",
}

EPILOG = """\
Start here:
  msdspn demo                                     see it work
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


def show_usage(argv: list[str]) -> int:
    """Print what there is; returns the exit code: 2 where nobody asked for it."""
    print(usage(), end="")
    return 0 if argv else 2


def main() -> int:
    """Run ``msdspn``; returns the exit code."""
    try:
        try:
            return _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has had enough, as in `msdspn train --help | head`. Python would
        # try to write the rest once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell says of a program that this signal (SIGPIPE) ended


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        return show_usage(argv)
    from msdspn_jax import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
