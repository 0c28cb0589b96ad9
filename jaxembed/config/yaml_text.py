"""Read YAML, but take a plain scalar as a number, truth value or null only if it has the form that this program writes.

YAML 1.1 reads `no` as false, `007` as 7, `1.10` as 1.1, `12:30` as 750, and `2024-01-01` as a date. In a list of languages or
labels, that would be silently wrong. Here they stay texts, as written. A key that expects a number or a truth value still takes
them, because pydantic parses texts: `steps: 1_000`, `remat: yes`. `format_scalar` returns any scalar as it was written.

A key that occurs twice in a mapping is an error. YAML would silently keep the last one.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

# What PyYAML raises. Numbers with too many digits raise ValueError.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)

TAG = "tag:yaml.org,2002:"
MERGE_TAG = f"{TAG}merge"
# Tag -> pattern of the scalars, and the characters that they start with.
SCALARS = {
    f"{TAG}null": (r"(?:~|null|)", ["~", "n", ""]),
    f"{TAG}bool": (r"(?:true|false)", list("tf")),
    f"{TAG}int": (r"(?:0|-?[1-9][0-9]*)", list("-0123456789")),
    f"{TAG}float": (r"(?:-?(?:0|[1-9][0-9]*)\.[0-9]+|-?\.inf|\.nan)", list("-.0123456789")),
    MERGE_TAG: ("<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as in the base class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises `ConstructorError` if a key occurs twice."""
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if key_node.tag != MERGE_TAG else None
            if isinstance(key, str | int | float):
                if key in keys:
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping", node.start_mark, f"found key {key!r} twice", key_node.start_mark
                    )
                keys.add(key)
        return super().construct_mapping(node, deep)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    """Return a number, or the text if the number would be written differently, such as 1.10."""
    text = loader.construct_scalar(node)
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return number if format_scalar(number) == text else text


for _tag, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"{_pattern}$"), _first)
_Loader.add_constructor(f"{TAG}float", _construct_float)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises one of `YAML_ERRORS`."""
    return yaml.load(text, _Loader)  # a subclass of SafeLoader


def format_scalar(value: bool | int | float | str) -> str:
    """Return a scalar as it was written: a text itself, and anything else in its only spelling."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return str(value)
