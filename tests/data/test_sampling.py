"""Labels, similarity, entailment and documents as pairs: what is drawn, what is left out, the rows of the main format."""

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

TOPICS = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
NAMES = {0: "the good", 1: "the bad"}
NLI = [
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
DOCUMENTS = [
    {"title": "Tea", "body": "Tea is a drink.", "lang": "en", "year": 2020, "summary": "A drink."},
    {"title": "Tee", "body": "Tee ist ein Getränk.", "lang": "de", "year": 2021},
    {"title": "", "body": "Nobody named this one.", "lang": "en", "year": 2020},
    {"title": "Ink", "body": "Ink is black.", "lang": "en", "year": 1999, "summary": None},
    {"title": "Milk", "lang": "en", "year": 2020, "body": ["no", "text"]},
]
TITLE = {"query": "{title}", "positive": "{body}"}
SUMMARY = {"query": "{title} ({year_name})", "positive": "{summary}"}
EVERY = {
    "pairs": (PAIR_ROWS, {}),
    "labels": (LABEL_ROWS, {"label_documents": "labels"}),
    "examples": (LABEL_ROWS, {}),
    "scored": (SCORED_ROWS, {"min_score": 1.0}),
    "nli": (NLI, {}),
    "texts": ([{"text": "one"}, {"text": "two"}], {"instructions": ["a", "b"]}),
    "documents": (DOCUMENTS, {"pair_templates": [TITLE, {"query": "{body}", "positive": "{lang}: {title}"}]}),
}


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source_file(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", EVERY)
def test_a_shape_draws_by_its_random_numbers_and_gives_rows_of_the_main_format(tmp_path: Path, name: str) -> None:
    rows, options = EVERY[name]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    opened, again = open_source_file(path, **options), open_source_file(path, **options)
    first = [draw_examples(opened, index, 2) for index in range(len(opened))]
    again.draw(len(again) - 1, np.random.default_rng(9), 1)
    assert repr([draw_examples(again, index, 2) for index in reversed(range(len(again)))][::-1]) == repr(first)
    assert any(len({repr(example) for example in drawn}) > 1 for drawn in first)
    converted = list(opened.iter_pairs(seed=3))
    assert converted == list(again.iter_pairs(seed=3)) and converted
    assert [check_pair(row) for row in converted] == [None] * len(converted)
    assert all(len(example.positives) <= opened.sampler.max_positives for drawn in first for example in drawn)
    pairs = {(row["query"], positive) for row in converted for positive in row["pos"]}
    assert {(example.query, example.positive) for drawn in first for example in drawn} <= pairs


def test_label_names_spell_labels_out(tmp_path: Path) -> None:
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", TOPICS), label_names=NAMES)
    example = opened.draw(1, np.random.default_rng(0), 3)
    assert (example.query, example.positive, example.negatives) == ("text 1", "the bad", ("the good",))
    assert next(opened.iter_pairs()) == {"query": "text 0", "pos": ["the good"], "neg": ["the bad"]}
    told = "label_names has no name for '1'; name every label of the data"
    assert error_of(tmp_path / "a.jsonl", label_names={0: "the good", "unused": "x"}) == told


def test_labels_that_share_a_name_are_one(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "abc"[i % 3]} for i in range(6)]
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_names={"a": "x", "b": "x", "c": "y"})
    drawn = [opened.draw(i, np.random.default_rng(0), 5) for i in range(3)]
    assert [(e.positive, e.negatives, e.label) for e in drawn] == [("x", ("y",), 0), ("x", ("y",), 0), ("y", ("x",), 1)]


