"""Data sets of one's own: read, checked, split, and brought into the shape that a model takes."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from msdspn_jax._progress import ProgressBar
from msdspn_jax.clevr.files import resize_image
from msdspn_jax.errors import UserError
from msdspn_jax.tasks.sets.format import Format, Kind

OF_INPUTS = ("inputs", "input_mask")
ARRAYS = (*OF_INPUTS, "targets", "mask", "split", "names")
SPLITS = ("train", "val", "test")
Scaling = Literal["standard", "range", "none"]
_HELD_OUT = 10
"""One in so many examples is for validation, and as many are for the test."""


class Data(NamedTuple):
    """A data set as its files have it, checked.

    Attributes:
        inputs: images uint8 [num, h, w, 3], vectors float32 [num, k] or sets float32 [num, m, k].
        input_mask: [num, m], of inputs that are sets; None: all elements are there.
        targets: float32 [num, n, d]; None in a file to predict for.
        mask: [num, n], True for the elements that are there; None: all are.
        split: [num], 0 for training, 1 for validation, 2 for the test; None: not said.
        names: of the d features.
        fingerprint: of all arrays; of images that were read from files, their targets alone. Empty:
            nobody asked.
    """

    inputs: np.ndarray
    input_mask: np.ndarray | None
    targets: np.ndarray | None
    mask: np.ndarray | None
    split: np.ndarray | None
    names: tuple[str, ...]
    fingerprint: str = ""

    @property
    def kind(self) -> Kind:
        """What the inputs are, by their number of axes."""
        kinds: dict[int, Kind] = {4: "images", 2: "vectors", 3: "sets"}
        return kinds[self.inputs.ndim]


# --- reading ---


def read(
    path: str | Path,
    *,
    arrays: tuple[str, ...] = ARRAYS,
    need_targets: bool = True,
    allow_empty: bool = False,
) -> Data:
    """Read an .npz file, or a folder of .npy files, and check every array.

    Args:
        path: the file or folder.
        arrays: those of `ARRAYS` to read; others are left alone, as are other names.
        need_targets: refuse a file without targets.
        allow_empty: sets without any element are allowed.

    Raises:
        UserError: names file, array, index, and what was expected there.
    """
    content = _arrays(Path(path), arrays)
    needed = ("inputs", "targets") if need_targets and "targets" in arrays else ("inputs",)
    for name in needed:
        if name not in content:
            found = ", ".join(sorted(_names_there(Path(path)))) or "none"
            raise UserError(f"{path}: expected an array {name!r}, got {found}")
    try:
        return check(content, allow_empty=allow_empty)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


# The first bytes of .npz (a zip archive) and .npy.
_MAGIC = (b"PK", b"\x93N")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _names_there(path: Path) -> list[str]:
    """All arrays of a file or folder, also those that nobody reads."""
    if path.is_dir():
        return [file.stem for file in path.glob("*.npy")]
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a file or folder that are wanted."""
    try:
        if path.is_dir():
            files = {p.stem: p for p in path.glob("*.npy") if p.stem in wanted}
            if not files:
                raise UserError(f"{path}: expected inputs.npy and targets.npy in it, got neither")
            return {
                k: _numeric(path, k, lambda p=p: np.load(p, mmap_mode="r", allow_pickle=False))
                for k, p in files.items()
            }
        if path.is_file() and _first_bytes(path) not in _MAGIC:  # NumPy takes it for a pickle.
            raise UserError(
                f"{path}: expected an .npz file, or a folder of .npy files, got neither"
            )
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: expected an .npz file of named arrays, got one array")
        with archive:
            return {
                name: _numeric(path, name, lambda name=name: archive[name])
                for name in archive.files
                if name in wanted
            }
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected an .npz file, a folder of .npy files or a .json file of COCO's, got"
            " nothing there"
        ) from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file or .npy folder ({error})") from error


def _numeric(path: Path, name: str, load: Callable[[], np.ndarray]) -> np.ndarray:
    """An array, unless it is one of Python objects, which NumPy would have to unpickle."""
    try:
        return load()
    except ValueError as error:
        if "allow_pickle" not in str(error) and "Object arrays" not in str(error):
            raise
        kind = "numbers"
        hint = "sets of varying size are padded to one size, and mask [num, n] says what is there"
        if name in ("split", "names"):
            kind, hint = "words", f"{name}.astype(str) makes one of it"
        raise UserError(
            f"{path}: {name}: expected an array of {kind}, got one of Python objects; {hint}"
        ) from error


