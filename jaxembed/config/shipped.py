"""The YAML files that ship with the package: configs and recipes, which commands accept by name, and tables."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxembed.config.sections import read_tree
from jaxembed.errors import UserError
from jaxembed.files import exists

CATALOG_FILE = "catalog.yaml"
RECIPES_FOLDER = "recipes"
CURATION_FOLDER = "curation"
SYNTHESIS_FOLDER = "synthesis"
TRAINING_FOLDERS = (".", RECIPES_FOLDER)  # configs of training runs


def find_shipped_folder() -> Path:
    """Return the folder of the shipped files: inside the package if it was installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


@functools.cache
def _read_once(path: Path) -> dict[str, Any]:
    return read_tree(path)


def read_shipped_yaml(name: str) -> dict[str, Any]:
    """Return the mapping in a shipped YAML file. It is read once in a process; do not change it.

    Args:
        name: Path of the file below the folder, such as "instructions/nv_embed.yaml".

    Raises:
        UserError: The file is missing or not a mapping.
    """
    return _read_once(find_shipped_folder() / name)


def list_shipped_configs(folders: Sequence[str] = TRAINING_FOLDERS) -> dict[str, Path]:
    """Return the shipped configs in some folders by name, in alphabetical order. Default: configs and recipes of training."""
    paths = [path for folder in folders for path in (find_shipped_folder() / folder).glob("*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem) if path.name != CATALOG_FILE}


def find_config(path: str | Path, folders: Sequence[str] = TRAINING_FOLDERS) -> Path:
    """Return the file of a config that a user names by its path, or by the name of a shipped one.

    A file of that name in the working folder comes first, a folder does not.

    Args:
        path: Path of a YAML file, or a name such as `finetune`.
        folders: Folders of the shipped configs.

    Raises:
        UserError: There is no file at the path, and no shipped config of that name.
    """
    path = Path(path)
    paths = list_shipped_configs(folders)
    is_shipped = str(path) in paths
    if exists(path) and not (is_shipped and path.is_dir()):
        return path
    if is_shipped:
        return paths[str(path)]
    nearest = difflib.get_close_matches(path.stem, paths, n=3, cutoff=0.5)
    hint = f" Did you mean the shipped config {' or '.join(nearest)}?" if nearest else ""
    raise UserError(f"{path}: no such config file. Give the path of a YAML file, or the name of a shipped config.{hint}")
