"""Labels, similarity, entailment and documents as pairs: drawn examples, dropped rows, and rows of pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.sources import LABEL_ROWS, PAIR_ROWS, SCORED_ROWS, draw_examples, open_source_file, write_jsonl
from jaxembed.config import DataConfig, SourceConfig, load_config
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.schema import check_pair
from jaxembed.data.sources import detect_format, open_sources
from jaxembed.errors import UserError

TWO_LABEL_ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
LABEL_NAMES = {0: "the good", 1: "the bad"}
NLI_ROWS = [
    {"premise": "two dogs run", "hypothesis": "animals move", "label": "entailment"},
    {"premise": "a man sleeps", "hypothesis": "a man dreams", "label": "neutral"},
    {"premise": "two dogs run", "hypothesis": "cats sit", "label": "contradiction"},
    {"premise": "a bird sings", "hypothesis": "a bird is heard", "label": "entailment"},
    {"premise": "two dogs run", "hypothesis": "dogs are outside", "label": "neutral"},
    {"premise": "two dogs run", "hypothesis": "dogs run", "label": "entailment"},
    {"premise": "a man sleeps", "hypothesis": "a man jumps", "label": "contradiction"},
    {"premise": "two dogs run", "hypothesis": "dogs lie still", "label": "contradiction"},
    {"premise": "a cup falls", "hypothesis": "it breaks", "label": "-"},
]
DOCUMENT_ROWS = [
    {"title": "Tea", "body": "Tea is a drink.", "lang": "en", "year": 2020, "summary": "A drink."},
    {"title": "Tee", "body": "Tee ist ein Getränk.", "lang": "de", "year": 2021},
    {"title": "", "body": "Nobody named this one.", "lang": "en", "year": 2020},
    {"title": "Ink", "body": "Ink is black.", "lang": "en", "year": 1999, "summary": None},
    {"title": "Milk", "lang": "en", "year": 2020, "body": ["no", "text"]},
]
TITLE_TEMPLATE = {"query": "{title}", "positive": "{body}"}
SUMMARY_TEMPLATE = {"query": "{title} ({year_name})", "positive": "{summary}"}
SAMPLER_CASES = {
    "pairs": (PAIR_ROWS, {}),
    "labels": (LABEL_ROWS, {"label_documents": "labels"}),
    "examples": (LABEL_ROWS, {}),
    "scored": (SCORED_ROWS, {"min_score": 1.0}),
    "nli": (NLI_ROWS, {}),
    "texts": ([{"text": "one"}, {"text": "two"}], {"instructions": ["a", "b"]}),
    "documents": (DOCUMENT_ROWS, {"pair_templates": [TITLE_TEMPLATE, {"query": "{body}", "positive": "{lang}: {title}"}]}),
}


def get_error(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source_file(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_draws_depend_only_on_the_generator_and_appear_among_the_pairs(tmp_path: Path, name: str) -> None:
    rows, options = SAMPLER_CASES[name]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source, second_source = open_source_file(path, **options), open_source_file(path, **options)
    draws = [draw_examples(source, index, 2) for index in range(len(source))]
    second_source.draw(len(second_source) - 1, np.random.default_rng(9), 1)
    assert repr([draw_examples(second_source, index, 2) for index in reversed(range(len(second_source)))][::-1]) == repr(draws)
    assert any(len({repr(example) for example in examples}) > 1 for examples in draws)
    converted = list(source.iter_pairs(seed=3))
    assert converted == list(second_source.iter_pairs(seed=3)) and converted
    assert [check_pair(row) for row in converted] == [None] * len(converted)
    assert all(len(example.positives) <= source.sampler.max_positives for examples in draws for example in examples)
    pairs = {(row["query"], positive) for row in converted for positive in row["pos"]}
    assert {(example.query, example.positive) for examples in draws for example in examples} <= pairs


def test_a_text_alone_is_its_own_positive(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
    examples = [example for index in range(len(source)) for example in draw_examples(source, index, 2)]
    assert {(example.query, example.positive, example.negatives) for example in examples} == {
        ("one", "one", ()),
        ("two", "two", ()),
    }


def test_label_names_replace_labels(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", TWO_LABEL_ROWS), label_names=LABEL_NAMES)
    example = source.draw(1, np.random.default_rng(0), 3)
    assert (example.query, example.positive, example.negatives) == ("text 1", "the bad", ("the good",))
    assert next(source.iter_pairs()) == {"query": "text 0", "pos": ["the good"], "neg": ["the bad"]}
    message = "label_names has no name for '1'. Name every label of the data."
    assert get_error(tmp_path / "a.jsonl", label_names={0: "the good", "unused": "x"}) == message


def test_labels_with_the_same_name_are_one_class(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "abc"[i % 3]} for i in range(6)]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_names={"a": "x", "b": "x", "c": "y"})
    examples = [source.draw(i, np.random.default_rng(0), 5) for i in range(3)]
    assert [(e.positive, e.negatives, e.label) for e in examples] == [("x", ("y",), 0), ("x", ("y",), 0), ("y", ("x",), 1)]


def test_label_negatives_come_from_all_sources(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "two.jsonl", TWO_LABEL_ROWS)
    write_jsonl(
        tmp_path / "three.jsonl",
        [{"text": "the good", "label": "a"}, {"text": "u", "label": "the good"}, {"text": "v", "label": "c"}],
    )
    write_jsonl(tmp_path / "examples.jsonl", LABEL_ROWS)
    two_labels = {"path": str(tmp_path / "two.jsonl"), "label_names": LABEL_NAMES}
    others = [
        {"path": str(tmp_path / "three.jsonl"), "label_documents": "labels", "label_negatives": "all"},
        {"path": str(tmp_path / "examples.jsonl")},
    ]
    shared = open_sources(DataConfig.model_validate({"sources": [{**two_labels, "label_negatives": "all"}, *others]}), tmp_path)
    # "the good" is the positive of the first source's row, and the text of the second one's: a negative of neither.
    assert {text for e in draw_examples(shared[0], 0, 2) for text in e.negatives} == {"the bad", "a", "c"}
    assert {len(e.negatives) for e in draw_examples(shared[0], 0, 2)} == {2}
    assert {text for e in draw_examples(shared[1], 0, 5) for text in e.negatives} == {"the bad", "c"}
    alone = open_sources(DataConfig.model_validate({"sources": [two_labels, *others]}), tmp_path)
    assert {e.negatives for e in draw_examples(alone[0], 0, 2)} == {("the bad",)}
    assert {text for e in draw_examples(alone[2], 0, 2) for text in e.negatives} <= {row["text"] for row in LABEL_ROWS}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"label_names": {"sport": "s", "science": "t", "world": "u"}}, "label_names"),
        ({"label_negatives": "all"}, "label_negatives=all"),
    ],
)
def test_label_text_keys_are_rejected_for_example_documents(tmp_path: Path, options: Any, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS)
    reason = "needs documents that are label texts (the documents of these 3 labels are examples)"
    assert get_error(path, **options) == f"{key} {reason}. Set label_documents to labels, or remove {key}."
    assert open_source_file(path, **options, label_documents="labels").draw(0, np.random.default_rng(0), 1).positive in (
        "s",
        "sport",
    )


def test_a_label_with_a_single_text_is_an_error_or_skipped(tmp_path: Path) -> None:
    rows = [*LABEL_ROWS[:6], {"text": "lonely", "label": "art"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    message = "1 of 4 labels have a single text, which has no positive: 'art'. Add texts, or set single_labels to skip."
    assert get_error(path) == message
    source = open_source_file(path, single_labels="skip")
    assert (len(source), source.sampler.drop_counts) == (6, {"label with one text": 1})
    examples = [example for index in range(6) for example in draw_examples(source, index, 3)]
    assert "lonely" not in {example.query for example in examples} | {example.positive for example in examples}
    assert "lonely" in {text for example in examples for text in example.negatives}  # it is still a negative of other labels
    assert len(open_source_file(path, label_documents="labels")) == 7
    write_jsonl(path, LABEL_ROWS[:3])
    for choice in ("error", "skip"):
        message = "no label has two texts, so no text has a positive. Set label_documents to labels."
        assert get_error(path, single_labels=choice) == message


def test_label_examples_in_the_main_format(tmp_path: Path) -> None:
    labels = {row["text"]: row["label"] for row in LABEL_ROWS}
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS))
    converted = list(source.iter_pairs(seed=1, max_texts=2))
    assert [row["query"] for row in converted] == [row["text"] for row in LABEL_ROWS]
    for row in converted:
        assert {labels[text] for text in row["pos"]} == {labels[row["query"]]}
        assert len(row["pos"]) == 2 and row["query"] not in row["pos"]
        assert row["neg"] and labels[row["query"]] not in {labels[text] for text in row["neg"]}
    assert list(source.iter_pairs(seed=2, max_texts=2)) != converted
    assert set(next(source.iter_pairs())["pos"]) == {"text 3", "text 6", "text 9"}


def test_positives_and_negatives_of_a_label_are_drawn_uniformly(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "a" if i < 5 else "b"} for i in range(10)]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_documents="examples")
    positives, counts = np.unique([e.positive for e in draw_examples(source, 2, 1, count=800)], return_counts=True)
    assert positives.tolist() == ["t0", "t1", "t3", "t4"] and counts.min() > 150
    negatives, counts = np.unique([e.negatives for e in draw_examples(source, 2, 1, count=800)], return_counts=True)
    assert negatives.tolist() == ["t5", "t6", "t7", "t8", "t9"] and counts.min() > 110


def test_a_symmetric_source_uses_the_instruction_on_both_sides(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    options = {"instructions": ["one", "two"]}
    examples = draw_examples(open_source_file(path, symmetric=True, **options), 0, 0)
    assert {(e.instruction, e.document_instruction) for e in examples} == {("one", "one"), ("two", "two")}
    assert {e.document_instruction for e in draw_examples(open_source_file(path, **options), 0, 0)} == {""}
    with_prompt = draw_examples(open_source_file(write_jsonl(tmp_path / "b.jsonl", PAIR_ROWS), symmetric=True), 2, 0)[0]
    assert (with_prompt.instruction, with_prompt.document_instruction) == ("its own", "its own")
    stored = DataConfig.model_validate(
        {"sources": [{"path": "a.jsonl", "symmetric": True, **options}]}
    ).collect_first_instructions()
    assert stored == {"a": ("one", "one")}


def test_scored_pairs_in_the_main_format_have_both_directions(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), min_score=5.0)
    assert list(source.iter_pairs()) == [{"query": "a5", "pos": ["b5"]}, {"query": "b5", "pos": ["a5"]}]
    assert source.sampler.drop_counts == {"score below min_score": 5}


def test_a_premise_has_entailed_positives_and_contradicting_negatives(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", NLI_ROWS))
    assert len(source) == 2 and source.in_batch
    assert list(source.iter_pairs()) == [
        {"query": "two dogs run", "pos": ["animals move", "dogs run"], "neg": ["cats sit", "dogs lie still"]},
        {"query": "a bird sings", "pos": ["a bird is heard"], "neg": []},
    ]
    examples = draw_examples(source, 0, 1)
    assert {e.positive for e in examples} == {"animals move", "dogs run"}
    assert {e.negatives for e in examples} == {("cats sit",), ("dogs lie still",)}
    assert source.sampler.max_positives == 2
    assert source.sampler.drop_counts == {"rows without a label": 1, "premises without an entailed hypothesis": 2}


def test_nli_rows_with_numeric_labels_and_other_field_names(tmp_path: Path) -> None:
    numbers = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
    renamed = [{"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]} for row in NLI_ROWS]
    numbered = [{**row, "label": numbers[row["label"]]} for row in renamed]
    expected = list(open_source_file(write_jsonl(tmp_path / "a.jsonl", NLI_ROWS)).iter_pairs())
    path = write_jsonl(tmp_path / "b.jsonl", renamed)
    assert detect_format(SourceConfig(path=str(path))) == "nli"
    assert list(open_source_file(path).iter_pairs()) == expected
    assert list(open_source_file(write_jsonl(path, numbered), format="nli").iter_pairs()) == expected
    assert "set the source's format to nli" in get_error(path)  # 0 would mean "no paraphrase" in paraphrase data
    write_jsonl(path, [{**row, "label": numbers[row["label"]]} for row in NLI_ROWS])
    assert list(open_source_file(path).iter_pairs()) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"premise": "p", "label": 0}, ':1: "hypothesis" is missing (expected a non-empty string'),
        (
            {"premise": "p", "hypothesis": "h", "label": 3},
            ':1: "label" is 3 (expected entailment, neutral or contradiction, or 0, 1 or 2',
        ),
        ({"premise": "p", "hypothesis": "h", "label": True}, ':1: "label" is true (expected entailment'),
        ({"premise": "p", "hypothesis": "h", "label": ["-"]}, ':1: "label" is a list of 1 (expected entailment'),
        (
            {"premise": "p", "hypothesis": "h", "label": "neutral"},
            ": no premise has an entailed hypothesis (expected rows with",
        ),
    ],
)
def test_nli_errors_name_the_row(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as error:
        open_source_file(path, format="nli")
    assert str(error.value).startswith(f"{path}{message}")


def test_templates_make_pairs_of_documents(tmp_path: Path) -> None:
    rows = [{**row, "year_name": str(row["year"])} for row in DOCUMENT_ROWS]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), pair_templates=[TITLE_TEMPLATE, SUMMARY_TEMPLATE])
    tea, tee, ink = ("Tea", "Tea is a drink."), ("Tee", "Tee ist ein Getränk."), ("Ink", "Ink is black.")
    assert {(e.query, e.positive) for e in draw_examples(source, 0, 3)} == {tea, ("Tea (2020)", "A drink.")}
    assert {(e.query, e.positive) for e in draw_examples(source, 1, 3)} == {tee}
    assert {(e.query, e.positive, e.positives, e.negatives) for e in draw_examples(source, 2, 3)} == {(*ink, (ink[1],), ())}
    assert (len(source), source.in_batch, source.sampler.drop_counts) == (3, True, {"no template has all its fields": 2})
    assert list(source.iter_pairs()) == [
        {"query": query, "pos": [positive]} for query, positive in (tea, ("Tea (2020)", "A drink."), tee, ink)
    ]


@pytest.mark.parametrize(
    ("options", "queries", "drop_counts"),
    [
        ({"where": {"lang": "de"}}, ["Tee"], {"where lang": 4}),
        (
            {"where": {"lang": "en", "year": [2020, 1999]}},
            ["Tea", "Ink"],
            {"where lang": 1, "no template has all its fields": 2},
        ),
        ({"min_chars": 4}, [], {"shorter than min_chars": 3}),
        ({"max_chars": 15}, ["Tea", "Ink"], {"longer than max_chars": 1, "no template has all its fields": 2}),
    ],
)
def test_document_filters_count_what_they_drop(
    tmp_path: Path, options: Any, queries: list[str], drop_counts: dict[str, int]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENT_ROWS)
    if not queries:
        counts = "no template has all its fields: 2; shorter than min_chars: 3"
        assert get_error(path, pair_templates=[TITLE_TEMPLATE], **options).endswith(
            f"max_chars; {counts}; the first row has title, body, lang, year, summary)."
        )
        return
    source = open_source_file(path, pair_templates=[TITLE_TEMPLATE], **options)
    assert [row["query"] for row in source.iter_pairs()] == queries
    assert source.sampler.drop_counts == drop_counts


@pytest.mark.parametrize(("options", "size"), [({}, 1), ({"equality": "exact"}, 2)])
def test_sides_are_equal_by_the_rule_of_all_sources(tmp_path: Path, options: Any, size: int) -> None:
    """Earlier versions compared every character, and their runs continue so."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "y"}, {"a": "X\u00a0Y", "b": " x y\n"}, {"a": "x", "b": "x"}])
    assert len(open_source_file(path, pair_templates=[{"query": "{a}", "positive": "{b}"}], **options)) == size


