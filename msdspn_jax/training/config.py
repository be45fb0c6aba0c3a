"""The settings that every experiment shares, in groups; the command line shows them as such."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from msdspn_jax import _check

T = TypeVar("T")

OPERATIONAL = ("run", "devices")
"""The groups that say how a run is carried out and never change its numbers: they may differ when
it is resumed."""
_UNPREFIXED = (*OPERATIONAL, "safety")
"""The groups whose flags do without the group's name: --resume, not --run.resume."""


Resume = bool | Literal["auto"]
"""Whether to go on with a run that is there; "auto": begin it if it is not."""


def _resume_of(words: list[str]) -> Resume:
    values: dict[str, Resume] = {"": True, "yes": True, "no": False, "auto": "auto"}
    text = " ".join(words)
    if text not in values:
        raise ValueError(f"expected nothing, yes, no or auto, got {text!r}")
    return values[text]


# --resume alone is yes.
RESUME_FLAG = tyro.constructors.PrimitiveConstructorSpec[Resume](
    nargs="*",
    metavar="[yes|no|auto]",
    instance_from_str=_resume_of,
    is_instance=lambda value: isinstance(value, bool) or value == "auto",
    str_from_instance=lambda value: ["auto" if value == "auto" else "yes" if value else "no"],
)


def require_at_least(least: int, config: Any, *names: str) -> None:
    """Refuse fields of a configuration that are no integers of this size."""
    for name in names:
        _check.require_integer(name, getattr(config, name), least)


