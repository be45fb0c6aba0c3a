"""A model of one's own data as a program that needs no model code; see `trained.program`.

The zip file has the same three parts. The program takes inputs of any batch (images uint8 [batch,
side, side, 3], vectors float32 [batch, k], or sets float32 [batch, m, k] and their mask) and gives
float32 [batch, n, d], in the units of the data, presence as one more feature where sets vary in
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import export

from msdspn_jax.trained.program import FORMAT, PLATFORMS, lower, write_program
from msdspn_jax.training.run_folder import package_versions

if TYPE_CHECKING:
    from msdspn_jax.trained.weights import Model

#: How to run a program without msdspn_jax: ``python predict.py PROGRAM DATA.npz PREDICTIONS.npz``.
EXAMPLE = """\
# A program is native code, run with your rights: run only what you trust.
import json, sys, zipfile
import jax, jax.export, numpy as np

program = zipfile.ZipFile(sys.argv[1])
settings = json.loads(program.read("settings.json"))
predict = jax.jit(jax.export.deserialize(bytearray(program.read("model.jax_export"))).call)
data = np.load(sys.argv[2])
inputs = data["inputs"]
if settings["kind"] == "images":
    from PIL import Image
    side = settings["input_shape"][0]
    resize = lambda x: np.asarray(Image.fromarray(x).resize((side, side), Image.BILINEAR))
    inputs = inputs if inputs.shape[1:3] == (side, side) else np.stack([resize(x) for x in inputs])
else:
    inputs = inputs.astype(np.float32)
arguments = [inputs]
if settings["kind"] == "sets":
    mask = data["input_mask"] if "input_mask" in data else np.ones(inputs.shape[:2])
    pad = settings["input_shape"][0] - inputs.shape[1]
    inputs = np.pad(np.where(mask[..., None], inputs, 0), ((0, 0), (0, pad), (0, 0)))
    arguments = [inputs, np.pad(mask.astype(bool), ((0, 0), (0, pad)))]
batches = [[x[i : i + 64] for x in arguments] for i in range(0, len(inputs), 64)]
sets = np.concatenate([np.asarray(predict(*batch)) for batch in batches])
found = {"names": np.array(settings["names"])}
if settings["presence"]:
    found["presence"], sets = sets[..., -1], sets[..., :-1]
mask = np.repeat(np.isfinite(sets).all((1, 2))[:, None], sets.shape[1], 1)
if settings["presence"]:
    mask &= found["presence"] > settings["threshold"]
np.savez(sys.argv[3], sets=sets, mask=mask, **found)
"""


def save_set_program(
    path: str | Path,
    model: Model,
    *,
    inner_steps: int | None = None,
    seed: int = 0,
    threshold: float = 0.5,
    platforms: Sequence[str] = PLATFORMS,
    facts: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Lower a model for all platforms and any batch, and write it.

    Args:
        path: the file to write; whole or not at all.
        model: of the task sets.
        inner_steps: default: those that the model is evaluated with.
        seed: of random initial sets.
        threshold: presence above which the script takes an element to be there.
        platforms: what the program shall run on.
        facts: anything else worth keeping in the settings.

    Returns:
        The settings, and the function that was lowered.

    Raises:
        ValueError: an unknown platform.
        UserError: the file cannot be written.
    """
    config: Any = model.config
    form = config.form

    def predict(inputs, *input_mask):
        keys = jnp.broadcast_to(jax.random.key(seed), inputs.shape[:1])
        found = model.predictor.predict(
            model.variables, inputs, keys, input_mask=input_mask[0] if input_mask else None,
            inner_steps=inner_steps,
        )  # fmt: skip
        if found.presence is None:
            return found.sets
        return jnp.concatenate([found.sets, found.presence[..., None]], -1)

    (batch,) = export.symbolic_shape("batch")
    dtype = jnp.uint8 if form.kind == "images" else jnp.float32
    arguments = [jax.ShapeDtypeStruct((batch, *form.input_shape), dtype)]
    if form.kind == "sets":
        arguments.append(jax.ShapeDtypeStruct((batch, form.input_shape[0]), jnp.bool_))
    exported = lower(predict, *arguments, platforms=platforms)
    settings = {
        "format": FORMAT,
        "task": "sets",
        "kind": form.kind,
        "input_shape": list(form.input_shape),
        "set_size": form.set_size,
        "names": list(form.names),
        "presence": form.presence,
        "threshold": float(threshold),
        "platforms": list(exported.platforms),
        "versions": package_versions(),
        **(facts or {}),
    }
    write_program(path, exported, settings, EXAMPLE)
    return settings, predict
