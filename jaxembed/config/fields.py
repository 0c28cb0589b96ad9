"""Typed access to the entries of a JSON object from a foreign file: a model's config, a run's record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.errors import UserError

MAX_INTEGER = 2**31 - 1  # largest integer that a config or a JSON file may hold


class Fields:
    """Typed access to the entries of a JSON object.

    null counts as absent, and an absent entry takes its default. Every method raises a `UserError` that names the key if the
    entry has another type, is out of range, or is absent without a default.

    Args:
        values: The object.
        where: Its file, which starts an error's line.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = values
        self._where = where

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """Return an integer between `minimum` and `maximum`, both included."""
        value = self._get(key, default, expected := f"an integer from {minimum} to {maximum}")
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self._error(key, value, expected)
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self._get(key, default, expected := "a finite number above 0")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self._error(key, value, expected)
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._get(key, default, expected := "true or false")
        if not isinstance(value, bool):
            raise self._error(key, value, expected)
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default, expected := "a string")
        if not isinstance(value, str):
            raise self._error(key, value, expected)
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """Return one of `choices`."""
        value = self._get(key, default, expected := " or ".join(choices))
        if value not in choices:
            raise self._error(key, value, expected)
        return str(value)

    def mapping(self, key: str, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return an object."""
        value = self._get(key, default, expected := "an object")
        if not isinstance(value, Mapping):
            raise self._error(key, value, expected)
        return dict(value)

    def strings(self, key: str) -> dict[str, str]:
        """Return an object whose values are strings; an empty one if the key is absent."""
        values = self.mapping(key, {})
        if not all(isinstance(value, str) for value in values.values()):
            raise self._error(key, values, "an object of strings")
        return values

    def _get(self, key: str, default: Any, expected: str) -> Any:
        value = self._values.get(key)
        if value is None and default is None:
            raise UserError(f"{self._where}: {key} is missing (expected {expected})")
        return default if value is None else value

    def _error(self, key: str, value: object, expected: str) -> UserError:
        return UserError(f"{self._where}: {key} is {quote_value(value)} (expected {expected})")


def quote_value(value: object, max_chars: int = 80) -> str:
    """Return a value as an error quotes it, shortened to about `max_chars` characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of about {math.log10(abs(value)):.0f} digits"
    if isinstance(value, dict | list | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, str | bytes) and len(value) > max_chars:
        return f"{value[:max_chars]!r}..."
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
