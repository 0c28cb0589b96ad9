"""Find the folder that a name refers to, and download it from the Hugging Face hub if needed. Needs no JAX."""

from __future__ import annotations

import re
from pathlib import Path

from jaxembed.errors import UserError, summarize
from jaxembed.files import exists, expand_home
from jaxembed.formats.peft_config import ADAPTER_CONFIG_FILE, is_peft_folder
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.model.presets import find_preset

PRESET_PREFIX = "preset:"
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]  # patterns of the files we read, in folders too


def check_base_exists(name: str) -> None:
    """Raise `UserError` if `model.base` names no preset, run directory, folder, or hub id. A hub model is downloaded."""
    if name.startswith(PRESET_PREFIX):
        find_preset(name.removeprefix(PRESET_PREFIX))
    else:
        find_folder(name)


def find_folder(name: str) -> Path:
    """Return the folder that a name refers to: a run directory, a model folder, or the local snapshot of a hub repository.

    A hub repository is downloaded first.

    Raises:
        UserError: There is no such folder, or it is none of these.
    """
    path = expand_home(name)
    if exists(path / "config.json") or exists(path / BASE_RECORD_FILE) or is_peft_folder(path):
        return path
    if not exists(path) and not name.startswith((".", "/", "~")) and is_hub_id(name):
        return download_model(name)
    if adapters := sorted(inner.parent.name for inner in path.glob(f"*/{ADAPTER_CONFIG_FILE}")):
        raise UserError(
            f"{name}: has one folder for each of the adapters {', '.join(adapters)}. Choose one, such as {path / adapters[0]}."
        )
    raise UserError(
        f"{name}: neither a folder with a config.json or an {ADAPTER_CONFIG_FILE}, nor a run directory, nor a hub id such as "
        "Qwen/Qwen2-0.5B. Check the name."
    )


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form OWNER/REPOSITORY."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def download_model(hub_id: str) -> Path:
    """Return the local snapshot of a hub repository. Files that are not in the hub's cache are downloaded.

    Raises:
        UserError: The hub has no such repository, or it cannot be reached.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=DOWNLOAD_PATTERNS))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if is_offline else summarize(error.__cause__ or error)
        raise UserError(
            f"{hub_id}: no such folder, not in the hub's cache, and the hub cannot be reached ({reason}). "
            "Connect, or give a local folder."
        ) from None
    except Exception as error:  # authentication and file system errors of several libraries
        raise UserError(f"{hub_id}: no such folder, and the hub has no model of that name ({summarize(error)}).") from None
