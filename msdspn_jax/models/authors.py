"""Weights of the paper authors' PyTorch models, for the models here (their ``models.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

#: Layers of a block of their image encoder.
_BLOCK = {
    "conv1": "conv1",
    "norm1": "bn1",
    "conv2": "conv2",
    "norm2": "bn2",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}


def from_pytorch(state: Mapping[str, Any], *, relational: bool = False) -> dict[str, Any]:
    """Variables of a `SetPredictor` from the state dict of the authors' DSPN or iDSPN.

    Their set autoencoders and numbering models have a `SetEncoder` as encoder, their image models a
    `ResNet`, whose running statistics come out as ``batch_stats``. With these variables the models
    here compute what theirs do (tests/golden).

    The layout of images is [height, width, channels] here and [channels, height, width] there. So
    the latent features come out in another order, the same in image encoder and energy.

    Args:
        state: NumPy arrays by name, ``{name: x.numpy() for name, x in model.state_dict().items()}``
            in PyTorch. Names may have a prefix, such as the ``net.`` of their checkpoints.
        relational: their energy pools pairs of elements (``RNFSEncoder``).

    Raises:
        ValueError: a name that the model needs is missing, or one is not of such a model.

    Example:
        >>> shapes = {"mlp.0.weight": (8, 2), "mlp.0.bias": 8, "mlp.2.weight": (6, 8)}
        >>> shapes |= {"mlp.2.bias": 6, "pool.weight": (5, 6)}
        >>> parts = ("input_to_z", "inner_obj.encoder")
        >>> state = {f"{part}.{name}": np.ones(x) for part in parts for name, x in shapes.items()}
        >>> from_pytorch(state)["params"]["encoder"]["hidden"]["kernel"].shape
        (2, 8)
    """
    # Their decoder holds the energy, too: the same weights by a second name.
    twice = ("num_batches_tracked", "dspn.inner_obj.")
    left = {k: np.asarray(x) for k, x in state.items() if not any(part in k for part in twice)}
    mark = "inner_obj.encoder.mlp.0.weight"
    prefix = next((name.removesuffix(mark) for name in left if name.endswith(mark)), None)
    if prefix is None:
        raise ValueError(f"state: expected a name that ends in {mark}, got {_some(left)}")
    energy = _set_encoder(left, f"{prefix}inner_obj.encoder.", relational)
    stats: dict[str, Any] = {}
    if f"{prefix}input_to_z.layers.0.weight" in left:
        encoder, stats, channels = _image_encoder(left, f"{prefix}input_to_z.")
        energy = _positions_first(energy, channels)
    else:
        encoder = _set_encoder(left, f"{prefix}input_to_z.", relational=False)
    decoder: dict[str, Any] = {"energy_encoder": energy}
    initial = left.pop(f"{prefix}dspn._set_0", None)
    if initial is not None:
        decoder["initial_set"] = initial[0]
    if left:
        raise ValueError(f"state: expected the names of one DSPN or iDSPN, got also {_some(left)}")
    params = {"encoder": encoder, "decoder": decoder}
    return {"params": params} | ({"batch_stats": {"encoder": stats}} if stats else {})


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _take(left: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in left:
        raise ValueError(f"state: expected {name}, got {_some(left)}")
    return left.pop(name)


def _linear(left: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": _take(left, f"{name}.weight").T, "bias": _take(left, f"{name}.bias")}


def _set_encoder(left: dict[str, np.ndarray], prefix: str, relational: bool) -> dict[str, Any]:
    hidden = _linear(left, f"{prefix}mlp.0")
    params: dict[str, Any] = {"output": _linear(left, f"{prefix}mlp.2")}
    if relational:
        params |= {"pair_kernel": hidden["kernel"], "pair_bias": hidden["bias"]}
    else:
        params["hidden"] = hidden
    pool_weight = left.pop(f"{prefix}pool.weight", None)  # Sums and means have none.
    return params if pool_weight is None else params | {"pool_weight": pool_weight}


def _image_encoder(left: dict[str, np.ndarray], prefix: str) -> tuple[dict, dict, int]:
    """Parameters and statistics of a `ResNet`, and the channels of its last convolution."""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for (*block, layer), name in list(_layers(left, prefix)):  # All, before any is taken.
        params_here, stats_here = params, stats
        for part in block:
            params_here = params_here.setdefault(part, {})
            stats_here = stats_here.setdefault(part, {})
        weight = _take(left, f"{name}.weight")
        if "norm" in layer:
            params_here[layer] = {"scale": weight, "bias": _take(left, f"{name}.bias")}
            running = {"mean": "running_mean", "var": "running_var"}
            stats_here[layer] = {k: _take(left, f"{name}.{x}") for k, x in running.items()}
        else:
            params_here[layer] = {"kernel": weight.transpose(2, 3, 1, 0)}  # Here [h, w, in, out].
    params["end"]["bias"] = _take(left, f"{prefix}end.1.bias")
    return params, stats, len(params["end"]["bias"])


def _layers(left: dict[str, np.ndarray], prefix: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a layer of their image encoder is here, and its name there."""
    yield ("stem",), f"{prefix}layers.0"
    yield ("stem_norm",), f"{prefix}layers.1"
    for stage in range(4):
        for block in itertools.count():
            there = f"{prefix}layers.{4 + stage}.{block}"
            if f"{there}.conv1.weight" not in left:
                break
            here = f"stage{stage + 1}_block{block + 1}"
            for ours, theirs in _BLOCK.items():
                if f"{there}.{theirs}.weight" in left or not ours.startswith("shortcut"):
                    yield (here, ours), f"{there}.{theirs}"
    yield ("end_norm",), f"{prefix}end.0"
    yield ("end",), f"{prefix}end.1"


def _positions_first(energy: dict[str, Any], channels: int) -> dict[str, Any]:
    """The energy for latents of [positions, channels], not of [channels, positions]."""

    def turned(x):
        *rest, latent = x.shape
        return x.reshape(*rest, channels, latent // channels).swapaxes(-1, -2).reshape(x.shape)

    turn = ("output", "pool_weight")
    return energy | {k: jax.tree.map(turned, energy[k]) for k in turn if k in energy}
