"""Named sources: a source of a config may take its keys from an entry of the shipped catalog."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxembed.config.shipped import CATALOG_FILE, read_shipped_yaml
from jaxembed.errors import UserError

DOCUMENTATION_KEYS = frozenset({"license", "seen", "note"})  # describe an entry; its other keys are those of a source

NO_PATH_PREFIX = "catalog:"  # starts the path of a source whose entry has none


def read_catalog() -> Mapping[str, Mapping[str, Any]]:
    """Return the entries of the catalog by name, unchecked."""
    return read_shipped_yaml(CATALOG_FILE)


def fill_from_catalog(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a source with those of its catalog entry filled in.

    The keys of the source replace those of the entry, each as a whole. The source is named after the entry, unless it has a
    name. If neither has a path, it gets one that cannot be opened (`check_has_path`): other parts of the config can be used. An
    unknown entry leaves the source as it is, for `check_catalog_name` to refuse.

    Args:
        source: Keys of a source, unchecked. `catalog` names the entry.
    """
    name = source["catalog"]
    entry = read_catalog().get(name) if isinstance(name, str) else None
    if entry is None:
        return dict(source)
    own_keys = {key: value for key, value in source.items() if key != "catalog"}
    entry_keys = {key: value for key, value in entry.items() if key not in DOCUMENTATION_KEYS}
    return {"name": name, "path": f"{NO_PATH_PREFIX}{name}", **entry_keys, **own_keys}


def check_has_path(path: str) -> None:
    """Raise `UserError` if the path of a source stands for a catalog entry that has none."""
    if path.startswith(NO_PATH_PREFIX):
        name = path.removeprefix(NO_PATH_PREFIX)
        note = str(read_catalog().get(name, {}).get("note", "")).strip().removesuffix(".")
        detail = f" ({note})" if note else ""
        raise UserError(f"catalog entry {name!r} has no path{detail}. Set the path of its source to a copy of the data.")


def check_catalog_name(name: str) -> None:
    """Raise `ValueError` with the nearest names if the catalog has no entry of this name."""
    if name not in (names := read_catalog()):
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else "The entries are in configs/catalog.yaml."
        raise ValueError(f"no such entry of the catalog: {name!r}. {hint}")
