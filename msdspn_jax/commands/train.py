"""``msdspn train TASK``: train an experiment."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from msdspn_jax import tasks
from msdspn_jax.errors import UserError, origin

HELP = """\
usage: msdspn train TASK [flags]

Train an experiment and write a run folder: settings, metrics, checkpoints, figures.

Tasks:
{tasks}
  FILE.py, or package.module: a task of your own, with Config and build

Every flag of a task, with its default (the published value):
  msdspn train TASK --help

Examples:
  msdspn train random-sets --set-size 4 --set-dim 4 --inner.num-steps 10 --steps 1000
  msdspn train digits --model dspn --loss chamfer --run-dir runs/digits-dspn
  msdspn train digits --run-dir runs/digits-dspn --resume        go on with that run
  msdspn train digits --run-dir runs/digits --resume auto        begin it, or go on with it
  msdspn train clevr --recipe fast                   settings from a file; flags beside it win
  msdspn train sets --data boxes.npz                 data of your own
  msdspn train random-sets --replicates 8            eight seeds at once, mean ± deviation
  msdspn train random-sets --parallel shard-map      all devices of this machine
  msdspn train random-sets --distributed             all machines of a SLURM job or TPU pod

"""
RECIPE_HELP = """\
--recipe NAME takes settings from one of the task's recipes ({names}), or from a .toml file; flags
beside it win."""
AFTERWARDS = "Afterwards:   msdspn show RUN\n"
# The package of that name; msdspn-jax needs only the one that writes its files.
WATCH = "Watch a run:  tensorboard --logdir RUN\n"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code (0, or 128 + signal when one ended the run early)."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, tasks.TASKS))
        listing = "\n".join(f"  {n:<{width}}  {task.help}" for n, task in tasks.TASKS.items())
        watch = WATCH if importlib.util.find_spec("tensorboard") else ""
        print(HELP.format(tasks=listing) + watch + AFTERWARDS, end="")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    config = parse(name, rest)
    return train(name, config)


def parse(name: str, argv: list[str]) -> Any:
    """The configuration that the flags ask for.

    With ``--resume``, what neither a flag nor a recipe says is as the run was begun.

    Raises:
        UserError: there is no run to go on with; or values that do not go together.
    """
    from msdspn_jax.commands import flags
    from msdspn_jax.tasks import recipes
    from msdspn_jax.training import run_folder

    module = tasks.load(name)
    name = tasks.canonical(name)
    argv, recipe = _without("--recipe", argv)
    default = None
    run_dir = _value_of("--run-dir", argv)
    # Before the flags are checked: those that are not given come from the run.
    asked = any(word == "--resume" or word.startswith("--resume=") for word in argv)
    word = _value_of("--resume", argv) or "yes"
    if asked and run_dir is not None and (word == "yes" or word.startswith("-")):
        run_folder.require_run(run_dir)
    if asked and run_dir is not None and run_folder.is_run(run_dir):
        from msdspn_jax.trained.run import read_config
        from msdspn_jax.training.config import Devices

        begun_as, saved = read_config(run_dir)
        if begun_as != name:
            raise UserError(f"{run_dir} is a run of {begun_as}, not of {name}")
        # Where and how a run is gone on with is asked for anew each time.
        run = dataclasses.replace(saved.run, resume=False, allow_config_change=False)
        default = dataclasses.replace(saved, run=run, devices=Devices())
    if recipe is not None:
        default = recipes.read(module, recipe, default=default)
    known = ", ".join(recipes.names(module)) or "it has none"
    paragraphs = (inspect.getdoc(module.Config) or "").split("\n\n")
    text = "\n\n".join(" ".join(x.split()) for x in [*paragraphs, RECIPE_HELP.format(names=known)])
    config = flags.parse(
        module.Config, argv, prog=f"msdspn train {tasks.word(name)}", description=text,
        default=default,
    )  # fmt: skip
    config = config.completed()
    if config.run.resume and config.run.dir is None:
        raise UserError("--resume needs --run-dir RUN: which run to go on with")
    if config.run.dir is None and (
        config.devices.distributed or config.devices.coordinator is not None
    ):
        raise UserError("several machines need --run-dir: one folder that all of them can see")
    if config.run.dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = dataclasses.replace(config.run, dir=f"runs/{tasks.word(name)}-{stamp}")
        config = dataclasses.replace(config, run=run)
    return config


def _value_of(flag: str, argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        # As tyro reads it.
        if name.replace("_", "-") == flag:
            return value if equals else next(iter(argv[i + 1 :]), None)
    return None


def _without(flag: str, argv: list[str]) -> tuple[list[str], str | None]:
    """The other words, and the value of a flag that no configuration has."""
    value = _value_of(flag, argv)
    if value is None:
        return argv, None
    if flag in argv:
        at = argv.index(flag)
        return argv[:at] + argv[at + 2 :], value
    return [word for word in argv if not word.startswith(flag + "=")], value


def train(name: str, config: Any) -> int:
    """Train with a finished configuration; returns the exit code."""
    from msdspn_jax._cache import enable_compilation_cache
    from msdspn_jax.training.parallel import distributed_arguments, start_distributed
    from msdspn_jax.training.supervise import supervise

    if distributed_arguments(config) is not None:
        code = supervise("msdspn train")
        if code is not None:
            return code
    start_distributed(config)
    if config.devices.compilation_cache:
        enable_compilation_cache()
    import jax

    from msdspn_jax.training.failures import LostPeer
    from msdspn_jax.training.loop import train as run_training
    from msdspn_jax.training.run_folder import steps_in

    try:
        task = tasks.build(name, config)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{error}{origin(error)}") from error
    leader = jax.process_index() == 0
    goes_on = config.run.resume and steps_in(Path(config.run.dir) / "checkpoints")
    if config.init_from is not None and not goes_on:
        from msdspn_jax.trained.weights import start_from

        task, left = start_from(task, config.init_from)
        if leader and left:
            print(f"begun anew, not from {config.init_from}: {', '.join(left)}", file=sys.stderr)
    if leader:
        print(f"run folder: {config.run.dir}", file=sys.stderr)
    try:
        outcome = run_training(task, config)
    except LostPeer as error:
        print(f"msdspn train: {error}", file=sys.stderr, flush=True)
        # The usual way out waits for the process that is gone.
        os._exit(2)
    if outcome.signal is not None:
        return 128 + int(signal.Signals(outcome.signal))
    if leader:
        if outcome.metrics:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in outcome.metrics.items())
            print(f"validation: {shown}")
        print(f"run folder: {config.run.dir}   (msdspn show {config.run.dir})")
    return 0
