"""Typed reading of a JSON object that others wrote: a model's config, a spec, a run's record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.errors import UserError

LARGEST = 2**31 - 1


class Fields:
    """The entries of an object, each read as the type that is asked for. `where` names its file, for errors.

    null counts as absent, and what is absent takes its default. Everything raises `UserError` naming the key: where it is
    of another type or out of range, and where it is absent without a default.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = values
        self._where = where

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self._value(key, default, expected := f"a whole number from {least} to {most}")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._refusal(key, value, expected)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default, expected := "a finite number above 0")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self._refusal(key, value, expected)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._value(key, default, expected := "true or false")
        if not isinstance(value, bool):
            raise self._refusal(key, value, expected)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default, expected := "a string")
        if not isinstance(value, str):
            raise self._refusal(key, value, expected)
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = self._value(key, default, expected := " or ".join(choices))
        if value not in choices:
            raise self._refusal(key, value, expected)
        return str(value)

    def mapping(self, key: str, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        value = self._value(key, default, expected := "an object")
        if not isinstance(value, Mapping):
            raise self._refusal(key, value, expected)
        return dict(value)

    def texts(self, key: str) -> dict[str, str]:
        """Strings by name; none where the key is absent."""
        found = self.mapping(key, {})
        if not all(isinstance(text, str) for text in found.values()):
            raise self._refusal(key, found, "an object of strings")
        return found

    def _value(self, key: str, default: Any, expected: str) -> Any:
        value = self._values.get(key)
        if value is None and default is None:
            raise UserError(f"{self._where}: {key} is missing; expected {expected}")
        return default if value is None else value

    def _refusal(self, key: str, value: object, expected: str) -> UserError:
        return UserError(f"{self._where}: {key} is {shown(value)}; expected {expected}")


def shown(value: object, most: int = 80) -> str:
    """A value as it stands in an error, however large it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of about {math.log10(abs(value)):.0f} digits"
    if isinstance(value, dict | list | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, str | bytes) and len(value) > most:
        return f"{value[:most]!r}..."
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
