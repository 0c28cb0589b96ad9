"""Templates: texts with placeholders such as {language} or {tasks.item}."""

from __future__ import annotations

import re
from collections.abc import Callable

PLACEHOLDER = re.compile(r"\{\{(?P<escaped>\w+(?:\.\w+)?)\}\}|\{(?P<name>[A-Za-z_]\w*(?:\.\w+)?)\}")


def list_placeholders(template: str) -> list[str]:
    """Return the names of the placeholders of a template, each once, in order.

    A placeholder is a name in braces, with or without a field: {language}, {tasks.item}. Other braces, as in JSON, are text.
    Double braces around a name are an escape for the name in braces.
    """
    return list(dict.fromkeys(match["name"] for match in PLACEHOLDER.finditer(template) if match["name"]))


def fill_placeholders(template: str, get_value: Callable[[str], str]) -> str:
    """Return a template with the values of its placeholders (`list_placeholders`)."""
    return PLACEHOLDER.sub(lambda m: get_value(m["name"]) if m["name"] else f"{{{m['escaped']}}}", template)


def get_only_placeholder(template: str) -> str | None:
    """Return the name of the placeholder that is the whole template, or None."""
    match = PLACEHOLDER.fullmatch(template)
    return match["name"] if match else None
