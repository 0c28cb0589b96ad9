"""Plain YAML scalars that other readers turn into something else: `no`, `007`, `1.10`, `12:30`, dates."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.config import Config, SourceConfig, load_config
from jaxembed.config.sections import apply_override
from jaxembed.config.yaml_text import YAML_ERRORS, format_scalar, load_yaml
from jaxembed.data.filters import _equals_setting
from jaxembed.errors import UserError

# Scalars of the kinds that YAML resolves: numbers in all notations, times, dates, truth values, nulls.
number_like = st.from_regex(r"[-+]?[0-9][0-9_]{0,6}(\.[0-9_]{0,4})?([eE][-+]?[0-9]{1,2})?", fullmatch=True)
time_like = st.from_regex(r"[0-9]{1,4}([:-][0-9]{1,2}){1,2}", fullmatch=True)
word = st.sampled_from(["yes", "no", "on", "off", "y", "n", "Yes", "NO", "True", "TRUE", "true", "false", "0x1f", "0o17", "="])
scalars = number_like | time_like | word | st.sampled_from([".inf", "-.inf", ".nan", "-0", "+1", "1.", "01.5", "1e5", "NULL"])


@given(scalars)
def test_every_plain_scalar_is_read_literally(text: str) -> None:
    assert format_scalar(load_yaml(text)) == text
    assert format_scalar(load_yaml(f"[{text}, a]")[0]) == text
    assert [*load_yaml(f"{text}: a")] == [load_yaml(text)] or text == ".nan"


@given(st.text(max_size=20))
def test_quoted_and_dumped_texts_are_read_back(text: str) -> None:
    for dumped in (yaml.safe_dump([text]), yaml.safe_dump([text], allow_unicode=True)):
        assert load_yaml(dumped) == [text]


@given(st.integers() | st.booleans() | st.none() | st.integers(-(10**6), 10**6).map(lambda i: i / 100))
def test_dumped_numbers_and_truth_values_are_read_back(value: Any) -> None:
    assert load_yaml(yaml.safe_dump({"key": value})) == {"key": value}
    assert type(load_yaml(yaml.safe_dump({"key": value}))["key"]) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numeric_keys_read_every_dumped_float(value: float) -> None:
    source = SourceConfig.model_validate({"path": "a", "min_score": load_yaml(yaml.safe_dump(value))})
    assert source.min_score == value


@given(st.text(alphabet="01:_.-+eExo nyt~fal{}[],&*!|>'\"%@`?#", max_size=12))
def test_any_text_is_a_value_or_an_error_of_yaml(text: str) -> None:
    with contextlib.suppress(*YAML_ERRORS):
        load_yaml(text)


def read_source(tmp_path: Path, source: str) -> SourceConfig:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{base: preset:tiny}}\ndata:\n  sources:\n  - {{path: a.jsonl, {source}}}\n")
    config: Config = load_config(path)
    assert load_config(write(tmp_path / "dumped.yaml", config.dump())) == config
    return config.data.sources[0]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


TEMPLATES = 'pair_templates: [{query: "{title}", positive: "{body}"}]'


def test_languages_versions_and_times_are_texts(tmp_path: Path) -> None:
    source = read_source(
        tmp_path, f"{TEMPLATES}, where: {{lang: [no, en], version: 1.10, code: 007, at: 12:30, on: 2024-01-01}}"
    )
    assert source.where == {
        "lang": ("no", "en"), "version": ("1.10",), "code": ("007",), "at": ("12:30",), "on": ("2024-01-01",),
    }  # fmt: skip


def test_labels_are_named_as_they_are_written(tmp_path: Path) -> None:
    names = "{yes: a, no: b, 007: c, 1.10: d, 12:30: e, 7: f, 1.5: g, true: h, -1: i}"
    source = read_source(tmp_path, f"label_names: {names}")
    assert [*source.label_names] == ["yes", "no", "007", "1.10", "12:30", "7", "1.5", "true", "-1"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("label_names: {null: a}", "label_names: expected a label as each key. Quote a label that is null, ~, or empty."),
        ('label_names: {1: a, "1": b}', "label_names: two keys are the same label"),
        ("name: 7", "name is 7 (expected a text; quote a number, true, false, null, or one that has : or {"),
        ("name: true", "name is true (expected a text; quote a number"),
        ("name: a, name: b", "found key 'name' twice"),
        ("max_examples: 12:30", "max_examples is '12:30' (expected an integer)"),
        ("max_examples: 2024-01-01", "max_examples is '2024-01-01' (expected an integer)"),
    ],
)
def test_what_cannot_be_taken_as_written_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_source(tmp_path, source)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "expected"), [("010", 10), ("1_000", 1000), ("+5", 5), ("5.0", 5)])
def test_keys_of_integers_take_every_decimal_notation(tmp_path: Path, text: str, expected: int) -> None:
    """YAML 1.1 reads 010 as 8."""
    assert read_source(tmp_path, f"max_examples: {text}").max_examples == expected


@pytest.mark.parametrize("text", ["yes", "on", "True", "TRUE", "true"])
def test_keys_of_truth_values_take_every_notation(tmp_path: Path, text: str) -> None:
    assert read_source(tmp_path, f"symmetric: {text}").symmetric is True


def test_overrides_read_scalars_alike() -> None:
    tree: dict[str, Any] = {}
    apply_override(tree, "where.lang=[no, 1.10]")
    assert tree == {"where": {"lang": ["no", "1.10"]}}


@pytest.mark.parametrize(
    ("value", "setting", "expected"),
    [
        ("no", "no", True), ("no", False, False), (False, "no", True), (True, "yes", True), (True, True, True),
        (True, 1, False), (1, True, False), (7, 7, True), (7.0, 7, True), ("7", 7, True), ("007", 7, False),
        ("007", "007", True), (7, "007", True),
        (1.1, "1.10", True), ("1.10", "1.10", True), ("1.1", "1.10", False), ("1.10", 1.1, False), (None, "null", False),
        ("true", True, True), ("True", True, False), (2**60 + 1, 2**60, False), ([1], 1, False), (5, "five", False),
    ],
)  # fmt: skip
def test_rows_are_compared_by_the_type_of_their_value(value: Any, setting: Any, expected: bool) -> None:
    assert _equals_setting(value, setting) is expected
