"""Parse and validate answers: a JSON schema, which a server may enforce, and a pydantic model."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from jaxembed.config.synthesis_steps import AnswerConfig, FieldConfig
from jaxembed.synthesis.requests import Answer

ITEMS_FIELD = "items"  # the field of the object that a list is wrapped into: OpenAI's schemas must be objects
CODE_FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
THINKING_BLOCK = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
REFUSAL_START = re.compile(
    r"\s*(i['\u2019]m sorry|i am sorry|sorry, (but )?i |i can(not|['\u2019]t) (help|assist|comply|fulfill)|as an ai\b)", re.I
)
LIMIT_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")

FindLanguageProblem = Callable[[str, str], str | None]  # (text, expected language) -> problem, or None


class InvalidAnswerError(Exception):
    """An answer is not valid. The message is a short reason, the same for all answers with the same problem."""


class AnswerReader:
    """Reads the answers of a step.

    Attributes:
        schema: JSON schema of a valid answer; None for text.
    """

    def __init__(self, config: AnswerConfig, find_language_problem: FindLanguageProblem):
        """Build the schema and the pydantic model.

        Args:
            config: The section of the answer.
            find_language_problem: Returns why a text is not in a language.
        """
        self._config = config
        self._find_language_problem = find_language_problem
        self._patterns = [re.compile(pattern) for pattern in config.reject]
        fields = config.fields if config.type == "object" else {ITEMS_FIELD: config.items.model_copy(update={"type": "list"})}
        self._fields = {"text": config.items} if config.type == "text" else fields
        self._model = make_model(self._fields)
        self.schema = None if config.type == "text" else self._model.model_json_schema() | {"additionalProperties": False}

    def read(self, answer: Answer, languages: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the fields of one draft, or of one draft for each item of a list.

        Args:
            answer: The answer.
            languages: Expected language by field.

        Raises:
            InvalidAnswerError: The answer is not valid.
        """
        if answer.refusal or answer.finish_reason == "content_filter":
            raise InvalidAnswerError("refused")
        if answer.finish_reason == "length":
            raise InvalidAnswerError("truncated at max_tokens")
        text = THINKING_BLOCK.sub("", answer.text, count=1).strip()
        if REFUSAL_START.match(text):
            raise InvalidAnswerError("refused")
        values = self._validate({"text": text} if self._config.type == "text" else self._parse(text))
        for name, value in values.items():
            self._check_texts(name, value, languages.get(name, ""))
        if self._config.type != "list":
            return [values]
        return [{"item": item} for item in dict.fromkeys(values[ITEMS_FIELD])]

    def _parse(self, text: str) -> Any:
        """Return the JSON value of an answer. A list is wrapped into an object."""
        value = parse_json(text, "{" if self._config.type == "object" else "[{")
        if self._config.type == "list" and isinstance(value, dict) and len(value) == 1:
            (value,) = value.values()
        return {ITEMS_FIELD: value} if self._config.type == "list" else value

    def _validate(self, value: Any) -> dict[str, Any]:
        try:
            return self._model.model_validate(value).model_dump()
        except ValidationError as error:
            problem = error.errors()[0]
            field = next((str(part) for part in problem["loc"] if part != ITEMS_FIELD), "the answer")
            raise InvalidAnswerError(
                f"{'an item' if field.isdecimal() else field}: {describe_pydantic_error(problem['type'])}"
            ) from None

    def _check_texts(self, name: str, value: Any, language: str) -> None:
        """Check the strings of a field against refusals, patterns, and a language."""
        for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            if REFUSAL_START.match(text):
                raise InvalidAnswerError("refused")
            if any(pattern.search(text) for pattern in self._patterns):
                raise InvalidAnswerError("matches a pattern of reject")
            if language and self._fields[name].type != "choice" and self._find_language_problem(text, language):
                raise InvalidAnswerError("in another language")


def describe_pydantic_error(kind: str) -> str:
    """Return a short reason for one of pydantic's error types."""
    return {"missing": "missing", "extra_forbidden": "not expected", "literal_error": "not one of the choices",
            "string_unicode": "not valid Unicode",
            "string_too_short": "too short", "string_too_long": "too long", "too_short": "too few items",
            "too_long": "too many items"}.get(kind, "another type" if kind.endswith("_type") else "out of range")  # fmt: skip


def make_model(fields: Mapping[str, FieldConfig]) -> type[BaseModel]:
    """Return the pydantic model of an object with the given fields. Strings are stripped."""
    definitions: dict[str, Any] = {name: (make_type(field), ...) for name, field in fields.items()}
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    return create_model("Answer", __config__=config, **definitions)


def make_type(field: FieldConfig) -> Any:
    """Return the pydantic type of a field."""
    string = Annotated[
        str, StringConstraints(min_length=field.min_chars, max_length=field.max_chars, strip_whitespace=True, strict=True)
    ]
    if field.type == "choice":
        return Literal[field.choices]
    if field.type == "list":
        return Annotated[list[string], Field(min_length=field.min_items, max_length=field.max_items)]
    if field.type == "string":
        return string
    return Annotated[int if field.type == "integer" else float, Field(ge=field.minimum, le=field.maximum)]


def drop_limits(schema: Any) -> Any:
    """Return a JSON schema without limits on lengths and numbers, which some servers refuse."""
    if isinstance(schema, dict):
        return {key: drop_limits(value) for key, value in schema.items() if key not in LIMIT_KEYWORDS}
    return [drop_limits(value) for value in schema] if isinstance(schema, list) else schema


def parse_json(text: str, openings: str) -> Any:
    """Return the JSON value in a text, which may be fenced or surrounded by other text. Python lists are accepted.

    Args:
        text: The text.
        openings: Characters that the value may start with.

    Raises:
        InvalidAnswerError: The text has no JSON value.
    """
    if match := CODE_FENCE.search(text):
        text = match[1]
    start = min((position for position in map(text.find, openings) if position >= 0), default=-1)
    if start < 0:
        raise InvalidAnswerError("not JSON")
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text[start : text.rindex("]") + 1])
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise InvalidAnswerError("not JSON") from None
    return value
