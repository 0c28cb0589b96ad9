"""Account for every field of a foreign JSON file: read, ignored because it is harmless, or refused.

Each reader keeps a `FieldList` of its file. A field that would change the vectors and is not implemented is refused. A field on
no list is logged once, because a newer library may have added it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxembed.config.fields import quote_value
from jaxembed.errors import UserError

log = logging.getLogger("jaxembed")

_logged: set[str] = set()


@dataclasses.dataclass(frozen=True)
class FieldList:
    """What happens to the fields of one kind of file.

    Attributes:
        read: Fields that the reader interprets.
        harmless: Fields that do not change vectors.
        refused: Fields that would change vectors, each with the values under which they do not. null and an empty list or
            object always count as such a value.
    """

    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]

    @property
    def known(self) -> frozenset[str]:
        """All fields of the list."""
        return self.read | self.harmless | self.refused.keys()

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Check the fields of a file. Fields that are on no list are logged once per process.

        Args:
            values: Content of the file.
            where: Its path, for messages.

        Raises:
            UserError: A field has a value whose effect is not implemented.
        """
        set_values = {key: value for key, value in values.items() if value is not None and value not in ([], {})}
        for key in self.refused:
            value, neutral = set_values.get(key), self.refused[key]
            if key not in set_values or any(type(value) is type(x) and value == x for x in neutral):
                continue
            expected = " or ".join(map(quote_value, neutral)) or "no such field"
            value_text = quote_value(value) if isinstance(value, str | int | float | bool) else str(value)[:80]
            raise UserError(f"{where}: {key} {value_text} is not supported (expected {expected}). Use a model without it.")
        if unknown := sorted(key for key in set_values.keys() - self.known if not key.startswith("_")):
            log_once(f"{where}: unknown fields are not read ({', '.join(unknown)[:200]})")


def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message unless this process has logged it before."""
    if message not in _logged:
        _logged.add(message)
        log.log(level, "%s", message)
