"""Checkpoints of the paper authors' PyTorch code, read without PyTorch and without running code.

``torch.save`` writes a zip file: a pickle of the objects, and the numbers of every tensor beside
it. A pickle may name any function to be called. Here it builds tensors and plain containers, and
whatever else it names becomes an empty stand-in.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax.errors import UserError
from msdspn_jax.models.authors import from_pytorch
from msdspn_jax.models.inner import Inner, Pool
from msdspn_jax.models.set_predictor import INITIAL_SCALE
from msdspn_jax.tasks.clevr.config import Config
from msdspn_jax.tasks.clevr.model import build_predictor
from msdspn_jax.trained.weights import Model

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_POOLS: dict[str, Pool] = {"fs": "fspool", "rnfs": "relation", "sum": "sum", "mean": "mean"}


class Checkpoint(NamedTuple):
    """What a file of ``torch.save`` holds of a model.

    Attributes:
        state: its weights by name.
        settings: the flags of the training, where they were saved.
        step: training steps behind it; 0 if it does not say.
    """

    state: dict[str, np.ndarray]
    settings: dict[str, Any]
    step: int


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of PyTorch Lightning, or a bare ``torch.save(model.state_dict(), path)``.

    Raises:
        UserError: no such file, or not one that PyTorch 1.6 or newer wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = name.removesuffix("data.pkl")
            whole = _Unpickler(archive, folder, archive.read(name)).load()
    except Exception as error:  # A damaged pickle raises anything.
        raise UserError(
            f"{path}: expected what torch.save of PyTorch 1.6 or newer wrote, got"
            f" {type(error).__name__}: {str(error)[:200]}"
        ) from error
    found = whole if isinstance(whole, dict) else {}
    state = found.get("state_dict", found)
    arrays = {k: x for k, x in state.items() if isinstance(x, np.ndarray)}
    if not arrays:
        raise UserError(f"{path}: expected the weights of a model by name, got none")
    settings = found.get("hyper_parameters")
    step = found.get("global_step")
    return Checkpoint(
        arrays,
        settings if isinstance(settings, dict) else {},
        step if isinstance(step, int) else 0,
    )


def clevr_model(path: str | Path) -> Model:
    """A model of the authors' ``train_exp3.py`` as one of ``msdspn train clevr``.

    What its settings do not say is as published, or seen from the weights. A model with random
    initial sets gets one such set for all images.

    Raises:
        UserError: as `read_checkpoint`, or it is no image model of theirs.
    """
    state, given, step = read_checkpoint(path)
    relational = given.get("decoder_pool") == "rnfs"
    try:
        variables = from_pytorch(state, relational=relational)
        params = variables["params"]
        if "stem" not in params["encoder"]:
            raise ValueError("state: expected a model of images, got one of sets")
        energy, end = params["decoder"]["energy_encoder"], params["encoder"]["end"]["kernel"]
        hidden_dim, latent_dim = energy["output"]["kernel"].shape
        n, d = given.get("set_size", 10), given.get("set_dim", 19)
        learned = "initial_set" in params["decoder"]
        if not learned:
            drawn = INITIAL_SCALE * np.random.default_rng(0).normal(size=(n, d))
            params["decoder"]["initial_set"] = drawn.astype(np.float32)
        steps = given.get("decoder_iters", 40)
        clip = given.get("decoder_grad_clip", 10.0)
        config = Config(
            model=given.get("model", "idspn"),
            size=given.get("clevr_image_size", _side(latent_dim // end.shape[-1])),
            set_size=params["decoder"]["initial_set"].shape[0],
            encoder_width=params["encoder"]["stem"]["kernel"].shape[-1],
            encoder="resnet34" if "stage1_block3" in params["encoder"] else "resnet18",
            latent_dim=latent_dim,
            hidden_dim=hidden_dim,
            inner=Inner(
                num_steps=steps // 2 if given.get("decoder_it_schedule", True) else steps,
                late_num_steps=steps,
                eval_num_steps=given.get("decoder_val_iters") or steps,
                step_size=given.get("decoder_lr", 1.0),
                momentum=given.get("decoder_momentum", 0.9),
                max_grad_norm=float("inf") if clip is None else clip,
                pool=_POOLS[given.get("decoder_pool", "fs")],
                proximity=0.1 if learned else 0.0,
            ),
        )
        predictor = build_predictor(config)
        stats = {"batch_stats": variables["batch_stats"]}
        variables = {"params": params, "state": stats}
        shapes = jax.tree.map(np.shape, jax.eval_shape(predictor.init, jax.random.key(0)))
        if jax.tree.map(np.shape, variables) != shapes:
            raise ValueError("state: expected weights of the shapes that the settings ask for")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no model of the authors' CLEVR experiment: {error}") from error
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    return Model(config, variables, step, predictor, {}, "clevr", str(path))


def _side(positions: int) -> int:
    """The side of images that leave the encoder on so many positions."""
    return 64 * round(positions**0.5)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, data: bytes):
        super().__init__(io.BytesIO(data))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return _tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _DTYPES:
            return name
        return _StandIn

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, *_ = pid
        data = self._archive.read(f"{self._folder}data/{key}")
        return np.frombuffer(data, np.dtype(_DTYPES[kind]).newbyteorder("<"))


class _StandIn(dict):
    """For an object of any class: what it has is kept, what it does is not done."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, _: Any) -> None:
        """Of a list; not kept."""

    extend = add = append


def _tensor(numbers: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= len(numbers)):
        raise ValueError(f"a tensor of shape {tuple(size)} reaches out of its numbers")
    strides = [step * numbers.itemsize for step in stride]
    seen = np.lib.stride_tricks.as_strided(numbers[offset:], size, strides, writeable=False)
    return np.ascontiguousarray(seen)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
