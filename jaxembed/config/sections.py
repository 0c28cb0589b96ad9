"""Sections of a settings tree: typed, frozen, strict; read from YAML, changed by dotted overrides, listed as a table.

Every problem is reported in one line.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from jaxembed.config.fields import MAX_INTEGER, quote_value
from jaxembed.config.removed import SECTION_HINT as PYTHON_PACKAGES_HINT
from jaxembed.config.yaml_text import YAML_ERRORS, load_yaml
from jaxembed.errors import MAX_MESSAGE_CHARS, UserError, summarize

# Expected value by pydantic error type, because pydantic's own messages use Python terms. %(...)s are the limits.
EXPECTATIONS = {
    "model_type": "a mapping such as {key: value}", "model_attributes_type": "a mapping such as {key: value}",
    "dict_type": "a mapping such as {key: value}",
    "string_type": """a text; quote a number, true, false, null, or one that has : or {; on the command line: key='"..."'""",
    "string_pattern_mismatch": "only letters, digits, _, and -",
    "string_too_short": "a text that is not empty", "string_too_long": "at most %(max_length)s characters",
    "tuple_type": "a list such as [a, b]",
    "too_short": "a list of at least %(min_length)s", "too_long": "a list of at most %(max_length)s",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"), "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "greater_than": "a number above %(gt)s", "greater_than_equal": "a number that is at least %(ge)s",
    "less_than": "a number below %(lt)s", "less_than_equal": "a number that is at most %(le)s",
}  # fmt: skip


# Advice for keys that other tools have, by a part of the key's name.
UNSUPPORTED_KEYS = {
    "accum": "gradient accumulation over small batches gives fewer negatives than one large batch. Set train.batch_size to all "
    "queries of a step, and gradcache.rows to the rows that fit into memory.",
    "python_packages": PYTHON_PACKAGES_HINT,
}


class Section(BaseModel):
    """A frozen node of the tree. It refuses unknown keys, numbers that are not finite, and texts with a NUL character."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _reject_nul(cls, value: Any) -> Any:
        if _contains_nul(value):
            raise ValueError("a text must not contain a NUL character")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced, validated like any input."""
        return type(self).model_validate({**dict(self), **changes})

    def __hash__(self) -> int:
        """Hash all values, mappings included."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


def _contains_nul(value: Any) -> bool:
    """Return whether a text, or one inside collections, contains a NUL character."""
    if isinstance(value, dict):
        return any(map(_contains_nul, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(_contains_nul, value))
    return isinstance(value, str) and "\0" in value


Positive = Annotated[int, Field(gt=0, le=MAX_INTEGER)]


def _check_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression of Python ({error})") from None
    return patterns


Patterns = Annotated[tuple[str, ...], AfterValidator(_check_patterns)]  # regular expressions
AnySection = TypeVar("AnySection", bound=Section)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the mapping in a YAML file, unchecked.

    Args:
        path: The file.
        overrides: Settings of the form `key.sub=value`, applied in order.

    Raises:
        UserError: The file is missing, not UTF-8, not YAML, or not a mapping; or an override does not apply (`apply_override`).
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except YAML_ERRORS as error:
        raise UserError(f"{path}: not valid YAML ({summarize(error, MAX_MESSAGE_CHARS)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {_describe_type(tree)} (expected a mapping of sections such as model: and data:)")
    for override in overrides:
        apply_override(tree, override)
    return tree


def parse_section(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Check a nested mapping against a section.

    Args:
        section: The section's class.
        tree: The settings.
        where: Their origin, which starts an error's line.

    Raises:
        UserError: A key is unknown, missing, or has a wrong value.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, section)}") from None


def make_key_table(section: type[Section]) -> str:
    """Return a Markdown table of every key of a section: key, default, meaning."""
    return "| key | default | meaning |\n|---|---|---|\n" + format_reference_rows(section)


def format_reference_rows(section: type[Section], prefix: str = "", values: Section | None = None) -> str:
    """Return Markdown table rows, one per key, with its default and meaning.

    `[]` marks the entries of a list, `KEY` those of a mapping. The `name` or `kind` of an entry may choose one of several
    sections. A key that not all of these have gets a row for each section that has it, which starts with the section's name.

    Args:
        section: The section.
        prefix: Prefix of its keys.
        values: The value of the section if it is not set. Default: its keys have their own defaults.
    """
    rows: list[str] = []
    for name, field in section.model_fields.items():
        default_value = field.default if values is None else getattr(values, name)
        nested_sections = _find_sections(field.annotation)
        if nested_sections and (field.json_schema_extra or {}) == {"nested_rows": False}:
            rows.append(f"| `{prefix}{name}` | `[]` | {field.description} |")
        elif nested_sections:
            if field.description and not field.is_required():
                rows.append(f"| `{prefix}{name}` | `{_to_json(default_value)}` | {field.description} |")
            suffixes: dict[Any, str] = {tuple: "[]", dict: ".KEY"}
            suffix = suffixes.get(typing.get_origin(field.annotation), "")
            nested_values = default_value if isinstance(default_value, Section) else None
            rows += _format_nested_rows(nested_sections, f"{prefix}{name}{suffix}.", nested_values)
        else:
            default = "required" if values is None and field.is_required() else f"`{_to_json(default_value)}`"
            meaning = ". ".join(filter(None, [_format_choices(field.annotation), field.description]))
            rows.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _format_nested_rows(sections: list[type[Section]], prefix: str, values: Section | None) -> list[str]:
    """Return the rows of the sections that a key may hold, common keys first. `values` is the key's default, if it has one."""
    own_values = [values if isinstance(values, member) else None for member in sections]
    tables = [format_reference_rows(member, prefix, own).splitlines() for member, own in zip(sections, own_values, strict=True)]
    if len(sections) == 1:
        return tables[0]
    shared_rows = [row for row in tables[0] if all(row in other for other in tables)]
    tag_key = f"| `{prefix}{_find_tag_field(sections[0])}` |"
    rows = [f"{tag_key} required | One of {', '.join(map(_get_tag, sections))}. |", *shared_rows]
    for member, member_rows in zip(sections, tables, strict=True):
        specific_rows = [row for row in member_rows if row not in shared_rows and not row.startswith(tag_key)]
        for row in specific_rows:
            key, default, meaning = row.split(" | ", 2)
            rows.append(f"{key} | {default} | {_get_tag(member)}: {meaning}")
    return rows


def dump_changed_keys(section: Section) -> dict[str, Any]:
    """Return the keys that differ from their defaults, as plain values, and those that choose one of several sections."""
    changed, keys = section.model_dump(mode="json", exclude_defaults=True), dict[str, Any]()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name not in changed and len(_list_choices(field.annotation)) != 1:
            continue
        if isinstance(value, Section):
            keys[name] = dump_changed_keys(value)
        elif isinstance(value, tuple) and any(isinstance(entry, Section) for entry in value):
            keys[name] = [dump_changed_keys(entry) for entry in value]
        else:
            keys[name] = changed.get(name, value)
    return keys


def _to_json(value: Any) -> str:
    if isinstance(value, Section):
        return value.model_dump_json(exclude_defaults=True)
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace("|", r"\|")  # a bar ends a cell of a table


def _format_choices(annotation: Any) -> str:
    """Return "One of a, b" for a Literal, "Any of a, b" for a collection of them, and nothing for other annotations."""
    choices = ", ".join(map(str, _list_choices(annotation)))
    quantity = "Any" if typing.get_origin(annotation) in (tuple, dict) else "One"
    return f"{quantity} of {choices}" if choices else ""


def _list_choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal inside an annotation."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(choice for part in typing.get_args(annotation) for choice in _list_choices(part))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of a tree in place. A number in the key indexes a list.

    Raises:
        UserError: The override is not `key.sub=value`, its value is not YAML, or its key leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, such as train.steps=100")
    try:
        value = load_yaml(text)
    except YAML_ERRORS as error:
        reason = summarize(error, MAX_MESSAGE_CHARS)
        raise UserError(
            f"override {override!r}: the value is not valid YAML ({reason}). Quote a text: {key}='\"...\"'"
        ) from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_parse_list_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {part} is {_describe_type(node)}, not a section")
    if isinstance(node, list):
        node[_parse_list_index(node, last, override)] = value
    else:
        node[last] = value


def _parse_list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"override {override!r}: {part!r} is not an index into a list of {len(node)} entries")
    return int(part)