def test_negatives_out_of_the_labels_of_all_sources(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "two.jsonl", TOPICS)
    write_jsonl(
        tmp_path / "three.jsonl",
        [{"text": "the good", "label": "a"}, {"text": "u", "label": "the good"}, {"text": "v", "label": "c"}],
    )
    write_jsonl(tmp_path / "examples.jsonl", LABEL_ROWS)
    own = {"path": str(tmp_path / "two.jsonl"), "label_names": NAMES}
    others = [
        {"path": str(tmp_path / "three.jsonl"), "label_documents": "labels", "label_negatives": "all"},
        {"path": str(tmp_path / "examples.jsonl")},
    ]
    shared = open_sources(DataConfig.model_validate({"sources": [{**own, "label_negatives": "all"}, *others]}), tmp_path)
    assert {text for e in draw_examples(shared[0], 0, 2) for text in e.negatives} == {
        "the bad",
        "a",
        "c",
    }  # not the positive again
    assert {len(e.negatives) for e in draw_examples(shared[0], 0, 2)} == {2}
    assert {text for e in draw_examples(shared[1], 0, 5) for text in e.negatives} == {"the bad", "c"}  # nor the text itself
    alone = open_sources(DataConfig.model_validate({"sources": [own, *others]}), tmp_path)
    assert {e.negatives for e in draw_examples(alone[0], 0, 2)} == {("the bad",)}
    assert {text for e in draw_examples(alone[2], 0, 2) for text in e.negatives} <= {row["text"] for row in LABEL_ROWS}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"label_names": {"sport": "s", "science": "t", "world": "u"}}, "label_names"),
        ({"label_negatives": "all"}, "label_negatives=all"),
    ],
)
def test_keys_of_label_texts_are_refused_where_documents_are_examples(tmp_path: Path, options: Any, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS)
    told = "is about label texts, but the documents of its 3 labels are examples; set label_documents to labels, or leave"
    assert error_of(path, **options) == f"{key} {told} {key} out"
    assert open_source_file(path, **options, label_documents="labels").draw(0, np.random.default_rng(0), 1).positive in (
        "s",
        "sport",
    )


def test_a_label_with_one_text_is_an_error_or_skipped(tmp_path: Path) -> None:
    rows = [*LABEL_ROWS[:6], {"text": "lonely", "label": "art"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    told = "1 of 4 labels have one text, without another as its positive: 'art'; add texts, or set single_labels to skip"
    assert error_of(path) == told
    opened = open_source_file(path, single_labels="skip")
    assert (len(opened), opened.sampler.drop_counts) == (6, {"label with one text": 1})
    drawn = [example for index in range(6) for example in draw_examples(opened, index, 3)]
    assert "lonely" not in {example.query for example in drawn} | {example.positive for example in drawn}
    assert "lonely" in {text for example in drawn for text in example.negatives}  # it is another label's example still
    assert len(open_source_file(path, label_documents="labels")) == 7
    write_jsonl(path, LABEL_ROWS[:3])
    for choice in ("error", "skip"):
        told = "no label has two texts, each other's positives; set label_documents to labels"
        assert error_of(path, single_labels=choice) == told


def test_examples_of_labels_in_the_main_format(tmp_path: Path) -> None:
    label_of = {row["text"]: row["label"] for row in LABEL_ROWS}
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS))
    converted = list(opened.iter_pairs(seed=1, max_texts=2))
    assert [row["query"] for row in converted] == [row["text"] for row in LABEL_ROWS]
    for row in converted:
        assert {label_of[text] for text in row["pos"]} == {label_of[row["query"]]}
        assert len(row["pos"]) == 2 and row["query"] not in row["pos"]
        assert row["neg"] and label_of[row["query"]] not in {label_of[text] for text in row["neg"]}
    assert list(opened.iter_pairs(seed=2, max_texts=2)) != converted
    assert set(next(opened.iter_pairs())["pos"]) == {"text 3", "text 6", "text 9"}


def test_positives_among_many_examples_of_a_label_are_drawn_evenly(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "a" if i < 5 else "b"} for i in range(10)]
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_documents="examples")
    positives, counts = np.unique([e.positive for e in draw_examples(opened, 2, 1, count=800)], return_counts=True)
    assert positives.tolist() == ["t0", "t1", "t3", "t4"] and counts.min() > 150
    negatives, counts = np.unique([e.negatives for e in draw_examples(opened, 2, 1, count=800)], return_counts=True)
    assert negatives.tolist() == ["t5", "t6", "t7", "t8", "t9"] and counts.min() > 110


