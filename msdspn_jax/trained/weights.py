"""A trained predictor as one safetensors file: weights by name, and all that builds the model.

The file opens with any safetensors reader. Its metadata has one entry, ``msdspn_jax``: JSON with
the task, its configuration, the step of the checkpoint, the versions it was made with, and a
`Calibration` where the model has one.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax import tasks
from msdspn_jax._cache import shapes_once
from msdspn_jax._files import as_user_error, write_bytes
from msdspn_jax.clevr.objects import ATTRIBUTES, CLEVR_LAYOUT, MAX_OBJECTS, PRESENCE_THRESHOLD
from msdspn_jax.errors import UserError
from msdspn_jax.models.inner import ENERGY_MODELS
from msdspn_jax.trained.calibration import Calibration
from msdspn_jax.training.config import TrainConfig, from_dict
from msdspn_jax.training.legacy import modernise
from msdspn_jax.training.run_folder import package_versions
from msdspn_jax.training.task import Task, Variables

FORMAT = 1
_ENTRY = "msdspn_jax"
_BOX_MODEL = "clevr_small.safetensors"
#: The most that a file may ask for, far above anything published: a file from elsewhere cannot
#: make a prediction endless or larger than a machine.
_BOUNDS = {
    "size": 1024,
    "set_size": 100,
    "slot_iterations": 100,
    "slot_dim": 4096,
    "encoder_width": 1024,
    "latent_dim": 16384,
    "hidden_dim": 16384,
    "eval_num_steps": 10_000,
    "eval_num_starts * eval_num_steps": 10_000,
    "elements": 4096,
    "features": 4096,
    "numbers": 2**22,
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Model(NamedTuple):
    """A trained predictor.

    Attributes:
        config: the task's ``Config``.
        variables: as ``predictor.predict`` takes them.
        step: training steps behind them.
        predictor: what the task's ``build_predictor`` makes of ``config``.
        versions: of the packages that the file was written with.
        task_name: the word on the command line.
        source: the file or run folder that it was read from.
        calibration: what makes scores that are probabilities; None if nobody has fitted it.
    """

    config: TrainConfig
    variables: Variables
    step: int
    predictor: Any
    versions: dict[str, str]
    task_name: str = "clevr"
    source: str = ""
    calibration: Calibration | None = None

    @property
    def threshold(self) -> float:
        """The score above which an element is shown as an object."""
        return self.calibration.threshold if self.calibration else PRESENCE_THRESHOLD

    def num_inner_steps(self, asked: int | None = None) -> int | None:
        """Inner steps of a prediction: those asked for, or those that it is evaluated with.

        None for models without an inner loop.

        Raises:
            UserError: steps are asked for, and the model has none.
        """
        config: Any = self.config
        if config.minimises:
            return asked or config.steps_at_evaluation
        if asked is not None:
            raise UserError(f"--inner.num-steps: the model {config.model} has no inner loop")
        return None

    def with_starts(self, number: int | None) -> Model:
        """The same model, descending from so many initial sets; None: as it is.

        Raises:
            UserError: the model has no inner loop.
        """
        if number is None:
            return self
        config: Any = self.config
        if not config.minimises:
            raise UserError(f"--inner.num-starts: the model {config.model} has no inner loop")
        inner = dataclasses.replace(config.inner, eval_num_starts=number)
        config = dataclasses.replace(config, inner=inner)
        build = tasks.load(self.task_name).build_predictor
        return self._replace(config=config, predictor=build(config))

    def predict(
        self, variables: Variables, images: Any, *, inner_steps: int | None = None, seed: int = 0
    ) -> Any:
        """Objects [batch, n, 19] of images [batch, size, size, 3]; jittable.

        Images are uint8, or floats in [0, 1].

        The last feature is the score: of a calibrated model the probability of being right, of
        another the presence as it is. Every image starts from the same key: what is predicted for
        it then depends neither on its place in the batch nor on the others.

        A model of ``msdspn train sets`` takes inputs of its data's shape, all elements of them
        there, and gives the predictor's whole `Prediction`: sets [batch, n, d] in the units of the
        data, their presence, the minimum.
        """
        keys = jnp.broadcast_to(jax.random.key(seed), images.shape[:1])
        found = self.predictor.predict(variables, images, keys, inner_steps=inner_steps)
        if self.task_name == "sets":
            return found
        found = found.objects
        if self.calibration is None:
            return found
        return found.at[..., CLEVR_LAYOUT.presence].set(self.calibration.score(found))


def sees(config: Any) -> str:
    """What a CLEVR model was trained to see, in a sentence without its full stop."""
    from msdspn_jax.clevr.sampling import MIN_OBJECTS

    fewest, most = MIN_OBJECTS, MAX_OBJECTS
    if config.data == "procedural":
        fewest, most = config.min_objects, config.max_objects
    number = f"{fewest} to {most}" if fewest < most else str(most)
    colors, materials, shapes = (
        f"{', '.join(values[:-1])} or {values[-1]}"
        for values in (ATTRIBUTES[name] for name in ("color", "material", "shape"))
    )
    return (
        f"{number} objects an image ({' or '.join(ATTRIBUTES['size'])}; {colors}; {materials};"
        f" {shapes}), at most {config.set_size} found; images of {config.size} x {config.size}"
        " pixels, to which others are resized"
    )


def box_model_sees() -> str | None:
    """What the model in the box sees, by its file; None where there is none. Reads no weights."""
    from safetensors import safe_open

    try:
        path = box_model_path()
        with safe_open(path, framework="numpy") as file:
            record = _read_record(path, file.metadata() or {})
        return sees(_read_config(path, record["task"], record["config"]))
    except Exception:  # Help is helpful without it.
        return None


def box_model_path() -> Path:
    """Where the small CLEVR model that comes with the package lies; its card is beside it.

    Raises:
        UserError: this installation has none.
    """
    path = Path(str(importlib.resources.files("msdspn_jax") / "assets" / _BOX_MODEL))
    if not path.exists():
        raise UserError(
            f"there is no model in the box: {path} is missing. Give a run folder, a weights file or"
            " a program instead"
        )
    return path


def save_model(
    path: str | Path,
    config: TrainConfig,
    variables: Variables,
    *,
    step: int,
    task_name: str = "clevr",
    half: bool = False,
    calibration: Calibration | None = None,
) -> None:
    """Write a predictor to one file, whole or not at all; the same model gives the same bytes.

    ``half`` rounds float32 parameters to 16 bits: half the size, three decimal digits. They are
    float32 again when they are read. Statistics of batches are few, may be large, and stay.

    Raises:
        ValueError: a weight that is not finite, or too large for 16 bits; a configuration that
            `load_model` would refuse.
        UserError: the file cannot be written.
    """
    from safetensors.numpy import save

    _check_bounds(config)
    arrays = {name: np.ascontiguousarray(x) for name, x in _by_name(variables).items()}
    if half:
        with np.errstate(over="ignore"):
            arrays = {
                name: x.astype(np.float16)
                if x.dtype == np.float32 and name.startswith("params/")
                else x
                for name, x in arrays.items()
            }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"variables: {name}: expected finite numbers, got NaN or infinity")
    # Paths are those of the machine that trained: their last names say enough.
    settings = {
        k: Path(v).name if k.endswith(("_dir", "data", "init_from")) and v else v
        for k, v in config.numerical().items()
    }
    record = {
        "format": FORMAT,
        "task": task_name,
        "config": settings,
        "step": int(step),
        "versions": package_versions(),
    }
    if calibration is not None:
        record["calibration"] = calibration.to_json()
    # A single entry: the writer does not keep the order of several.
    data = save(arrays, metadata={_ENTRY: json.dumps(record, default=str, sort_keys=True)})
    with as_user_error(path):
        write_bytes(path, data)


def load_model(path: str | Path) -> Model:
    """Read what `save_model` wrote, every name, shape and type checked against the model.

    The file holds numbers and a description, no code. A description that would make a prediction
    endless or enormous is refused, see `_BOUNDS`; weights are read when everything else fits.

    Raises:
        UserError: no such file; not such a file, a damaged one, or one of a newer version; weights
            that are not those of the model that its configuration describes.
    """
    from safetensors import safe_open

    path = Path(path)
    if not os.path.isfile(path):
        exists = os.path.exists(path)
        raise UserError(f"{path}: {'not a regular file' if exists else 'no such file'}")
    try:
        with safe_open(path, framework="numpy") as file:
            record = _read_record(path, file.metadata() or {})
            config = _read_config(path, record["task"], record["config"])
            calibration = _read_calibration(path, record.get("calibration"))
            predictor, expected = _build(path, record["task"], config)
            shapes = _by_name(expected)
            _check_names(path, set(file.keys()), shapes.keys())
            arrays = {name: _read_array(path, file, name, like) for name, like in shapes.items()}
    except UserError:
        raise
    except Exception as error:  # safetensors raises a handful of types for damaged files.
        raise UserError(f"{path}: not a readable safetensors file ({str(error)[:300]})") from error
    variables = jax.tree_util.tree_map_with_path(lambda key, _: arrays[_name(key)], expected)
    return Model(
        config,
        variables,
        record["step"],
        predictor,
        record["versions"],
        record["task"],
        str(path),
        calibration,
    )


def set_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration into a weights file; all else in it stays as it was, bit for bit.

    Raises:
        UserError: as `load_model`, or the file cannot be written.
    """
    from safetensors import safe_open
    from safetensors.numpy import save

    load_model(path)
    with safe_open(path, framework="numpy") as file:
        record = _read_record(Path(path), file.metadata())
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    record["calibration"] = calibration.to_json()
    data = save(arrays, metadata={_ENTRY: json.dumps(record, sort_keys=True)})
    with as_user_error(path):
        write_bytes(path, data)


