"""The shipped recipes, read as a user reads them who has a copy of all their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed import config
from jaxembed.config.catalog import read_catalog
from jaxembed.config.sections import read_tree
from jaxembed.config.shipped import shipped_folder

RECIPES = sorted((shipped_folder() / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


def find_recipe(name: str) -> Path:
    return shipped_folder() / "recipes" / f"{name}.yaml"


def read_recipe(name: str) -> dict[str, Any]:
    """Return the tree of a recipe in which every source has a path."""
    tree = read_tree(find_recipe(name))
    for source in iter_sources(tree):
        if "path" not in read_catalog()[source["catalog"]]:
            source.setdefault("path", f"{source['catalog']}.jsonl")
    return tree


def iter_sources(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sources of a tree and of its stages."""
    for stage in (tree, *tree.get("stages", ())):
        yield from stage.get("data", {}).get("sources", ())


def load_recipe(name: str) -> config.Config:
    return config.parse_config(read_recipe(name), name)