def test_a_symmetric_source_has_its_instruction_on_both_sides(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    options = {"instructions": ["one", "two"]}
    drawn = draw_examples(open_source_file(path, symmetric=True, **options), 0, 0)
    assert {(e.instruction, e.document_instruction) for e in drawn} == {("one", "one"), ("two", "two")}
    assert {e.document_instruction for e in draw_examples(open_source_file(path, **options), 0, 0)} == {""}
    of_prompt = draw_examples(open_source_file(write_jsonl(tmp_path / "b.jsonl", PAIR_ROWS), symmetric=True), 2, 0)[0]
    assert (of_prompt.instruction, of_prompt.document_instruction) == ("its own", "its own")
    stored = DataConfig.model_validate({"sources": [{"path": "a.jsonl", "symmetric": True, **options}]}).first_instructions()
    assert stored == {"a": ("one", "one")}


def test_scored_pairs_in_the_main_format_go_both_ways(tmp_path: Path) -> None:
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), min_score=5.0)
    assert list(opened.iter_pairs()) == [{"query": "a5", "pos": ["b5"]}, {"query": "b5", "pos": ["a5"]}]
    assert opened.sampler.drop_counts == {"score below min_score": 5}


def test_a_premise_has_its_entailments_and_its_contradictions(tmp_path: Path) -> None:
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", NLI))
    assert len(opened) == 2 and opened.in_batch
    assert list(opened.iter_pairs()) == [
        {"query": "two dogs run", "pos": ["animals move", "dogs run"], "neg": ["cats sit", "dogs lie still"]},
        {"query": "a bird sings", "pos": ["a bird is heard"], "neg": []},
    ]
    drawn = draw_examples(opened, 0, 1)
    assert {e.positive for e in drawn} == {"animals move", "dogs run"}
    assert {e.negatives for e in drawn} == {("cats sit",), ("dogs lie still",)}
    assert opened.sampler.max_positives == 2
    assert opened.sampler.drop_counts == {"rows without a label": 1, "premises without an entailed hypothesis": 2}


def test_entailment_by_numbers_and_other_names(tmp_path: Path) -> None:
    numbers = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
    renamed = [{"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]} for row in NLI]
    numbered = [{**row, "label": numbers[row["label"]]} for row in renamed]
    whole = list(open_source_file(write_jsonl(tmp_path / "a.jsonl", NLI)).iter_pairs())
    path = write_jsonl(tmp_path / "b.jsonl", renamed)
    assert detect_format(SourceConfig(path=str(path))) == "nli"
    assert list(open_source_file(path).iter_pairs()) == whole
    assert list(open_source_file(write_jsonl(path, numbered), format="nli").iter_pairs()) == whole
    assert "set the source's format to nli" in error_of(path)  # 0 is what paraphrases call no paraphrase
    write_jsonl(path, [{**row, "label": numbers[row["label"]]} for row in NLI])
    assert list(open_source_file(path).iter_pairs()) == whole


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"premise": "p", "label": 0}, ':1: "hypothesis" is missing; expected a non-empty string'),
        (
            {"premise": "p", "hypothesis": "h", "label": 3},
            ':1: "label" is 3; expected entailment, neutral or contradiction, or 0, 1 or 2',
        ),
        ({"premise": "p", "hypothesis": "h", "label": True}, ':1: "label" is true; expected entailment'),
        ({"premise": "p", "hypothesis": "h", "label": ["-"]}, ':1: "label" is a list of 1; expected entailment'),
        (
            {"premise": "p", "hypothesis": "h", "label": "neutral"},
            ": no premise has an entailed hypothesis; expected rows with",
        ),
    ],
)
def test_errors_of_entailment(tmp_path: Path, row: Any, told: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as error:
        open_source_file(path, format="nli")
    assert str(error.value).startswith(f"{path}{told}")


def test_documents_make_pairs_by_templates(tmp_path: Path) -> None:
    rows = [{**row, "year_name": str(row["year"])} for row in DOCUMENTS]
    opened = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), pair_templates=[TITLE, SUMMARY])
    tea, tee, ink = ("Tea", "Tea is a drink."), ("Tee", "Tee ist ein Getränk."), ("Ink", "Ink is black.")
    assert {(e.query, e.positive) for e in draw_examples(opened, 0, 3)} == {tea, ("Tea (2020)", "A drink.")}
    assert {(e.query, e.positive) for e in draw_examples(opened, 1, 3)} == {tee}
    assert {(e.query, e.positive, e.positives, e.negatives) for e in draw_examples(opened, 2, 3)} == {(*ink, (ink[1],), ())}
    assert (len(opened), opened.in_batch, opened.sampler.drop_counts) == (3, True, {"no template has all its fields": 2})
    assert list(opened.iter_pairs()) == [
        {"query": query, "pos": [positive]} for query, positive in (tea, ("Tea (2020)", "A drink."), tee, ink)
    ]