def with_fingerprint(data: Data, *, of_inputs: bool) -> Data:
    """The data set with its fingerprint; of the inputs only where they are the same anywhere."""
    digest = hashlib.sha256(repr((data.names, data.inputs.shape[0])).encode())
    arrays = [data.targets, data.mask, data.split]
    for array in arrays + [data.inputs, data.input_mask] * of_inputs:
        if array is None:
            digest.update(b"none")
        else:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return data._replace(fingerprint=digest.hexdigest()[:16])


# --- checks ---


def check(arrays: Mapping[str, Any], *, allow_empty: bool = False) -> Data:
    """Check arrays of the names `ARRAYS`; ``inputs`` at least.

    Raises:
        ValueError: names array, index, and what was expected there.
    """
    inputs = _inputs(np.asarray(arrays["inputs"]))
    num = len(inputs)
    input_mask = None
    if arrays.get("input_mask") is not None:
        if inputs.ndim != 3:
            raise ValueError(
                "input_mask: expected none, as inputs are no sets [num, m, k], got one"
            )
        input_mask = _mask("input_mask", arrays["input_mask"], inputs.shape[:2], allow_empty)
    if inputs.dtype != np.uint8:
        _require_finite("inputs", inputs, input_mask)
        _require_apart("inputs", np.asarray(arrays["inputs"]), input_mask)
        if input_mask is not None:
            inputs = np.where(input_mask[..., None], inputs, 0)
    targets = mask = split = None
    if arrays.get("targets") is not None:
        targets = _numbers("targets", arrays["targets"])
        if targets.ndim != 3 or 0 in targets.shape:
            raise ValueError(
                f"targets: expected shape [num, n, d], no axis of length zero, got {targets.shape}"
            )
        if len(targets) != num:
            raise ValueError(f"targets: expected {num} sets, one an input, got {len(targets)}")
        if arrays.get("mask") is not None:
            mask = _mask("mask", arrays["mask"], targets.shape[:2], allow_empty)
        _require_finite("targets", targets, mask)
        _require_apart("targets", np.asarray(arrays["targets"]), mask)
        if mask is not None:
            targets = np.where(mask[..., None], targets, 0)
    if arrays.get("split") is not None:
        split = _split(np.asarray(arrays["split"]), num)
    return Data(inputs, input_mask, targets, mask, split, _names(arrays.get("names"), targets))


def _inputs(inputs: np.ndarray) -> np.ndarray:
    if 0 in inputs.shape or inputs.ndim not in (2, 3, 4):
        raise ValueError(
            "inputs: expected images [num, h, w, 3], vectors [num, k] or sets [num, m, k], no axis"
            f" of length zero, got shape {inputs.shape}"
        )
    if inputs.ndim == 4:
        if inputs.dtype != np.uint8 or inputs.shape[3] != 3:
            raise ValueError(
                "inputs: expected images of dtype uint8 and shape [num, h, w, 3], got"
                f" {inputs.dtype} {inputs.shape}"
            )
        return inputs
    if inputs.ndim == 3 and inputs.dtype == np.uint8:
        raise ValueError(
            "inputs: expected images uint8 [num, h, w, 3] or sets of floats [num, m, k], got uint8"
            f" {inputs.shape}, which could be either: np.repeat(inputs[..., None], 3, -1) makes"
            " images of grey ones, inputs.astype('float32') says that they are sets"
        )
    return _numbers("inputs", inputs)


