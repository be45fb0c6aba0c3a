"""What the configurations of all tasks have in common: a model, and its inner minimisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from msdspn_jax.adjoints import Unrolled, identity
from msdspn_jax.models.inner import ENERGY_MODELS, Inner, published_inner
from msdspn_jax.training.config import TrainConfig

Config = TypeVar("Config", bound="TaskConfig")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TrainConfig):
    """Flags of an experiment whose models may decode by minimising an energy."""

    experiment: ClassVar[str]
    """Its name, as `published_inner` knows it."""
    unread: ClassVar[dict[str, tuple[str, ...]]] = {}
    """By model, the fields that it does not read."""

    model: str = "idspn"
    """idspn: differentiate at the minimum (implicitly); dspn: through all inner steps."""
    inner: Inner = Inner()  # noqa: RUF009 (a value)
    """The inner minimisation of idspn and dspn. Default: as published for the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        adjoint = self.inner.adjoint
        if adjoint is None or not self.minimises:
            return
        if isinstance(adjoint, Unrolled) != (self.model == "dspn"):
            wanted = "unrolled" if self.model == "dspn" else "an implicit one"
            raise ValueError(f"adjoint: expected {wanted} for model {self.model}, got {adjoint}")

    @property
    def minimises(self) -> bool:
        """Whether the model decodes by minimising; the others have no inner loop."""
        return self.model in ENERGY_MODELS

    def remarks(self) -> list[str]:
        """See `TrainConfig.remarks`."""
        reasons = dict.fromkeys(self.unread.get(self.model, ()), f"the model {self.model}")
        if not self.minimises:
            reasons["inner"] = f"the model {self.model}"
        if getattr(self, "fresh", False):
            reasons |= dict.fromkeys(("train_size", "images_on"), "--fresh")
        reasons |= self.idle()
        default = {f.name: f.default for f in dataclasses.fields(self)}
        straight = self.inner.adjoint == identity(straight_through=True)
        idle = straight and self.minimises and self.resolved_inner().projection == "none"
        said = ["warning: --inner.adjoint: straight-through is identity without a projection"]
        return said * idle + [
            f"warning: --{name.replace('_', '-')}: {reason} does not use it"
            for name, reason in reasons.items()
            if name in default and getattr(self, name) != default[name]
        ]

    def idle(self) -> dict[str, str]:
        """Fields that other flags leave without effect, and by which flag."""
        return {}

    def resolved_inner(self) -> Inner:
        """The inner minimisation, as published where nothing else is said."""
        return self.inner.or_else(published_inner(self.experiment, self.model))

    def resolved(self: Config) -> Config:
        """See `TrainConfig.resolved`."""
        inner = self.resolved_inner() if self.minimises else self.inner
        return dataclasses.replace(super().resolved(), inner=inner)

    def stages(self) -> Callable[[int], int | None]:
        """``step -> inner steps`` of training (`Task.stage`); None where there is no inner loop."""
        if not self.minimises:
            return lambda step: None
        inner, steps = self.resolved_inner(), max(self.steps, 1)
        return lambda step: inner.steps_at(step / steps)

    @property
    def steps_at_evaluation(self) -> int | None:
        """Inner steps at evaluation; None for models without an inner loop."""
        return self.resolved_inner().steps_at_evaluation if self.minimises else None

    @property
    def at_evaluation(self) -> dict[str, Any]:
        """The options of a `SetDecoder` at evaluation; none for models without an inner loop."""
        if not self.minimises:
            return {}
        inner = self.resolved_inner()
        return {"num_steps": inner.steps_at_evaluation, "num_starts": inner.eval_num_starts}
