"""Check that names differ: sources store their prompts, and held-out sets their scores, by name.

Only configs that a user gives are checked. Configs that runs recorded are read as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxembed.config.data import SourceConfig
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from jaxembed.config.tree import Config

RESERVED_NAMES = ("query", "document")  # stored prompts that belong to no source


def check_names(config: Config, where: str) -> None:
    """Check that no two sources of a stage, and no two held-out sets, have the same name.

    Sources of different stages may share a name if they read the same path: their prompt is stored once.

    Args:
        config: The settings.
        where: Their origin, which starts an error's line.

    Raises:
        UserError: Two names are equal, or one is reserved.
    """
    # Sources: compare each with those of its stage, and with those of earlier stages. Name -> key and path.
    earlier_sources: dict[str, tuple[str, str]] = {}
    for i, stage in enumerate(config.stages):
        prefix = config.get_key_prefix(i)
        stage_sources: dict[str, tuple[str, str]] = {}
        for j, source in enumerate(stage.data.sources):
            key, name = f"{prefix}data.sources.{j}", source.display_name
            if name in RESERVED_NAMES:
                raise UserError(
                    f"{where}: {key} is named {name!r}, which is reserved for the prompt of every {name}. "
                    f"{_suggest_name(key, source)}"
                )
            other_key, other_path = stage_sources.get(name) or earlier_sources.get(name) or ("", source.path)
            if name in stage_sources or other_path != source.path:
                raise UserError(
                    f"{where}: {key} ({source.path}) is named {name!r}, like {other_key} ({other_path}), but prompts and "
                    f"counts are stored by name. {_suggest_name(key, source)}"
                )
            stage_sources[name] = key, source.path
        earlier_sources |= stage_sources
    # Held-out sets: compare each with the earlier ones. Name -> key.
    sets: dict[str, str] = {}
    for i, held_out in enumerate(config.eval.sets):
        key = f"eval.sets.{i}.name"
        if held_out.name in sets:
            raise UserError(
                f"{where}: {key} is {held_out.name!r}, like {sets[held_out.name]}, but scores are stored by name. "
                "Give each set its own name."
            )
        sets[held_out.name] = key


def _suggest_name(key: str, source: SourceConfig) -> str:
    """Return the sentence that says how to name a source."""
    path = Path(source.path)
    folder = path.parent.name or "my"
    return f"Name it, such as {key}.name: {folder}-{path.stem.strip('*') or 'source'}"