def _numbers(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _mask(name: str, mask: Any, shape: tuple[int, ...], allow_empty: bool) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, an entry an element, got {mask.shape}")
    if mask.dtype.kind in "iuf":
        other = (mask != 0) & (mask != 1)
        if other.any():
            index = _first(other)
            raise ValueError(
                f"{name}: expected True and False, or 1 and 0, got {mask[index]} at {list(index)}"
            )
    elif mask.dtype != bool:
        raise ValueError(f"{name}: expected booleans, got dtype {mask.dtype}")
    mask = mask.astype(bool)
    empty = ~mask.any(axis=1)
    if empty.any() and not allow_empty:
        raise ValueError(
            f"{name}: expected an element in every set (--allow-empty lifts this), got none at"
            f" {list(_first(empty))} ({int(empty.sum())} such sets)"
        )
    return mask


def _require_finite(name: str, array: np.ndarray, mask: np.ndarray | None) -> None:
    bad = ~np.isfinite(array)
    if mask is not None:
        bad &= mask[..., None]
    if bad.any():
        index = _first(bad)
        raise ValueError(
            f"{name}: expected finite numbers where an element is there, got {array[index]} at"
            f" {list(index)} ({int(bad.sum())} such entries)"
        )


def _require_apart(name: str, array: np.ndarray, mask: np.ndarray | None) -> None:
    """Refuse numbers that float32 rounds by more than a thousandth of their deviation."""
    if array.dtype.kind not in "fiu" or array.dtype.itemsize < 4 or array.dtype == np.float32:
        return
    present = array.reshape(-1, array.shape[-1]) if mask is None else array[mask]
    if not len(present):
        return
    deviation, largest = present.std(0, dtype=float), np.abs(present).max(0).astype(float)
    step = np.spacing(largest.astype(np.float32))
    # A deviation of rounding errors is that of a constant.
    rounded = (deviation > 1e-12 * largest) & (step > 1e-3 * deviation)
    if rounded.any():
        (index,) = _first(rounded)
        raise ValueError(
            f"{name}: expected numbers that float32 can tell apart, got a feature {index} of"
            f" deviation {deviation[index]:.3g} and numbers up to {largest[index]:.6g}: subtract an"
            " offset first"
        )


def _split(split: np.ndarray, num: int) -> np.ndarray:
    if split.shape != (num,):
        raise ValueError(f"split: expected shape ({num},), a word an example, got {split.shape}")
    if split.dtype == bool:
        raise ValueError(
            "split: expected train, val or test, or 0, 1, 2, got booleans, which do not say of what"
        )
    known: dict[Any, int] = {word: i for i, word in enumerate(SPLITS)}
    known |= {i: i for i in range(len(SPLITS))}
    words = [x.decode() if isinstance(x, bytes) else x for x in split.tolist()]
    for i, word in enumerate(words):
        if word not in known:
            raise ValueError(f"split: expected train, val or test, or 0, 1, 2, got {word!r} at {i}")
    found = np.array([known[word] for word in words])
    for i, word in enumerate(SPLITS[:2]):
        if not (found == i).any():
            raise ValueError(f"split: expected an example for {word} at least, got none")
    return found


def _numbered(dim: int) -> tuple[str, ...]:
    """What features are called that have no names."""
    return tuple(f"feature{i}" for i in range(dim))


def _names(given: Any, targets: np.ndarray | None) -> tuple[str, ...]:
    if targets is None:
        return ()
    dim = targets.shape[2]
    if given is None:
        return _numbered(dim)
    words = np.asarray(given).tolist() if np.ndim(given) == 1 else ()
    names = tuple(x.decode() if isinstance(x, bytes) else str(x) for x in words)
    if len(names) != dim or len(set(names)) != dim:
        raise ValueError(
            f"names: expected {dim} different words, one a feature of targets, got"
            f" {np.asarray(given).tolist()}"
        )
    for name in names:
        if name.endswith("_std"):
            raise ValueError(
                "names: expected none that ends in _std, as deviations of scores are called, got"
                f" {name}"
            )
    return names


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])


# --- splits and scaling ---


def joined(parts: Mapping[str, Data]) -> Data:
    """One data set of several files, each of which is a split.

    Args:
        parts: by the names in `SPLITS`, all with targets; those of "train" first.

    Raises:
        ValueError: they do not fit together, or one is split itself.
    """
    first = next(iter(parts.values()))
    shape = first.inputs.shape[1:] if first.kind != "sets" else first.inputs.shape[2:]
    for name, part in parts.items():
        if part.split is not None:
            raise ValueError(f"split: expected none in data for {name} alone, got one")
        if part.kind != first.kind or part.inputs.shape[-len(shape) :] != shape:
            raise ValueError(
                f"inputs: expected {first.kind} like those for training, {first.inputs.shape}, got"
                f" {part.kind} {part.inputs.shape} for {name}"
            )
        if part.names != first.names:
            raise ValueError(
                f"names: expected those of the training data, {', '.join(first.names)}, got"
                f" {', '.join(part.names)} for {name}"
            )
    split = np.repeat(
        [SPLITS.index(name) for name in parts], [len(x.inputs) for x in parts.values()]
    )
    if first.kind == "sets":
        inputs, input_mask = _stacked([(x.inputs, x.input_mask) for x in parts.values()])
    else:
        inputs, input_mask = np.concatenate([x.inputs for x in parts.values()]), None
    targets, mask = _stacked([(x.targets, x.mask) for x in parts.values()])
    fingerprint = hashlib.sha256(repr([x.fingerprint for x in parts.values()]).encode())
    return Data(inputs, input_mask, targets, mask, split, first.names, fingerprint.hexdigest()[:16])