def test_pairs_with_equal_sides_and_templates_without_pairs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "x"}, {"a": "{b}", "b": "y"}])
    source = open_source_file(path, pair_templates=[{"query": "{a}", "positive": "{b}"}])
    assert list(source.iter_pairs()) == [{"query": "{b}", "pos": ["y"]}]  # braces in a row are not a template
    assert source.sampler.drop_counts == {"query and positive are equal": 1}
    templates = [{"query": "{a}", "positive": "{b}"}, {"query": "{a}", "positive": "{c}"}]
    message = (
        "makes no pair (no row has texts in all of a, {} and meets where, min_chars and max_chars{}; the first row has a, b)."
    )
    assert get_error(path, pair_templates=templates[1:]) == "pair_templates.0 " + message.format(
        "c", "; no template has all its fields: 2"
    )
    counts = "; query and positive are equal: 1"
    assert get_error(path, pair_templates=templates) == "pair_templates.1 " + message.format("c", counts)
    assert get_error(path, pair_templates=templates[:1], where={"d": 1}) == "pair_templates.0 " + message.format(
        "b", "; where d: 2"
    )
    assert get_error(path).endswith("or make pairs of other fields with pair_templates.")


def test_scored_pairs_are_converted_to_rows_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    path, out = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), tmp_path / "out.jsonl"
    arguments = ["convert", "--pairs", "--shards", "3", str(path), str(out)]
    report = main(make_parser().parse_args(arguments))
    written = [json.loads(line) for file in report["files"] for line in Path(file).read_text().splitlines()]
    assert report["rows"] == 4 and len(report["files"]) == 3
    assert (
        written == list(open_source_file(path).iter_pairs()) == list(open_source_file(write_jsonl(out, written)).iter_pairs())
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"pair_templates": [{"query": "{a}", "positive": "b"}]},
            "pair_templates.0.positive is 'b' (expected a template that names a field",
        ),
        ({"format": "documents"}, "format documents needs pair_templates, such as"),
        (
            {"format": "pairs", "pair_templates": [TITLE_TEMPLATE]},
            "pair_templates belong to format documents, but format is pairs. Remove them.",
        ),
        ({"min_chars": 9, "max_chars": 8}, "max_chars is 8, less than min_chars, 9. Swap them."),
        (
            {"pair_templates": [TITLE_TEMPLATE], "where": {"a": [None]}},
            "where: a: expected a text, a number, true, false, or a list",
        ),
        ({"symmetric": True, "document_instruction": "x"}, "symmetric puts the query's instruction before the documents"),
    ],
)
def test_conflicting_keys_are_rejected(tmp_path: Path, keys: Any, message: str) -> None:
    tree = {"model": {"base": "x"}, "data": {"sources": [{"path": "a.jsonl", **keys}]}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert message in str(error.value)
