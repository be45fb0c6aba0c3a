"""Where the golden files are (MSDSPN_GOLDEN, or tests/golden), and the models that they are of.

Needs nothing but what the package needs: experiments/accelerator reads them too.
"""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import msdspn_jax as ms

FOLDER = Path(os.environ.get("MSDSPN_GOLDEN") or Path(__file__).parent / "golden")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as archive:
        return {key: archive[key] for key in archive.files}


def config(arrays: dict[str, np.ndarray]) -> dict:
    return json.loads(str(arrays["config_json"]))


def nested(arrays: dict[str, np.ndarray], prefix: str) -> dict:
    """The arrays below `prefix` as nested dictionaries."""
    tree: dict = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            *folders, leaf = key.removeprefix(prefix).split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = value
    return tree


def to_flax(tree: dict, *, relational: bool) -> dict:
    first = ("pair_kernel", "pair_bias") if relational else None
    hidden = {"kernel": tree["hidden_kernel"], "bias": tree["hidden_bias"]}
    params = {"output": {"kernel": tree["output_kernel"], "bias": tree["output_bias"]}}
    params |= dict(zip(first, hidden.values(), strict=True)) if first else {"hidden": hidden}
    if "pool_weight" in tree:
        params["pool_weight"] = tree["pool_weight"]
    return jax.tree.map(jnp.asarray, params)


def build(config: dict):
    pool, relational = config["pool"], config["pool"] == "pairwise_fspool"
    learned = config["learned_initial_set"]
    return ms.SetPredictor(
        encoder=ms.SetEncoder(config["hidden_dim"], config["latent_dim"], config["set_size"]),
        decoder=ms.SetDecoder(
            config["set_size"],
            config["set_dim"],
            config["hidden_dim"],
            inner=ms.Inner(
                num_steps=config["num_steps"],
                step_size=config["learning_rate"],
                momentum=config["momentum"],
                max_grad_norm=config["max_grad_norm"] or math.inf,
                adjoint={"identity": ms.identity, "unrolled": ms.unrolled}[config["backward"]](),
                proximity=0.1 if learned else 0.0,
                pool="relation" if relational else pool,
                projection=config["projection"] or "none",
            ),
            initial_set="learned" if learned else "random",
        ),
        condition_on_inputs="concatenated" in config["energy"],
    ), relational


def variables(tree: dict, relational: bool) -> dict:
    decoder = {"energy_encoder": to_flax(tree["energy_encoder"], relational=relational)}
    if "initial_set" in tree:
        decoder["initial_set"] = jnp.asarray(tree["initial_set"])
    encoder = to_flax(tree["input_encoder"], relational=False)
    return {"params": {"encoder": encoder, "decoder": decoder}}
