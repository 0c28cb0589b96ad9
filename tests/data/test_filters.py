"""The filters of a source (`where`, `min_chars`, `max_chars`) apply to every format, and what they leave out is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.sources import draw_examples, open_source_file, write_jsonl
from jaxembed.config import BatchingConfig, SourceConfig
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.beir import write_beir
from jaxembed.data.sources import open_source
from jaxembed.errors import UserError

LIMITS = {"min_chars": 3, "max_chars": 8}
SHORT, GOOD, LONG = "ab", "a text", "a long text"
PAIRS = [
    {"query": GOOD, "pos": [SHORT, "first", LONG], "neg": [LONG, "other", SHORT, SHORT], "lang": "en", "year": 2020},
    {"query": SHORT, "pos": ["first"], "lang": "en"},
    {"query": GOOD, "pos": [SHORT, LONG], "lang": "en"},
    {
        "query": "another",
        "pos": ["second"],
        "pos_scores": [0.5],
        "neg": [SHORT, "none"],
        "neg_scores": [0.2, 0.1],
        "lang": "en",
    },
    {"query": "third", "pos": ["third"], "lang": "de"},
]
SHORT_ROW, LONG_ROW = "shorter than min_chars", "longer than max_chars"


def read_pairs(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[Any], dict[str, int]]:
    """Return the rows of pairs of a source, and what it leaves out."""
    source = open_source_file(write_jsonl(folder / "a.jsonl", rows), **options)
    return list(source.iter_pairs()), {reason: count for reason, count in source.sampler.drop_counts.items() if count}


def test_pairs_lose_single_documents_and_rows_lose_their_place_with_the_query(tmp_path: Path) -> None:
    pairs, drops = read_pairs(tmp_path, PAIRS, **LIMITS, where={"lang": "en"})
    assert pairs == [
        {**PAIRS[0], "pos": ["first"], "neg": ["other"]},
        {**PAIRS[3], "neg": ["none"], "neg_scores": [0.1]},
    ]
    assert drops == {
        "where lang": 1, SHORT_ROW: 2, f"positives {SHORT_ROW}": 1, f"positives {LONG_ROW}": 1,
        f"negatives {SHORT_ROW}": 3, f"negatives {LONG_ROW}": 1,
    }  # fmt: skip
    source = open_source_file(tmp_path / "a.jsonl", **LIMITS, where={"lang": "en"})
    assert (source.row_count, len(source), source.sampler.max_positives) == (5, 2, 1)
    assert {example.teacher_scores for example in draw_examples(source, 1, negatives=2, count=3)} == {(0.5, 0.1)}


@pytest.mark.parametrize(
    ("rows", "options", "expected", "drops"),
    [
        (
            [
                {"sentence1": a, "sentence2": b, "score": s}
                for a, b, s in [(GOOD, "one", 5), (GOOD, SHORT, 5), (GOOD, "two", 1)]
            ],
            {},
            [(GOOD, ["one"], ()), ("one", [GOOD], ())],
            {SHORT_ROW: 1, "score below min_score": 1},
        ),
        (
            [
                {"text": t, "label": n}
                for t, n in [(GOOD, "x"), (SHORT, "long label"), (LONG, "y"), ("other", "y"), ("on", "z")]
            ],
            {"label_documents": "labels"},  # labels themselves may have any length
            [(GOOD, ["x"], ["y"]), ("other", ["y"], ["x"])],
            {SHORT_ROW: 2, LONG_ROW: 1},
        ),
        (
            [
                {"premise": p, "hypothesis": h, "label": n}
                for p, h, n in [(GOOD, "one", 0), (GOOD, LONG, 0), (GOOD, SHORT, 2), (GOOD, "two", 2), (SHORT, "one", 0)]
            ],
            {},
            [(GOOD, ["one"], ["two"])],
            {SHORT_ROW: 2, LONG_ROW: 1},
        ),
        ([{"text": t} for t in (GOOD, SHORT, "other")], {}, [(GOOD, [GOOD], ()), ("other", ["other"], ())], {SHORT_ROW: 1}),
        (
            [{"title": t, "body": b} for t, b in [(GOOD, "one"), (GOOD, SHORT), (LONG, "one")]],
            {"pair_templates": [{"query": "{title}", "positive": "{body}"}]},
            [(GOOD, ["one"], ())],
            {SHORT_ROW: 1, LONG_ROW: 1},
        ),
    ],
    ids=["scored_pairs", "labels", "nli", "text", "documents"],
)
def test_rows_of_other_formats_are_left_out(tmp_path: Path, rows: Any, options: Any, expected: Any, drops: Any) -> None:
    pairs, counted = read_pairs(tmp_path, rows, **LIMITS, **options)
    assert [(pair["query"], pair["pos"], pair.get("neg", ())) for pair in pairs] == expected
    assert counted == drops


def test_beir_folders_lose_queries_and_documents(tmp_path: Path) -> None:
    corpus = {"1": "first", "2": SHORT, "3": LONG}
    queries = {"a": GOOD, "b": "only bad", "c": SHORT, "d": "french"}
    write_beir(tmp_path, corpus, queries, {"a": {"1": 1, "2": 1}, "b": {"2": 1, "3": 1}, "c": {"1": 1}, "d": {"1": 1}})
    lines = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "queries.jsonl", [{**row, "lang": "fr" if row["_id"] == "d" else "en"} for row in lines])
    source = open_source(SourceConfig(path=str(tmp_path), where={"lang": "en"}, **LIMITS), tmp_path)
    assert [*source.iter_pairs()] == [{"query": GOOD, "pos": ["first"]}] and (source.row_count, len(source)) == (4, 1)
    counts = {reason: count for reason, count in source.sampler.drop_counts.items() if count}
    assert counts == {f"positives {SHORT_ROW}": 1, SHORT_ROW: 2, "where lang": 1}


def test_rows_that_where_leaves_out_are_not_checked(tmp_path: Path) -> None:
    rows = [{"query": "no answer", "use": False}, {"query": GOOD, "pos": ["first"], "use": True}]
    pairs, drops = read_pairs(tmp_path, rows, where={"use": True}, format="pairs")
    assert pairs == rows[1:] and drops == {"where use": 1}
    with pytest.raises(UserError, match=r'a.jsonl:1: "pos" is missing'):
        open_source_file(tmp_path / "a.jsonl", format="pairs")
    with pytest.raises(UserError, match=r"a.jsonl: no row can be used \(where lang: 2\)\.$"):
        open_source_file(tmp_path / "a.jsonl", format="pairs", where={"lang": "en"})


def test_filters_change_only_the_plan_of_their_sources(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": f"query {i}", "pos": [f"text {i}"]} for i in range(8)])

    def plan_hash(**options: Any) -> str:
        return BatchPlan([open_source_file(path, **options)], 2, 0, 0, BatchingConfig()).hash

    assert len({plan_hash(), plan_hash(min_chars=2), plan_hash(max_chars=50)}) == 3  # although no row is left out
    assert plan_hash() == "cea763d0a5d75db5"  # the hash before sources of pairs had filters: runs resume


def test_reports_and_converted_files_have_the_filtered_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    path, out = write_jsonl(tmp_path / "a.jsonl", PAIRS), tmp_path / "out.jsonl"
    source = {"path": str(path), **LIMITS, "where": {"lang": "en"}}
    (tmp_path / "a.yaml").write_text(json.dumps({"data": {"sources": [source]}}))
    (stats,) = main(make_parser().parse_args(["stats", "--config", str(tmp_path / "a.yaml")]))["sources"]
    assert (stats["rows"], stats["examples"], stats["left_out"][SHORT_ROW]) == (5, 2, 2)
    assert (stats["lengths"]["negative"]["mean"], stats["a_row"]["negatives"]["most"]) == (4.5, 1)
    main(make_parser().parse_args(["convert", "--config", str(tmp_path / "a.yaml"), "--out", str(out)]))
    assert [json.loads(line)["neg"] for line in out.read_text().splitlines()] == [["other"], ["none"]]
