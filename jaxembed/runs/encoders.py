"""The frozen models of a run: its guide and its teacher."""

from __future__ import annotations

from pathlib import Path

from jaxembed.config import Config
from jaxembed.config.fields import Fields
from jaxembed.files import cache_dir, exists, read_json
from jaxembed.formats.run_files import read_run_file
from jaxembed.hub.frozen_encoder import FrozenEncoder, open_frozen_encoder
from jaxembed.verification.served_teacher import is_served, open_served_teacher


def open_encoders(config: Config) -> dict[str, FrozenEncoder]:
    """Open the guide and the teacher, by role. A model with both roles is opened once.

    Raises:
        UserError: A model cannot be loaded, or a server cannot be reached.
    """
    names, recorded_hashes = config.models_by_role, _read_recorded_hashes(config)
    encoders = {
        name: open_served_teacher(name, cache_dir())
        if is_served(name)
        else open_frozen_encoder(name, cache_dir(), recorded_hash=recorded_hashes.get(name, ""))
        for name in dict.fromkeys(names.values())
    }
    return {role: encoders[name] for role, name in names.items()}


def _read_recorded_hashes(config: Config) -> dict[str, str]:
    """Return the hashes of guide and teacher, by the name of the model, that a run has recorded; empty for a new run."""
    paths = {name: Path(config.run.dir) / f"{role}.json" for role, name in config.models_by_role.items()}
    return {
        name: Fields(read_run_file(read_json, path), str(path)).string("hash") for name, path in paths.items() if exists(path)
    }
