"""A tree of settings in general: typed, frozen, strict sections, read from YAML, changed by dotted overrides, listed as a
table, and every problem told in one line.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jaxembed.config.fields import LARGEST, shown
from jaxembed.config.removed import SECTION_HINT as PYTHON_PACKAGES_HINT
from jaxembed.errors import LONGEST, UserError, brief

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # what PyYAML raises, of which dates and numbers raise the second


# What is said of pydantic's errors, whose own words speak of Python, by their type; %(...)s are its limits.
EXPECTED = {
    "model_type": "a mapping such as {key: value}", "model_attributes_type": "a mapping such as {key: value}",
    "dict_type": "a mapping such as {key: value}",
    "string_type": """a text (on the command line, one with : or { in quotes: key='"..."')""",
    "string_pattern_mismatch": "letters, digits, _ and - alone",
    "string_too_short": "a text that is not empty", "string_too_long": "%(max_length)s characters at most",
    "tuple_type": "a list such as [a, b]",
    "too_short": "a list of %(min_length)s or more", "too_long": "a list of %(max_length)s at most",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"), "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "greater_than": "a number above %(gt)s", "greater_than_equal": "a number from %(ge)s on",
    "less_than": "a number below %(lt)s", "less_than_equal": "a number up to %(le)s",
}  # fmt: skip


# Keys that other projects have and this one has not, by a part of their name, with the reason.
ABSENT = {
    "accum": "small batches whose gradients are added have fewer negatives than one large batch; set train.batch_size to the "
    "whole number of queries, and gradcache.rows to the rows that memory takes",
    "python_packages": PYTHON_PACKAGES_HINT,
}


class Section(BaseModel):
    """A frozen node of the tree that refuses unknown keys, numbers that are not finite and texts with a NUL."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text must not hold a NUL character")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values of some fields, checked as any input is."""
        return type(self).model_validate({**dict(self), **changes})

    def __hash__(self) -> int:
        """Hash all values, mappings included."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


Positive = Annotated[int, Field(gt=0, le=LARGEST)]
AnySection = TypeVar("AnySection", bound=Section)


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, unchecked."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML ({brief(error, LONGEST)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections such as model: and data:, found {_kind(tree)}")
    return tree


def parse_section(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Checks a nested dict against a part of the tree."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, section)}") from None


def table(section: type[Section]) -> str:
    """`reference` under its header."""
    return "| key | default | meaning |\n|---|---|---|\n" + reference(section)


def reference(section: type[Section], prefix: str = "") -> str:
    """Every key with its default and meaning, a Markdown table row each; `[]` marks the entries of a list.

    Where an entry is one of several sections by its name, the keys of each are told with that name.
    """
    rows: list[str] = []
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if inner:
            listed = typing.get_origin(field.annotation) is tuple
            if field.description and not field.is_required():
                rows.append(f"| `{prefix}{name}` | `{_yaml(field.default)}` | {field.description} |")
            below = f"{prefix}{name}{'[]' if listed else ''}."
            tables = [reference(member, below).splitlines() for member in inner]
            if len(inner) == 1:
                rows += tables[0]
                continue
            shared = [row for row in tables[0] if all(row in other for other in tables)]
            rows += [f"| `{below}name` | required | {' or '.join(map(_tag, inner))} |", *shared]
            for member, of_member in zip(inner, tables, strict=True):
                own = [row for row in of_member if row not in shared and not row.startswith(f"| `{below}name`")]
                rows += [_of_member(row, member) for row in own]
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        choices = [str(choice) for choice in _choices(field.annotation)]
        meaning = "; ".join(filter(None, [" or ".join(choices), field.description]))
        rows.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _of_member(row: str, member: type[Section]) -> str:
    """A row of `reference` whose meaning begins with the name of the section that has the key."""
    key, default, meaning = row.split(" | ", 2)
    return f"{key} | {default} | {_tag(member)}: {meaning}"


def _yaml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal inside an annotation."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(choice for part in typing.get_args(annotation) for choice in _choices(part))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key; a number in the key indexes a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except NOT_YAML as error:
        told = f"the value is not valid YAML ({brief(error, LONGEST)}); a text wants quotes: {key}='\"...\"'"
        raise UserError(f"override {override!r}: {told}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {part} holds {_kind(node)}, not a section")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"override {override!r}: {part!r} is no index into a list of {len(node)} entries")
    return int(part)


def _explain(error: ValidationError, section: type[Section]) -> str:
    """The first problem that a section has, in one line."""
    problem = error.errors()[0]
    loc = tuple(part for part in problem["loc"] if part != "[key]")  # which marks the keys of a mapping
    of_mapping = loc != problem["loc"] and problem["type"] == "literal_error"
    unknown = of_mapping or problem["type"] == "extra_forbidden"
    keys, found = _place(section, loc[:-1] if unknown else loc)
    key = ".".join(keys)
    if unknown:
        wrong = str(loc[-1])
        names = re.findall(r"'(.+?)'", problem["ctx"]["expected"]) if of_mapping else list(found[0].model_fields)
        close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
        told = f"did you mean {'.'.join([*keys, *close])}?" if close else f"known here: {', '.join(names)}"
        told = next((hint for part, hint in ABSENT.items() if part in wrong), told)
        return f"unknown key {'.'.join([*keys, wrong])}; {told}"
    if problem["type"] == "missing" and isinstance(loc[-1], int):
        return f"{'.'.join(keys[:-1])}: expected a longer list (got {shown(problem['input'])})"
    if problem["type"] == "missing":
        return f"{key} is missing; it has no default"
    if problem["type"].startswith("union_tag"):
        got = problem["input"].get("name") if isinstance(problem["input"], dict) else problem["input"]
        return f"{key}.name: expected {' or '.join(map(_tag, found))} (got {shown(got)})"
    if problem["type"] in EXPECTED:
        return f"{key}: expected {EXPECTED[problem['type']] % problem.get('ctx', {})} (got {shown(problem['input'])})"
    told = brief(problem["msg"], LONGEST).removeprefix("Value error, ").replace("Input should be", "expected")
    quoted = isinstance(problem["input"], dict | list) or shown(problem["input"]) in told
    given = "" if quoted else f" (got {shown(problem['input'])})"
    return f"{key}: {told}{given}".lstrip(": ")


def _place(section: type[Section], loc: tuple[int | str, ...]) -> tuple[list[str], list[type[Section]]]:
    """The keys down to a place below a section, and the sections that may stand there."""
    keys: list[str] = []
    found = [section]
    for part in loc:
        named = [member for member in found if len(found) > 1 and _tag(member) == part]
        if named:
            found = named
            continue
        keys.append(str(part))
        if isinstance(part, str) and found and part in found[0].model_fields:
            found = _sections(found[0].model_fields[part].annotation)
    return keys, found


def _sections(annotation: Any) -> list[type[Section]]:
    """The Section classes inside an annotation such as `tuple[SourceConfig, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in typing.get_args(annotation) for section in _sections(part)]


def _tag(section: type[Section]) -> str:
    """The name by which one of several sections is chosen."""
    return str(section.model_fields["name"].default)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