def start_from(task: Task, path: str | Path) -> tuple[Task, list[str]]:
    """A task whose training begins with the weights of a model, and which weights do not.

    Weights are taken by name where the shapes agree. The others begin as they would without.

    Raises:
        UserError: as `load_model`, or no weight of the file is one of the task's.
    """
    given = _by_name(load_model(path).variables)
    shapes = _by_name(jax.eval_shape(task.init, jax.random.key(0)))
    taken = {
        name for name, like in shapes.items() if name in given and given[name].shape == like.shape
    }
    if not any(name.startswith("params/") for name in taken):
        raise UserError(
            f"--init-from {path}: none of its weights has the name and shape of one here"
        )

    def init(key):
        def choose(path, fresh):
            name = _name(path)
            return jnp.asarray(given[name], fresh.dtype) if name in taken else fresh

        return jax.tree_util.tree_map_with_path(choose, task.init(key))

    return dataclasses.replace(task, init=init), sorted(shapes.keys() - taken)


def _read_record(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise UserError(f"{path}: no model of msdspn_jax: its metadata has no entry {_ENTRY!r}")
    try:
        record = json.loads(metadata[_ENTRY])
        version = record["format"]
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{path}: of format {version}, which a newer msdspn_jax wrote;"
                f" this one reads up to {FORMAT}"
            )
        kinds = {"format": int, "task": str, "config": dict, "step": int, "versions": dict}
        for name, kind in kinds.items():
            if not isinstance(record[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged metadata ({repr(error)[:300]})") from error
    return record


def _read_calibration(path: Path, values: Any) -> Calibration | None:
    if values is None:
        return None
    try:
        return Calibration(**values)
    except Exception as error:  # Values of any type may stand in it.
        raise UserError(f"{path}: its calibration is not valid: {str(error)[:300]}") from error


def _read_config(path: Path, task: str, values: dict[str, Any]) -> TrainConfig:
    if task not in tasks.TASKS or not hasattr(tasks.load(task), "build_predictor"):
        raise UserError(f"{path}: a model of the task {task[:80]}, expected clevr or sets")
    try:
        config: Any = from_dict(tasks.load(task).Config, modernise(task, values))
        _check_bounds(config)
    except Exception as error:  # Values of any type may stand anywhere in it.
        raise UserError(f"{path}: its configuration is not valid: {str(error)[:300]}") from error
    return config


def _check_bounds(config: Any) -> None:
    """Refuse what is larger than a file may ask for.

    Raises:
        ValueError: names it.
    """
    sizes = {name: getattr(config, name) for name in _BOUNDS if hasattr(config, name)}
    form = getattr(config, "form", None)
    if form is not None:
        if form.kind is None:  # It would be looked for in files of this machine.
            raise ValueError("form: expected the format of the data, got none")
        del sizes["set_size"]
        sizes |= {"elements": form.set_size, "features": form.width}
        sizes["numbers"] = math.prod(form.input_shape)
    if config.model in ENERGY_MODELS:
        steps, starts = config.steps_at_evaluation, config.at_evaluation["num_starts"]
        sizes |= {"eval_num_steps": steps, "eval_num_starts * eval_num_steps": starts * steps}
    for name, value in sizes.items():
        if value is not None and value > _BOUNDS[name]:
            raise ValueError(f"{name}: expected at most {_BOUNDS[name]}, got {value}")


def _build(path: Path, task: str, config: TrainConfig) -> tuple[Any, Any]:
    """The predictor, and its variables as shapes."""
    try:
        predictor = tasks.load(task).build_predictor(config)
        return predictor, shapes_once(predictor.init, "variables", task, config.to_dict())
    except Exception as error:  # Whatever flax and JAX find wrong with a size or a word.
        first = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{path}: its configuration makes no model: {first[:300]}") from error


def _check_names(path: Path, found: Set[str], expected: Set[str]) -> None:
    for what, names in (
        ("lacks", expected - found),
        ("has, and the model does not,", found - expected),
    ):
        if names:
            first = ", ".join(name[:80] for name in sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{path}: {what} {first}{more}")


def _read_array(path: Path, file: Any, name: str, like: Any) -> np.ndarray:
    # The header first: its words for types are safetensors' own, and NumPy lacks some of them.
    header = file.get_slice(name)
    shape, dtype = tuple(header.get_shape()), _DTYPES.get(header.get_dtype(), header.get_dtype())
    rounded = dtype == "float16" and like.dtype == np.float32
    if shape != like.shape or (dtype != str(like.dtype) and not rounded):
        raise UserError(f"{path}: {name}: expected {like.dtype} {like.shape}, got {dtype} {shape}")
    array = file.get_tensor(name)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds a NaN or an infinity")
    return array.astype(like.dtype)


def _by_name(tree: Any) -> dict[str, Any]:
    return {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(key: Any) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")
