"""Named sources: a source of a config may take its keys from an entry of the shipped catalog."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxembed.config.shipped import CATALOG_FILE, read_shipped_yaml

DOCUMENTATION_KEYS = frozenset({"license", "seen", "note"})  # describe an entry; its other keys are those of a source


def read_catalog() -> Mapping[str, Mapping[str, Any]]:
    """Return the entries of the catalog by name, unchecked."""
    return read_shipped_yaml(CATALOG_FILE)


def fill_from_catalog(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a source with those of its catalog entry filled in.

    The keys of the source replace those of the entry, each as a whole. The source is named after the entry, unless it has a
    name. An unknown entry leaves the source as it is, for `check_catalog_name` to refuse.

    Args:
        source: Keys of a source, unchecked. `catalog` names the entry.

    Raises:
        ValueError: Neither the entry nor the source has a path.
    """
    name = source["catalog"]
    entry = read_catalog().get(name) if isinstance(name, str) else None
    if entry is None:
        return dict(source)
    own_keys = {key: value for key, value in source.items() if key != "catalog"}
    filled = {"name": name, **{key: value for key, value in entry.items() if key not in DOCUMENTATION_KEYS}, **own_keys}
    if "path" not in filled:
        note = f" ({entry['note']})" if entry.get("note") else ""
        raise ValueError(f"catalog entry {name!r} has no path{note}. Set path to a copy of its data.")
    return filled


def check_catalog_name(name: str) -> None:
    """Raise `ValueError` with the nearest names if the catalog has no entry of this name."""
    if name not in (names := read_catalog()):
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else "The entries are in configs/catalog.yaml."
        raise ValueError(f"no such entry of the catalog: {name!r}. {hint}")
