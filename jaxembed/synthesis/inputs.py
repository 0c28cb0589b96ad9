"""Read the data of a recipe: the rows of its inputs, and files of placeholder values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxembed.config.synthesis import SynthesisConfig
from jaxembed.config.synthesis_steps import AskStepConfig, ValuesConfig
from jaxembed.data.columns import parse_content
from jaxembed.data.containers import open_container
from jaxembed.data.schema import is_text
from jaxembed.errors import UserError
from jaxembed.files import exists
from jaxembed.synthesis.drafts import WeightedChoices, weight_choices

InputRows = Sequence[dict[str, Any]]


def read_inputs(config: SynthesisConfig, where: str) -> dict[str, InputRows]:
    """Return the rows of each input, with long texts truncated.

    Args:
        config: The whole config.
        where: File of the config, for errors.

    Raises:
        UserError: A path is empty, cannot be read, or has no rows.
    """
    for name, path in config.inputs.items():
        if not path:
            raise UserError(f"{where}: inputs.{name} is empty. Set it to your data: inputs.{name}=PATH.")
    return {name: [_truncate(row, config.input_chars) for row in read_rows(path)] for name, path in config.inputs.items()}


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file or folder. Raise `UserError` if it has none."""
    rows = [dict(parse_content(content, where)) for _, where, content in open_container(path).scan()]
    if not rows:
        raise UserError(f"{path}: has no rows. Add rows, or name another file.")
    return rows


def _truncate(row: dict[str, Any], max_chars: int) -> dict[str, Any]:
    return {field: value[:max_chars] if isinstance(value, str) else value for field, value in row.items()}


def hash_inputs(inputs: dict[str, InputRows]) -> str:
    """Return the SHA-256 of the rows of all inputs, in hexadecimal."""
    digest = hashlib.sha256()
    for name, rows in sorted(inputs.items()):
        for row in rows:
            digest.update(json.dumps([name, row], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_choices(config: AskStepConfig, recipe: Path) -> dict[str, WeightedChoices]:
    """Return the possible values of the placeholders of a step. Relative paths are also looked up next to the recipe."""
    return {name: weight_choices(_list_choices(values, recipe), values) for name, values in config.values.items()}


def _list_choices(config: ValuesConfig, recipe: Path) -> Sequence[str]:
    if config.choices:
        return config.choices
    path = Path(config.file)
    path = path if exists(path) or path.is_absolute() else recipe.parent / path
    choices = [str(row[config.field]) for row in read_rows(str(path)) if is_text(row.get(config.field))]
    if not choices:
        raise UserError(f"{path}: no row has a text in the field {config.field!r}. Set field, or name another file.")
    return list(dict.fromkeys(choices))