def require_words(config: Any) -> None:
    """Refuse fields that hold none of the words they may, and what is neither true nor false.

    The command line checks them itself; recipes, records and callers may say anything.
    """
    for name, (words, truth) in _choices(type(config)).items():
        value = getattr(config, name)
        if (truth and isinstance(value, bool)) or (not isinstance(value, bool) and value in words):
            continue
        listed = [repr(word) for word in words] + ["True", "False"] * truth
        raise ValueError(f"{name}: expected one of {', '.join(listed)}, got {value!r}")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """By field, the words that it may hold and whether it may be true or false."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # Types of somebody's own that are not to be found here.
        return {}
    found = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        words: list[Any] = []
        for option in options:
            if typing.get_origin(option) is Literal:
                words += typing.get_args(option)
            elif option is type(None):
                words.append(None)
            elif option is not bool:
                break
        else:
            found[field.name] = (tuple(words), bool in options)
    return found


def require_positive(config: Any, *names: str) -> None:
    """Refuse fields of a configuration that are not above zero."""
    for name in names:
        _check.require_positive(name, getattr(config, name))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is written while training, and how often."""

    dir: Annotated[str | None, tyro.conf.arg(name="run-dir")] = None
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, figures/.
    Default: runs/TASK-DATE-TIME."""
    resume: Annotated[Resume, RESUME_FLAG] = False
    """Go on with the run in --run-dir from its newest good checkpoint; auto: begin it if there is
    none yet. Flags that are not given, but for those of devices, are those the run began with."""
    allow_config_change: bool = False
    """Let --resume go on although flags that change the numbers differ."""
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
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install 'msdspn-jax[wandb]')."""
    progress: bool = True
    """A live progress line on a terminal; elsewhere, a plain line now and then."""

    def __post_init__(self) -> None:
        require_words(self)
        for name in ("log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            require_at_least(1, self, name)
        require_at_least(0, self, "figures_every")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """On which devices and machines a run is carried out."""

    parallel: Literal["none", "shard-map", "pmap"] = "none"
    """How to use several devices: each takes an equal share of the batch. The numbers are those of
    one device (up to the order of floating-point sums)."""
    steps_per_dispatch: int = 50
    """At most this many steps run on the device without returning to Python. Never changes the
    numbers."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start is fast
    (MSDSPN_COMPILATION_CACHE=FOLDER puts them elsewhere, =off turns it off)."""
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

    def __post_init__(self) -> None:
        require_words(self)
        for name in ("steps_per_dispatch", "heartbeat_timeout"):
            require_at_least(1, self, name)


@dataclass(frozen=True, kw_only=True)
class Safety:
    """When a run stops by itself."""

    skip_bad_steps: int = 0
    """Leave out up to this many steps whose loss or gradient is not finite, and count them; beyond
    that, and by default at the first, the run stops."""
    max_inner_energy: float = 1e6
    """Stop when the energy after the inner steps exceeds this: the inner loop is diverging."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "skip_bad_steps")
        require_positive(self, "max_inner_energy")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The outer optimiser, which changes the parameters. The defaults are as published."""

    optimizer: Literal["adam", "muon"] = "adam"
    """muon: orthogonalised momentum for every weight matrix and convolution, Adam for the rest. It
    wants a learning rate of about 0.01."""
    schedule: Literal["published", "constant", "cosine", "linear"] = "published"
    """How the learning rate falls: as published for the experiment, not at all, or to zero at the
    end along half a cosine wave or a line."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero (not with schedule published)."""
    decay_steps: int | None = None
    """The last so many steps are those over which cosine or linear fall. Default: all after the
    warm-up."""
    weight_decay: float = 0.0
    """Share of the weights taken away at each step, times the learning rate."""
    momentum: float | None = None
    """Muon's momentum, or Adam's first. Default: 0.95 and 0.9."""
    max_grad_norm: float = math.inf
    """Longer gradients are shortened to this."""
    average: float = 0.0
    """Decay of the running average of the weights that is evaluated and exported, such as 0.999
    (less at first: (1 + step) / (10 + step)). 0: the weights themselves."""

    def __post_init__(self) -> None:
        require_words(self)
        require_at_least(0, self, "warmup_steps")
        require_positive(self, "max_grad_norm")
        for name in ("average", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay!r}")
        if self.decay_steps is not None:
            require_at_least(1, self, "decay_steps")
            if self.schedule in ("published", "constant"):
                raise ValueError(
                    f"decay_steps: expected none with schedule {self.schedule} (try cosine or"
                    f" linear), got {self.decay_steps}"
                )
        if self.schedule == "published" and self.warmup_steps:
            raise ValueError(
                "warmup_steps: expected 0 with schedule published (try constant or cosine), got"
                f" {self.warmup_steps}"
            )


RunFlags = Annotated[Run, tyro.conf.OmitArgPrefixes]
DeviceFlags = Annotated[Devices, tyro.conf.OmitArgPrefixes]
SafetyFlags = Annotated[Safety, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags that every experiment shares; a task's ``Config`` inherits them and adds its own.

    Subclass with ``@dataclass(frozen=True, kw_only=True)``, give every field a default (the
    published value, or None where that depends on other fields) and a docstring (it becomes the
    flag's help).
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    """Fields on which what was trained rests, so that no run can go on with another value."""

    seed: int = 0
    """Everything random follows from it: initial parameters, data, order, noise."""
    steps: int = 20_000
    """Training steps (one step: one batch)."""
    batch_size: int = 128
    """Examples a step, over all devices together."""
    learning_rate: float | None = None
    """The highest learning rate. Default: as published for Adam, 1e-3; 0.01 for Muon."""
    outer: Outer = Outer()
    """What changes the parameters, and how fast. Default: Adam, as published."""
    init_from: str | None = None
    """Begin with the weights of this model (a .safetensors file of `msdspn export`); those whose
    shapes differ begin anew, and are named. Default: begin with random weights."""
    replicates: int = 1
    """Train this many seeds (seed, seed + 1, …) at once, side by side on one device; metrics are
    their mean, with the standard deviation beside it as NAME_std."""
    run: RunFlags = Run()
    """What is written while training, and how often; never changes the numbers."""
    devices: DeviceFlags = Devices()
    """On which devices and machines; never changes the numbers."""
    safety: SafetyFlags = Safety()
    """When a run stops by itself."""

    def __post_init__(self) -> None:
        require_words(self)
        for name in ("batch_size", "replicates"):
            require_at_least(1, self, name)
        require_at_least(0, self, "seed")
        if self.seed + self.replicates > 2**32:  # JAX's keys would begin at 0 again.
            raise ValueError(f"seed: expected less than 2³², got {self.seed}")
        if self.batch_size >= 2**31:
            raise ValueError(f"batch_size: expected less than 2³¹, got {self.batch_size}")
        require_at_least(0, self, "steps")
        if self.learning_rate is not None:
            require_positive(self, "learning_rate")

    def remarks(self) -> list[str]:
        """What the user should know of these flags, said as training begins."""
        return []

    def published_learning_rate(self) -> float:
        """What None as the learning rate stands for."""
        return 1e-3

    def resolved_learning_rate(self) -> float:
        """The learning rate, as published unless it is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-2 if self.outer.optimizer == "muon" else self.published_learning_rate()

    def completed(self: T) -> T:
        """These settings with what only the data can say, for tasks that ask their data.

        Called once, when a run begins: from then on config.json says it.
        """
        return self

    def resolved(self: T) -> T:
        """These settings with what is left open filled in, so that equal runs are equal."""
        return dataclasses.replace(self, learning_rate=self.resolved_learning_rate())  # type: ignore

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, groups as dictionaries of their own, as JSON can hold them."""
        return _to_json(self)

    def places(self) -> tuple[str, ...]:
        """Fields that say where something lies, and never change the numbers."""
        return ()

    def numerical(self) -> dict[str, Any]:
        """`to_dict` without the groups that never change the numbers."""
        return {k: v for k, v in self.to_dict().items() if k not in OPERATIONAL}


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The configuration of which `TrainConfig.to_dict` made ``values``.

    Raises:
        ValueError, TypeError: a field that the type does not have, or a value that is not valid.
    """
    return with_values(config_type(), values)


def as_flags(values: dict[str, Any]) -> dict[str, Any]:
    """The values of `TrainConfig.to_dict` by flag, as a user types it: "--inner.num-steps"."""
    flags = {}
    for name, value in values.items():
        group = value if isinstance(value, dict) else {None: value}
        for inner, x in group.items():
            if (name, inner) == ("run", "dir"):
                words = "run-dir"
            elif inner is None or name in _UNPREFIXED:
                words = inner or name
            else:
                words = f"{name}.{inner}"
            flags["--" + words.replace("_", "-")] = x
    return flags


def _to_json(value: Any) -> Any:
    # An adjoint is written as the word that the command line takes for it.
    if dataclasses.is_dataclass(value) and not hasattr(value, "wrap"):
        fields = dataclasses.fields(value)
        return {field.name: _to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_to_json(x) for x in value]
    return str(value)


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """A configuration with the fields that ``values``, as of `TrainConfig.to_dict`, names.

    Raises:
        ValueError, TypeError: as `from_dict`.
    """
    kind = type(config)
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(
            f"{kind.__name__}: expected fields that this version of msdspn_jax knows,"
            f" got {', '.join(unknown)}"
        )
    hints = typing.get_type_hints(kind)

    def parse(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return with_values(getattr(config, name), value)
        if isinstance(value, list):
            return tuple(value)
        if isinstance(value, str) and float in (hints[name], *typing.get_args(hints[name])):
            return float(value)
        return value

    return dataclasses.replace(config, **{k: parse(k, v) for k, v in values.items()})