def _explain(error: ValidationError, section: type[Section]) -> str:
    """Return one line about the first problem of a section."""
    problem = _choose_problem(error)
    kind, value = problem["type"], problem["input"]
    # pydantic marks the keys of a mapping with "[key]".
    loc = tuple(part for part in problem["loc"] if part != "[key]")
    # A key that does not exist.
    is_mapping_key = loc != problem["loc"] and kind == "literal_error"
    if is_mapping_key or kind == "extra_forbidden":
        keys, sections = _locate(section, loc[:-1])
        known_keys = re.findall(r"'(.+?)'", problem["ctx"]["expected"]) if is_mapping_key else list(sections[0].model_fields)
        return _explain_unknown_key(keys, str(loc[-1]), known_keys)
    # A key or a list entry that is missing.
    keys, sections = _locate(section, loc)
    key = ".".join(keys)
    if kind == "missing" and isinstance(loc[-1], int):
        return f"{'.'.join(keys[:-1])} is {quote_value(value)} (expected a longer list)"
    if kind == "missing":
        return f"{key} is missing. It has no default."
    # A name or kind that chooses none of several sections.
    if kind.startswith("union_tag"):
        field = _find_tag_field(sections[0])
        tag = value.get(field) if isinstance(value, dict) else value
        return f"{key}.{field} is {quote_value(tag)} (expected {' or '.join(map(_get_tag, sections))})"
    # An override such as eval.sets.0.path=x of a list that the config does not have.
    if kind == "tuple_type" and isinstance(value, dict) and "".join(map(str, value)).isdecimal():
        return f"{key} has no entry {next(iter(value))}, because the config has no such list. Give all of it: {key}=[{{...}}]"
    # A wrong value: in our terms, otherwise with the message of our own check or of pydantic.
    if kind in EXPECTATIONS:
        return f"{key} is {quote_value(value)} (expected {EXPECTATIONS[kind] % problem.get('ctx', {})})"
    message = summarize(problem["msg"], MAX_MESSAGE_CHARS).removeprefix("Value error, ").replace("Input should be", "expected")
    if isinstance(value, dict | list) or quote_value(value) in message.removeprefix("expected "):
        return f"{key}: {message}".lstrip(": ")
    if message.startswith("expected "):
        choices = re.findall(r"'(.+?)'", message) if kind == "literal_error" else []
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f". Did you mean {nearest[0]}?" if nearest else ""
        return f"{key} is {quote_value(value)} ({message}){hint}"
    return f"{key}: {message} (found {quote_value(value)})"


