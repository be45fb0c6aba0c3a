"""What older versions wrote, in the words of this one."""

from __future__ import annotations

import dataclasses
from typing import Any

from msdspn_jax.adjoints import Unrolled, parse_adjoint
from msdspn_jax.models.inner import ENERGY_MODELS, Inner, published_inner
from msdspn_jax.training.config import Devices, Run, Safety

#: Fields of 0.1.0 that are now settings of the inner minimisation.
INNER = {
    "inner_steps": "num_steps",
    "late_inner_steps": "late_num_steps",
    "eval_inner_steps": "eval_num_steps",
    "inner_learning_rate": "step_size",
    "momentum": "momentum",
    "inner_momentum": "momentum",
    "max_grad_norm": "max_grad_norm",
    "max_inner_grad_norm": "max_grad_norm",
    "backward": "adjoint",
    "gradient": "adjoint",
    "pool": "pool",
    "proximity": "proximity",
}
_GROUPS = {"run": Run, "devices": Devices, "safety": Safety}


def modernise(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as `training.config.from_dict` reads it, from one of any version.

    Args:
        task: the word on the command line.
        values: of config.json, or of the metadata of a weights file.
    """
    if task in ("clevr", "sets"):  # Image encoders had none before there was this field.
        values = {"encoder_end_norm": False} | values
    if isinstance(values.get("safety"), dict):
        return values
    # Version 0.1.0, whose configurations were flat.
    new: dict[str, Any] = {
        name: {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
        for name, group in _GROUPS.items()
    }
    new["run"]["dir"] = values.get("run_dir")
    placed = {"run_dir", *INNER, *(name for group in _GROUPS for name in new[group])}
    new |= {name: value for name, value in values.items() if name not in placed}
    inner = {INNER[k]: v for k, v in values.items() if k in INNER and v not in (None, "auto")}
    model = values.get("model", "idspn")
    if model in ENERGY_MODELS:
        new["model"], new["inner"] = _consistent(task, model, inner)
    # Zero was "as published" and, as None was for numbering, "fresh data at every step".
    if values.get("learning_rate") == 0:
        new["learning_rate"] = None
    if task in ("numbering", "clevr") and not values.get("train_size", 1):
        del new["train_size"]
        new["fresh"] = values.get("data", "procedural") == "procedural"
    return new


def flag_now(name: str) -> str | None:
    """The flag that took the place of a field of 0.1.0, or None."""
    return f"--inner.{INNER[name].replace('_', '-')}" if name in INNER else None


def _consistent(task: str, model: str, inner: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model that the adjoint names: 0.1.0 let some models have one of the other kind."""
    text = inner.get("adjoint")
    if text is None or isinstance(parse_adjoint(text), Unrolled) == (model == "dspn"):
        return model, inner
    settings = Inner(**inner).or_else(published_inner(task, model))
    other = "idspn" if model == "dspn" else "dspn"
    return other, {f.name: getattr(settings, f.name) for f in dataclasses.fields(Inner)} | {
        "adjoint": text
    }
