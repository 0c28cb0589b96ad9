"""Drafts: training rows that are being written. Everything that is drawn for one depends on the seed and its path alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxembed.config.synthesis_steps import ValuesConfig
from jaxembed.config.templates import fill_placeholders, get_only_placeholder
from jaxembed.config.yaml_text import write_scalar
from jaxembed.data.equality import hash_exact_text
from jaxembed.errors import UserError

MAX_VALUE_REDRAWS = 1000  # of values that must differ
Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A row that is being written.

    Attributes:
        path: What identifies it: the task, the number of its first request or input row, and the numbers that followed.
        fields: Fields of the answers and drawn values by step, and of the input row by input.
        keys: Keys of the requests whose answers it is made of.
        time: When its last answer came; empty if there was none.
        model: Name of the model of that answer.
    """

    path: Path
    fields: Mapping[str, Mapping[str, Any]]
    keys: tuple[str, ...] = ()
    time: str = ""
    model: str = ""

    @property
    def source_row(self) -> int:
        """Index of the input row that it started from."""
        return int(self.path[1])

    def add(self, name: str, values: Mapping[str, Any]) -> Draft:
        """Return the draft with the fields of one more step."""
        return dataclasses.replace(self, fields={**self.fields, name: values})

    def get_value(self, placeholder: str) -> Any:
        """Return the value of a placeholder STEP.FIELD.

        Raises:
            UserError: The row of an input has no such field.
        """
        name, _, field = placeholder.partition(".")
        values = self.fields[name]
        if field not in values:
            known = ", ".join(values) or "none"
            raise UserError(f"inputs.{name}: a row has no field {field!r} (found {known}). Change the recipe, or the rows.")
        return values[field]


class Values(NamedTuple):
    """The values of a placeholder, and their probabilities. None: all are equal."""

    choices: Sequence[str]
    probabilities: np.ndarray | None


def make_values(choices: Sequence[str], config: ValuesConfig) -> Values:
    """Return the values of a placeholder with the weights of its section."""
    weights = np.array(config.weights)
    return Values(choices, weights / weights.sum() if len(weights) else None)


def make_rng(seed: int, path: Sequence[str | int]) -> np.random.Generator:
    """Return the generator of a seed and a path."""
    return np.random.default_rng(hash_exact_text("/".join(map(str, (seed, *path)))))


def make_request_seed(seed: int, path: Sequence[str | int]) -> int:
    """Return a seed for the server, from 0 to 2**31 - 1."""
    return int(make_rng(seed, path).integers(2**31))


def draw_values(values: Mapping[str, Values], distinct: Sequence[str], rng: np.random.Generator) -> dict[str, str]:
    """Draw a value for each placeholder.

    Args:
        values: The values by placeholder.
        distinct: Placeholders whose values must differ from each other.
        rng: The generator.

    Raises:
        UserError: No draw had values that differ.
    """
    for _ in range(MAX_VALUE_REDRAWS):
        drawn = {name: str(choices[rng.choice(len(choices), p=p)]) for name, (choices, p) in values.items()}
        if len({drawn[name] for name in distinct}) == len(distinct):
            return drawn
    raise UserError(f"distinct: {', '.join(distinct)} have no values that differ. Add values.")


def fill_template(template: str, draft: Draft, own: Mapping[str, str] | None = None) -> str:
    """Return a template with the values of a draft, and of placeholders that only this template has."""
    own = own or {}
    return fill_placeholders(template, lambda name: own[name] if name in own else write_value(draft.get_value(name)))


def fill_field(template: str | Sequence[str], draft: Draft) -> Any:
    """Return a field of a row. A placeholder alone keeps the type of its value. In a list, a list takes several places."""
    if isinstance(template, str):
        name = get_only_placeholder(template)
        return draft.get_value(name) if name else fill_template(template, draft)
    values = [fill_field(part, draft) for part in template]
    return [value for part in values for value in (part if isinstance(part, list) else [part])]


def write_value(value: Any) -> str:
    """Return a value as a prompt quotes it. The strings of a list are joined by line breaks."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return write_scalar(value) if isinstance(value, bool | int | float) else str(value)
