"""Settings that were removed: `python_packages`, which is now a command.

New configs are refused with the command to run instead. Recorded configs of earlier runs are translated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMOVED_SOURCE = "python_packages"
PACKAGES_FOLDER = "data/packages"
PACKAGES_TRAIN_FILE = f"{PACKAGES_FOLDER}/train.jsonl"
COMMAND_HINT = f"Run 'python -m jaxembed.data packages {PACKAGES_FOLDER}'"
SECTION_HINT = (
    f"Its keys are now options of a command. {COMMAND_HINT} (--packages, --holdout-package, --holdout-functions) "
    "and remove the section."
)


def reject_python_packages(key: str, value: Any) -> None:
    """Raise `ValueError` if a value of a source or a held-out set names Python packages, which a command now writes to files.

    Args:
        key: Name of the key, `path` or `format`.
        value: Value of the key, not checked yet.
    """
    if value == REMOVED_SOURCE:
        extra = ", without format" if key == "format" else ""
        raise ValueError(f"{value!r} is no longer a source. {COMMAND_HINT} and set path: {PACKAGES_TRAIN_FILE}{extra}.")
    if isinstance(value, str) and value.startswith(f"{REMOVED_SOURCE}:"):
        raise ValueError(f"{value!r} is no longer a held-out set. {COMMAND_HINT} and set path: {_name_held_out_folder(value)}.")


def upgrade_run_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded config of an earlier run, translated to the current keys.

    A run that trained on Python packages is read as if it had trained on the files that
    `python -m jaxembed.data packages data/packages` writes. They hold the same rows.
    """
    upgraded = dict(tree)
    if "data" in tree:
        upgraded["data"] = _upgrade_data(tree["data"])
    if isinstance(stages := tree.get("stages"), list):
        upgraded["stages"] = [
            {**stage, "data": _upgrade_data(stage["data"])} if isinstance(stage, dict) and "data" in stage else stage
            for stage in stages
        ]
    if isinstance(evaluation := tree.get("eval"), dict) and isinstance(sets := evaluation.get("sets"), list):
        upgraded["eval"] = {**evaluation, "sets": [_upgrade_set(held_out) for held_out in sets]}
    return upgraded


def _upgrade_data(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    upgraded = {name: value for name, value in data.items() if name != REMOVED_SOURCE}
    if isinstance(sources := data.get("sources"), list):
        upgraded["sources"] = [_upgrade_source(source) for source in sources]
    return upgraded


def _upgrade_source(source: Any) -> Any:
    if isinstance(source, dict) and source.get("pair_templates"):
        return {"equality": "exact", **source}  # the rule before the key existed
    if not isinstance(source, dict) or REMOVED_SOURCE not in (source.get("path"), source.get("format")):
        return source
    # The name of a source selects its prompts. It defaulted to the stem of the path.
    name = source.get("name") or source.get("path")
    kind = "auto" if source.get("format") == REMOVED_SOURCE else source.get("format", "auto")
    return {**source, "path": PACKAGES_TRAIN_FILE, "name": name, "format": kind}


def _upgrade_set(held_out: Any) -> Any:
    path = held_out.get("path") if isinstance(held_out, dict) else None
    if not isinstance(path, str) or not path.startswith(f"{REMOVED_SOURCE}:"):
        return held_out
    return {**held_out, "path": _name_held_out_folder(path)}


def _name_held_out_folder(path: str) -> str:
    return f"{PACKAGES_FOLDER}/{path.removeprefix(f'{REMOVED_SOURCE}:')}"
