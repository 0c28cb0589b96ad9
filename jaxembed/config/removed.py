"""Settings that are no longer read: the error that says what to write instead, and how earlier runs are still read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = "python_packages"
FOLDER = "data/packages"
TRAIN_FILE = f"{FOLDER}/train.jsonl"
COMMAND = f"Run 'python -m jaxembed.data packages {FOLDER}'"
SECTION_HINT = (
    f"Its keys are now options of a command. {COMMAND} (--packages, --holdout-package, --holdout-functions) "
    "and remove the section."
)


def reject_python_packages(key: str, value: Any) -> None:
    """Raise `ValueError` if a value of a source or a held-out set names Python packages, which are now written to files.

    Args:
        key: Name of the key, `path` or `format`.
        value: Value of the key, not checked yet.
    """
    if value == NAME:
        extra = ", without format" if key == "format" else ""
        raise ValueError(f"{value!r} is no longer a source. {COMMAND} and set path: {TRAIN_FILE}{extra}.")
    if isinstance(value, str) and value.startswith(f"{NAME}:"):
        raise ValueError(f"{value!r} is no longer a held-out set. {COMMAND} and set path: {_held_out_folder(value)}.")


def upgrade_run_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded config of an earlier run with the keys of today.

    A run that trained on Python packages is read as if it had trained on the files that
    `python -m jaxembed.data packages data/packages` writes. They hold the same rows.
    """
    upgraded = {**tree, "data": _upgrade_data(tree.get("data"))}
    if isinstance(stages := tree.get("stages"), list):
        upgraded["stages"] = [
            {**stage, "data": _upgrade_data(stage["data"])} if isinstance(stage, dict) and "data" in stage else stage
            for stage in stages
        ]
    if isinstance(held_out := tree.get("eval"), dict) and isinstance(sets := held_out.get("sets"), list):
        upgraded["eval"] = {**held_out, "sets": [_upgrade_set(one) for one in sets]}
    return upgraded if "data" in tree else {name: value for name, value in upgraded.items() if name != "data"}


def _upgrade_data(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    upgraded = {name: value for name, value in data.items() if name != NAME}
    if isinstance(sources := data.get("sources"), list):
        upgraded["sources"] = [_upgrade_source(source) for source in sources]
    return upgraded


def _upgrade_source(source: Any) -> Any:
    if not isinstance(source, dict) or NAME not in (source.get("path"), source.get("format")):
        return source
    # The name of a source selects its prompts; without one it was the stem of the path.
    name = source.get("name") or source.get("path")
    kind = "auto" if source.get("format") == NAME else source.get("format", "auto")
    return {**source, "path": TRAIN_FILE, "name": name, "format": kind}


def _upgrade_set(held_out: Any) -> Any:
    path = held_out.get("path") if isinstance(held_out, dict) else None
    return {**held_out, "path": _held_out_folder(path)} if isinstance(path, str) and path.startswith(f"{NAME}:") else held_out


def _held_out_folder(path: str) -> str:
    return f"{FOLDER}/{path.removeprefix(f'{NAME}:')}"
