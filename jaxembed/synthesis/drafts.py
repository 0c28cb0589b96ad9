"""Drafts: training rows in progress. All random draws for a draft depend only on the seed and its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxembed.config.synthesis_steps import ValuesConfig
from jaxembed.config.templates import fill_placeholders, get_only_placeholder
from jaxembed.config.yaml_text import format_scalar
from jaxembed.data.equality import hash_exact_text
from jaxembed.errors import UserError

MAX_VALUE_REDRAWS = 1000  # attempts to draw values that differ
DraftPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A row that is being written.

    Attributes:
        path: Identifies the draft: its task, the index of its first request or input row, and an index for each repeat and
            list item.
        fields: Fields of answers and drawn values, keyed by step; fields of the input row, keyed by input.
        request_keys: Keys of the requests whose answers went into it.
        time: Time of its latest answer; empty if there is none.
        model: Name of the model that gave this answer.
    """

    path: DraftPath
    fields: Mapping[str, Mapping[str, Any]]
    request_keys: tuple[str, ...] = ()
    time: str = ""
    model: str = ""

    @property
    def source_index(self) -> int:
        """Index of the input row that the draft started from."""
        return int(self.path[1])

    def add_fields(self, step_name: str, values: Mapping[str, Any]) -> Draft:
        """Return the draft with the fields of one more step."""
        return dataclasses.replace(self, fields={**self.fields, step_name: values})

    def get_value(self, placeholder: str) -> Any:
        """Return the value of a placeholder STEP.FIELD.

        Raises:
            UserError: The row of an input has no such field.
        """
        name, _, field = placeholder.partition(".")
        values = self.fields[name]
        if field not in values:
            names = ", ".join(values) or "none"
            raise UserError(f"inputs.{name}: a row has no field {field!r} (found {names}). Change the recipe, or the rows.")
        return values[field]


class WeightedChoices(NamedTuple):
    """The possible values of a placeholder, and their probabilities. None: all are equally likely."""

    choices: Sequence[str]
    probabilities: np.ndarray | None


def weight_choices(choices: Sequence[str], config: ValuesConfig) -> WeightedChoices:
    """Return the possible values of a placeholder with the weights of its section."""
    weights = np.array(config.weights)
    return WeightedChoices(choices, weights / weights.sum() if len(weights) else None)


def make_rng(seed: int, path: DraftPath) -> np.random.Generator:
    """Return the random generator of a seed and a path."""
    return np.random.default_rng(hash_exact_text("/".join(map(str, (seed, *path)))))


def make_request_seed(seed: int, path: DraftPath) -> int:
    """Return a seed for the server, from 0 to 2**31 - 1."""
    return int(make_rng(seed, path).integers(2**31))


def draw_values(choices: Mapping[str, WeightedChoices], distinct: Sequence[str], rng: np.random.Generator) -> dict[str, str]:
    """Draw a value for each placeholder.

    Args:
        choices: The possible values, keyed by placeholder.
        distinct: Placeholders whose values must differ from each other.
        rng: The random generator.

    Raises:
        UserError: No draw gave different values.
    """
    for _ in range(MAX_VALUE_REDRAWS):
        drawn_values = {name: str(values[rng.choice(len(values), p=p)]) for name, (values, p) in choices.items()}
        if len({drawn_values[name] for name in distinct}) == len(distinct):
            return drawn_values
    raise UserError(f"distinct: {', '.join(distinct)} have too few different values. Add values.")


def fill_template(template: str, draft: Draft, extra_values: Mapping[str, str] | None = None) -> str:
    """Fill a template with the values of a draft. `extra_values` take precedence."""
    extra = extra_values or {}
    return fill_placeholders(template, lambda name: extra[name] if name in extra else format_value(draft.get_value(name)))


def fill_field(template: str | Sequence[str], draft: Draft) -> Any:
    """Return a field of a row. A template that is one placeholder keeps the value's type. Nested lists are flattened."""
    if isinstance(template, str):
        name = get_only_placeholder(template)
        return draft.get_value(name) if name else fill_template(template, draft)
    values = [fill_field(part, draft) for part in template]
    return [value for part in values for value in (part if isinstance(part, list) else [part])]


def format_value(value: Any) -> str:
    """Return a value as text for a prompt. The strings of a list are joined by line breaks."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return format_scalar(value) if isinstance(value, bool | int | float) else str(value)
