"""Where the golden files are: the folder named by MSDSPN_GOLDEN, or tests/golden."""

import json
import os
from pathlib import Path

import numpy as np

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