def _stacked(parts: list[tuple[Any, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Sets of several arrays in one, padded to the longest, and their mask where there is need."""
    n = max(sets.shape[1] for sets, _ in parts)
    full = [np.ones(sets.shape[:2], bool) if mask is None else mask for sets, mask in parts]
    pairs = [padded(sets, mask, n) for (sets, _), mask in zip(parts, full, strict=True)]
    sets, mask = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return sets, None if mask.all() else mask


def split_indices(data: Data, seed: int) -> dict[str, np.ndarray]:
    """Which examples are for training, validation and test: as the data says, else by ``seed``."""
    num = len(data.inputs)
    if data.split is not None:
        return {name: np.flatnonzero(data.split == i) for i, name in enumerate(SPLITS)}
    held_out = max(1, num // _HELD_OUT)
    if num < 3:
        raise ValueError(
            f"inputs: expected at least 3 examples, one for each of {', '.join(SPLITS)}, got {num}"
        )
    order = np.random.default_rng(seed).permutation(num)
    parts = np.split(order, [num - 2 * held_out, num - held_out])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def find_format(
    data: Data, *, split_seed: int, scaling: Scaling, size: int | None, set_size: int | None
) -> Format:
    """What a model must know of a data set with targets; scaling is learned from its training part.

    Args:
        data: with targets.
        split_seed: as for `split_indices`.
        scaling: "standard": mean 0 and deviation 1; "range": from -1 to 1; "none".
        size: side of the images for the network; None: 64 or 128, what they fit into.
        set_size: n; None: that of the targets.

    Raises:
        ValueError: more elements in a set than ``set_size``.
    """
    assert data.targets is not None
    train = split_indices(data, split_seed)["train"]
    mask = data.mask
    n = set_size or data.targets.shape[1]
    _require_at_most(n, data)
    shift, scale = _scaling(data.targets[train], None if mask is None else mask[train], scaling)
    shape: tuple[int, ...] = data.inputs.shape[1:]
    input_shift: tuple[float, ...] = ()
    input_scale: tuple[float, ...] = ()
    if data.kind == "images":
        side = size or default_side(max(shape[:2]))
        shape = (side, side, 3)
    else:
        of_inputs = None if data.input_mask is None else data.input_mask[train]
        input_shift, input_scale = _scaling(data.inputs[train], of_inputs, scaling)
    varying = n > data.targets.shape[1] or (mask is not None and not mask.all())
    return Format(
        kind=data.kind, input_shape=tuple(map(int, shape)), set_size=n, names=data.names,
        presence=varying, shift=shift, scale=scale, input_shift=input_shift,
        input_scale=input_scale, fingerprint=data.fingerprint,
    )  # fmt: skip


def default_side(longest: int) -> int:
    """Side of the images for the network: what it takes, and of what it takes, what they need."""
    return 64 if longest <= 64 else 128


def _require_at_most(n: int, data: Data) -> None:
    assert data.targets is not None
    sizes = np.full(len(data.targets), data.targets.shape[1])
    if data.mask is not None:
        sizes = data.mask.sum(axis=1)
    more = sizes > n
    if more.any():
        (index,) = _first(more)
        raise ValueError(
            f"{'targets' if data.mask is None else 'mask'}: expected at most {n} elements in a set"
            f" (--set-size), got {sizes[index]} at [{index}] ({int(more.sum())} such sets)"
        )


def _scaling(
    values: np.ndarray, mask: np.ndarray | None, scaling: Scaling
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of every feature; a feature that never changes is only shifted."""
    present = values.reshape(-1, values.shape[-1]) if mask is None else values[mask]
    dim = values.shape[-1]
    shift, scale = np.zeros(dim), np.ones(dim)
    if scaling != "none" and len(present):
        present = present.astype(np.float64)
        low, high = present.min(0), present.max(0)
        if scaling == "range":
            shift, scale = (low + high) / 2, (high - low) / 2
        else:
            shift, scale = present.mean(0), present.std(0)
        scale = np.where(high > low, scale, 1.0)
        if (small := scale < np.finfo(np.float32).tiny).any():
            (index,) = _first(small)
            raise ValueError(
                f"feature {index}: expected numbers whose differences float32 can hold, got a"
                f" deviation of {scale[index]:.3g}: multiply them first"
            )
    return tuple(map(float, shift)), tuple(map(float, scale))


# --- as a model takes it ---


def fitted(data: Data, form: Format) -> dict[str, np.ndarray]:
    """The arrays of a data set with targets as a model takes them: both of the following."""
    return fitted_inputs(data, form) | fitted_targets(data, form)


def fitted_inputs(data: Data, form: Format) -> dict[str, np.ndarray]:
    """The inputs in the shape of ``form``, and of sets their input_mask.

    Images are squashed to its side; sets are padded, their elements first.

    Raises:
        ValueError: inputs that are not of this form.
    """
    mask = data.input_mask
    if data.kind == "sets" and mask is None:
        mask = np.ones(data.inputs.shape[:2], bool)
    same = data.kind == form.kind and data.inputs.shape[-1:] == form.input_shape[-1:]
    if not same or (mask is not None and mask.sum(1).max() > form.input_shape[0]):
        sizes = "h, w, 3" if form.kind == "images" else ", ".join(map(str, form.input_shape))
        raise ValueError(
            f"inputs: expected {form.kind} [num, {sizes}], as the model was trained on, got"
            f" {data.kind} {data.inputs.shape}"
        )
    if mask is not None:
        inputs, mask = padded(data.inputs, mask, form.input_shape[0])
        return {"inputs": inputs, "input_mask": mask}
    if form.kind == "images":
        return {"inputs": _squashed(data.inputs, form.input_shape[0])}
    return {"inputs": data.inputs}


def fitted_targets(data: Data, form: Format) -> dict[str, np.ndarray]:
    """The targets in the shape of ``form``, padded, their elements first; and their mask.

    Raises:
        ValueError: targets that are not of this form.
    """
    assert data.targets is not None
    if data.targets.shape[2] != form.set_dim:
        raise ValueError(
            f"targets: expected {form.set_dim} features, as the model was trained on, got shape"
            f" {data.targets.shape}"
        )
    unnamed = _numbered(form.set_dim) in (data.names, form.names)
    if data.names != form.names and not unnamed:
        raise ValueError(
            f"names: expected {', '.join(form.names)}, as the model was trained on, got"
            f" {', '.join(data.names)}"
        )
    _require_at_most(form.set_size, data)
    mask = np.ones(data.targets.shape[:2], bool) if data.mask is None else data.mask
    short = mask.sum(1) < form.set_size
    if short.any() and not form.presence:
        (index,) = _first(short)
        raise ValueError(
            f"mask: expected {form.set_size} elements in every set, as the model was trained on,"
            f" got {int(mask[index].sum())} at [{index}]"
        )
    targets, mask = padded(data.targets, mask, form.set_size)
    return {"targets": targets, "mask": mask}


def padded(sets: np.ndarray, mask: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets of n elements: those that are there first, in their order, and zeros."""
    order = np.argsort(~mask, axis=1, kind="stable")[:, :n]
    sets = np.take_along_axis(sets, order[..., None], axis=1)
    mask = np.take_along_axis(mask, order, axis=1)
    more = ((0, 0), (0, n - mask.shape[1]))
    sets = np.where(mask[..., None], sets, 0).astype(np.float32)
    return np.pad(sets, (*more, (0, 0))), np.pad(mask, more)


def _squashed(images: np.ndarray, side: int) -> np.ndarray:
    if images.shape[1:3] == (side, side):
        return images
    out = np.empty((len(images), side, side, 3), np.uint8)
    with ProgressBar("resizing images") as report:
        for i, image in enumerate(images):
            out[i] = resize_image(np.asarray(image), side)
            if i % 100 == 0:
                report(i, len(images))
    return out