def _choose_problem(error: ValidationError) -> Any:
    """Return the first problem. A missing key next to an unknown one is probably misspelled; then return the unknown one."""
    first, *others = error.errors()
    unknown = [other for other in others if other["type"] == "extra_forbidden" and other["loc"][:-1] == first["loc"][:-1]]
    return unknown[0] if unknown and first["type"] == "missing" else first


def _explain_unknown_key(keys: list[str], unknown: str, known_keys: list[str]) -> str:
    """Return one line about an unknown key below `keys`, with the nearest known one."""
    nearest = difflib.get_close_matches(unknown, known_keys, n=1, cutoff=0.5)
    hint = f"Did you mean {'.'.join([*keys, *nearest])}?" if nearest else f"Known keys: {', '.join(known_keys)}"
    hint = next((reason for part, reason in UNSUPPORTED_KEYS.items() if part in unknown), hint)
    return f"unknown key {'.'.join([*keys, unknown])}. {hint[0].upper()}{hint[1:]}"


def _locate(section: type[Section], loc: tuple[int | str, ...]) -> tuple[list[str], list[type[Section]]]:
    """Return the keys down to a location below a section, and the sections that may be there."""
    keys: list[str] = []
    sections, is_mapping = [section], False
    for part in loc:
        tagged_sections = [member for member in sections if len(sections) > 1 and _get_tag(member) == part]
        if tagged_sections:  # pydantic puts the name that chose one of several sections into the location
            sections = tagged_sections
            continue
        keys.append(str(part))
        if is_mapping:  # the part is a key of the mapping, whatever it is
            is_mapping = False
        elif isinstance(part, str) and sections and part in sections[0].model_fields:
            annotation = sections[0].model_fields[part].annotation
            sections, is_mapping = _find_sections(annotation), typing.get_origin(annotation) is dict
    return keys, sections


def _find_sections(annotation: Any) -> list[type[Section]]:
    """Return the Section classes inside an annotation such as `tuple[SourceConfig, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in typing.get_args(annotation) for section in _find_sections(part)]


def _find_tag_field(section: type[Section]) -> str:
    """Return the key that chooses one of several sections."""
    return "kind" if "kind" in section.model_fields else "name"


def _get_tag(section: type[Section]) -> str:
    """Return the value that chooses one of several sections."""
    return str(section.model_fields[_find_tag_field(section)].default)


def _describe_type(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
