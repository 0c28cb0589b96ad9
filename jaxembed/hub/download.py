"""Download model repositories from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxembed.errors import UserError, summarize

DOWNLOADED_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*/config.json"]  # patterns of the files we read


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
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=DOWNLOADED_FILES))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if is_offline else summarize(error.__cause__ or error)
        raise UserError(
            f"{hub_id}: no such folder, not in the hub's cache, and the hub cannot be reached ({reason}). "
            "Connect, or give a local folder."
        ) from None
    except Exception as error:  # authentication and file system errors of several libraries
        raise UserError(f"{hub_id}: no such folder, and the hub has no model of that name ({summarize(error)}).") from None
