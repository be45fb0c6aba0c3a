"""The flags every experiment shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import optax


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags that every experiment shares; a task's ``Config`` inherits them and adds its own.

    Subclass with ``@dataclass(frozen=True, kw_only=True)``, give every field a default (the
    published value) and a docstring (it becomes the flag's help).
    """

    # Fields that change how a run is carried out, never its numbers: free to differ on resuming.
    operational: ClassVar[frozenset[str]] = frozenset(
        [
            "run_dir",
            "resume",
            "allow_config_change",
            "log_every",
            "evaluate_every",
            "figures_every",
            "checkpoint_every",
            "keep_checkpoints",
            "steps_per_dispatch",
            "parallel",
            "compilation_cache",
            "tensorboard",
            "wandb",
            "progress",
            "distributed",
            "coordinator",
            "num_processes",
            "process_id",
            "heartbeat_timeout",
        ]
    )

    seed: int = 0
    """Everything random follows from it: initial parameters, data, order, noise."""
    steps: int = 20_000
    """Training steps (one step: one batch)."""
    batch_size: int = 128
    """Examples a step, over all devices together."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""

    run_dir: str | None = None
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, figures/.
    Default: runs/TASK-DATE-TIME."""
    resume: bool = False
    """Go on from the newest good checkpoint in --run-dir (start anew if there is none). Flags that
    are not given are those the run began with."""
    allow_config_change: bool = False
    """Let --resume go on although flags that change the numbers differ."""

    replicates: int = 1
    """Train this many seeds (seed, seed + 1, …) at once, side by side on one device; metrics are
    their mean, with the standard deviation beside it as NAME_std."""

    log_every: int = 100
    """Steps between lines for the training split in metrics.jsonl (means since the last line)."""
    evaluate_every: int = 1000
    """Steps between evaluations on the validation split (and one at the end)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (and one at the end). The best by validation is always kept."""
    figures_every: int = 0
    """Steps between pictures of predictions (figures/, TensorBoard); 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep, besides the best."""
    steps_per_dispatch: int = 50
    """At most this many steps run on the device without returning to Python. Never changes the
    numbers."""

    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start is fast
    (MSDSPN_COMPILATION_CACHE=FOLDER puts them elsewhere, =off turns it off)."""

    parallel: Literal["none", "shard-map", "pmap"] = "none"
    """How to use several devices: each takes an equal share of the batch. The numbers are those of
    one device (up to the order of floating-point sums)."""
    distributed: bool = False
    """Several machines: let JAX find the others (SLURM, TPU pods, GKE)."""
    coordinator: str | None = None
    """Several machines without a scheduler: host:port of process 0."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which one this is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds after which a silent process is taken for dead and the others stop."""

    skip_bad_steps: int = 0
    """Leave out up to this many steps whose loss or gradient is not finite, and count them; beyond
    that, and by default at the first, the run stops."""
    max_inner_energy: float = 1e6
    """Stop when the energy after the inner steps exceeds this: the inner loop is diverging."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install 'msdspn-jax[wandb]')."""
    progress: bool = True
    """A live progress line on a terminal; elsewhere, a plain line now and then."""

    def __post_init__(self) -> None:
        positive = (
            "batch_size",
            "learning_rate",
            "replicates",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "steps_per_dispatch",
            "max_inner_energy",
            "heartbeat_timeout",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("steps", "skip_bad_steps", "figures_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON can hold them."""
        return dataclasses.asdict(self)

    def numerical(self) -> dict[str, Any]:
        """The fields that determine the numbers of a run: what --resume insists on."""
        return {k: v for k, v in self.to_dict().items() if k not in self.operational}


def adam(config: TrainConfig) -> optax.GradientTransformation:
    """Adam at the constant ``config.learning_rate``: the outer optimiser of the paper (4.1-4.3)."""
    return optax.adam(config.learning_rate)