@pytest.mark.parametrize(
    ("options", "kept", "dropped"),
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
def test_filters_of_documents_tell_what_they_drop(
    tmp_path: Path, options: Any, kept: list[str], dropped: dict[str, int]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    if not kept:
        counts = (
            "; no template has all its fields: 2; shorter than min_chars: 3; the first row has title, body, lang, year, summary"
        )
        assert error_of(path, pair_templates=[TITLE], **options).endswith(f"as where, min_chars and max_chars say{counts}")
        return
    opened = open_source_file(path, pair_templates=[TITLE], **options)
    assert [row["query"] for row in opened.iter_pairs()] == kept
    assert opened.sampler.drop_counts == dropped


def test_a_pair_of_equal_sides_and_a_field_that_no_row_has(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "x"}, {"a": "{b}", "b": "y"}])
    opened = open_source_file(path, pair_templates=[{"query": "{a}", "positive": "{b}"}])
    assert list(opened.iter_pairs()) == [{"query": "{b}", "pos": ["y"]}]  # what a row holds is no template
    assert opened.sampler.drop_counts == {"query and positive are equal": 1}
    templates = [{"query": "{a}", "positive": "{b}"}, {"query": "{a}", "positive": "{c}"}]
    told = (
        "makes no pair: no row has texts in all of a, {} and is as where, min_chars and max_chars say{}; the first row has a, b"
    )
    assert error_of(path, pair_templates=templates[1:]) == "pair_templates.0 " + told.format(
        "c", "; no template has all its fields: 2"
    )
    counts = "; query and positive are equal: 1"
    assert error_of(path, pair_templates=templates) == "pair_templates.1 " + told.format("c", counts)
    assert error_of(path, pair_templates=templates[:1], where={"d": 1}) == "pair_templates.0 " + told.format(
        "b", "; where d: 2"
    )
    assert error_of(path).endswith("or make pairs of other fields by its pair_templates")


def test_scored_pairs_are_converted_to_rows_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    path, out = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), tmp_path / "out.jsonl"
    arguments = ["convert", "--pairs", "--shards", "3", str(path), str(out)]
    told = main(make_parser().parse_args(arguments))
    written = [json.loads(line) for file in told["files"] for line in Path(file).read_text().splitlines()]
    assert told["rows"] == 4 and len(told["files"]) == 3
    assert (
        written == list(open_source_file(path).iter_pairs()) == list(open_source_file(write_jsonl(out, written)).iter_pairs())
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"pair_templates": [{"query": "{a}", "positive": "b"}]},
            "pair_templates.0.positive: expected a text that names a field",
        ),
        ({"format": "documents"}, "format documents makes pairs by pair_templates, such as"),
        ({"format": "pairs", "pair_templates": [TITLE]}, "pair_templates are of format documents, and this one is pairs"),
        ({"where": {"a": 1}}, "where, min_chars and max_chars choose documents by pair_templates; name these"),
        ({"pair_templates": [TITLE], "where": {"a": [None]}}, "where: of a: expected a text, a number, true, false, or a list"),
        ({"symmetric": True, "document_instruction": "x"}, "symmetric puts the query's instruction before the documents"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, keys: Any, told: str) -> None:
    tree = {"model": {"base": "x"}, "data": {"sources": [{"path": "a.jsonl", **keys}]}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert told in str(error.value)
