"""Training sources: formats, errors that name file and line, and which examples are drawn from rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval

from helpers.sources import LABEL_ROWS, PAIR_ROWS, SCORED_ROWS, draw_examples, open_source_file, write_jsonl
from jaxembed.config import EvalSetConfig, SourceConfig
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.beir import open_beir, write_beir
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sources import ROW_SCHEMAS, detect_format
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import open_held_out_sets
from jaxembed.evaluation.retrieval import ndcg, recall


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR_ROWS[0], "pairs"),
        ({"query": "a", "positives": ["b"]}, "pairs"),  # so that the error names the missing field
        (LABEL_ROWS[0], "labels"),
        (SCORED_ROWS[0], "scored_pairs"),
        ({"text": "alone"}, "text"),
    ],
)
def test_the_first_row_determines_the_format(tmp_path: Path, row: Any, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n" + json.dumps(row))
    assert detect_format(SourceConfig(path=str(path))) == expected
    assert detect_format(SourceConfig(path=str(path), format="labels")) == "labels"


def test_the_path_determines_the_format(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").touch()
    assert detect_format(SourceConfig(path=str(tmp_path))) == "beir"


HEADER = "query-id\tcorpus-id\tscore"
GOOD_LINE = b'{"query": "q", "pos": ["p"]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD_LINE + b'{"query": "q", "pos": "p"}', ':2: "pos" is a string (expected a list of strings). Write "pos": ["p"].'),
        (GOOD_LINE + b'{"query": "q"}', ':2: "pos" is missing (expected a list of non-empty strings). The row has query'),
        (GOOD_LINE + b'{"query": "q", "pos": 1}', ':2: "pos" is 1 (expected a list of non-empty strings'),
        (GOOD_LINE + b'{"query": "q", "pos": []}', ':2: "pos" is empty (expected at least one positive'),
        (GOOD_LINE + b'{"query": "q", "pos": [""]}', ":2: \"pos\" contains '' (expected non-empty strings"),
        (GOOD_LINE + b'{"query": "q", "pos": ["p", "\\u3000"]}', ":2: \"pos\" contains '\\u3000' (expected non-empty strings"),
        (GOOD_LINE + b'{"query": "q", "pos": ["p"], "neg": [1]}', ':2: "neg" contains 1 (expected non-empty strings'),
        (
            GOOD_LINE + b'{"query": "q", "pos": ["p"], "neg": "n"}',
            ':2: "neg" is a string (expected a list of strings). Write "neg": ["n"].',
        ),
        (GOOD_LINE + b'{"query": "q", "pos": ["p"], "prompt": 1}', ':2: "prompt" is 1 (expected a string'),
        (GOOD_LINE + b'{"pos": ["p"]}', ':2: "query" is missing (expected a non-empty string). The row has pos'),
        (
            GOOD_LINE + b'{"text": "t", "label": 1}',
            ':2: "query" is missing (expected a non-empty string). The row has text, label',
        ),
        (GOOD_LINE + b"{}", ':2: "query" is missing (expected a non-empty string). The row has no fields'),
        (GOOD_LINE + b'{"query": 3, "pos": ["p"]}', ':2: "query" is 3 (expected a non-empty string'),
        (GOOD_LINE + b'{"query": " \\t ", "pos": ["p"]}', ":2: \"query\" is ' \\t ' (expected a non-empty string"),
        (GOOD_LINE + b'\n{"query": "q", "pos": ["p"]', ":3: not valid JSON (Expecting"),
        (GOOD_LINE + b'["q", "p"]', ":2: not a JSON object (found a list)"),
        (GOOD_LINE + b'{"query": "\xff", "pos": ["p"]}', ":2: not valid UTF-8 (byte 11)"),
        (GOOD_LINE + b'{"query": "\\ud83d!", "pos": ["p"]}', ":2: not valid Unicode: a text has a lone surrogate"),
        (GOOD_LINE + b'{"query": "\xed\xa0\xbd", "pos": ["p"]}', ":2: not valid UTF-8"),
        (GOOD_LINE + b"[" * 100_000, ":2: not valid JSON"),
        (b"", ": contains no rows"),
        (b"\n \n", ": contains no rows"),
        (b'{"title": "t"}', ":1: unknown format (the row has title; expected query and pos, text and label"),
        (b'{"text": "t", "label": null}\n{"text": "t"}', ": no row can be used (rows without a label: 2)"),
        (b'{"text": "t", "label": "a"}\n{"text": "t", "label": 1.5}', ':2: "label" is 1.5 (expected a non-empty string or'),
        (b'{"text": "t", "label": "a"}\n{"text": "t", "label": " "}', ":2: \"label\" is ' ' (expected a non-empty string or"),
        (b'{"text": "t", "label": "a"}\n{"text": " ", "label": "a"}', ":2: \"text\" is ' ' (expected a non-empty string"),
        (b'{"text": "t", "label": 1}\n{"label": 1}', ':2: "text" is missing'),
        (b'{"sentence1": "a", "score": 1}', ':1: "sentence2" is missing'),
        (b'{"sentence1": "a", "sentence2": "b", "score": NaN}', ':1: "score" is nan (expected a finite number'),
        (b'{"sentence1": "a", "sentence2": "b", "score": "5"}', ":1: \"score\" is '5' (expected a finite number"),
        (b'{"sentence1": "a", "sentence2": "b", "score": null}', ':1: "score" is missing (expected a finite number'),
        (b'{"sentence1": "a", "sentence2": "b", "score": 1' + b"0" * 400 + b"}", ':1: "score" is a number of about 400 digits'),
        (
            b'{"sentence1": "a", "sentence2": "b", "score": 1}',
            ": no pair has a score of 4.0 or more (the scores go from 1 to 1). Lower the source's min_score.",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_source_file(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/.*/absent.jsonl: no such file or folder\.$"):
        open_source_file(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"^/.*/absent.jsonl: no such file or folder\.$"):
        open_source_file(tmp_path / "absent.jsonl", format="pairs")
    with pytest.raises(UserError, match=r"found no data files \(expected one of .jsonl, .ndjson, .json, .txt"):
        open_source_file(tmp_path, format="pairs")


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in [*PAIR_ROWS, {"query": "é🙂\u2028", "pos": ["数学"]}]]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    rows = IndexedRows(open_container(str(path)), ROW_SCHEMAS["pairs"])
    assert [rows[i] for i in (3, 0, 2, 1)] == [json.loads(lines[i]) for i in (3, 0, 2, 1)]
    assert len(rows) == 4
    with pytest.raises(IndexError):
        rows[4]


def test_an_escaped_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"query": "\\ud83d\\ude42", "pos": ["p"]}')
    assert open_source_file(path).draw(0, np.random.default_rng(0), 0).query == "🙂"


def test_no_positive_of_a_query_is_its_negative(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", PAIR_ROWS))
    examples = draw_examples(source, 0, negatives=2)
    assert {example.positive for example in examples} == {"p0", "p1"}
    assert {example.positives for example in examples} == {("p0", "p1")}
    assert {text for example in examples for text in example.negatives} == {"n0", "n1", "n2"}
    assert all(len(set(example.negatives)) == 2 for example in examples)
    assert draw_examples(source, 0, negatives=9)[0].negatives == ("n0", "n1", "n2")
    assert draw_examples(source, 1, negatives=9)[0].negatives == ()
    assert source.sampler.max_positives >= 2


def test_the_prompt_of_a_row_overrides_the_instructions(tmp_path: Path) -> None:
    options = {"instructions": ["one", "two"], "document_instruction": "doc"}
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", PAIR_ROWS), **options)
    assert {example.instruction for example in draw_examples(source, 1, 0)} == {"one", "two"}
    assert {example.instruction for example in draw_examples(source, 2, 0)} == {"its own"}
    assert {example.document_instruction for example in draw_examples(source, 2, 0)} == {"doc"}
    assert draw_examples(open_source_file(tmp_path / "a.jsonl"), 1, 0)[0].instruction == ""


def test_two_labels_are_documents(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["good", "bad"][i % 2]} for i in range(6)]
    example = draw_examples(open_source_file(write_jsonl(tmp_path / "a.jsonl", rows)), 1, negatives=3)[0]
    assert (example.query, example.positive, example.negatives) == ("text 1", "bad", ("good",))
    assert example.label == 0


@pytest.mark.parametrize("choice", ["auto", "examples"])
def test_examples_are_documents_if_there_are_more_labels(tmp_path: Path, choice: str) -> None:
    label_of = {row["text"]: row["label"] for row in LABEL_ROWS}
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS), label_documents=choice)
    examples = draw_examples(source, 4, negatives=3)
    assert all(example.query == "text 4" != example.positive for example in examples)
    assert {label_of[example.positive] for example in examples} == {"science"}
    assert {label_of[text] for example in examples for text in example.negatives} == {"sport", "world"}
    assert {example.positive for example in examples} == {"text 1", "text 7", "text 10"}
    assert max(len(example.negatives) for example in examples) == 3
    assert {example.label for example in examples} == {0}


def test_label_documents_can_be_chosen(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", LABEL_ROWS), label_documents="labels")
    assert {example.positive for example in draw_examples(source, 0, 1)} == {"sport"}
    assert {text for example in draw_examples(source, 0, 1) for text in example.negatives} == {"science", "world"}
    two_labels = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    source = open_source_file(write_jsonl(tmp_path / "b.jsonl", two_labels), label_documents="examples")
    assert {example.positive for example in draw_examples(source, 0, 1)} == {"t2", "t4"}


def test_a_single_label_and_equal_texts_with_two_labels(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("same", "a"), ("one", "a"), ("same", "b"), ("other", "b"))]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_documents="examples")
    assert {(example.positive, example.negatives) for example in draw_examples(source, 0, 4)} == {
        ("one", ("other",)),
        ("one", ()),
    }
    single = open_source_file(write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}]))
    assert {(example.positive, example.negatives) for example in draw_examples(single, 0, 4)} == {("y", ())}


def test_scored_pairs_above_the_threshold_are_drawn_in_both_directions(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    source = open_source_file(path, min_score=3.0)
    assert len(source) == 3
    assert {(e.query, e.positive) for e in draw_examples(source, 0, 2)} == {("a3", "b3"), ("b3", "a3")}
    assert {e.negatives for e in draw_examples(source, 2, 2)} == {()}
    assert len(open_source_file(path)) == 2


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0, 3, 60, 100], "the scores go from 0 to 100, but min_score is 4.0, the default for scores from 0 to 5. Set"),
        ([1, 10], "the scores go from 1 to 10, but min_score is 4.0"),
        ([0, 0.5, 1], "no pair has a score of 4.0 or more (the scores go from 0 to 1). Lower the source's min_score."),
        ([-1, 0, 1], "no pair has a score of 4.0 or more (the scores go from -1 to 1). Lower"),
    ],
)
def test_scores_that_do_not_fit_the_default_are_refused(tmp_path: Path, scores: list[float], message: str) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": score} for i, score in enumerate(scores)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        open_source_file(path)
    assert message in str(error.value)
    assert len(open_source_file(path, min_score=max(scores))) == 1


def test_a_minimum_below_all_scores_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    assert len(open_source_file(path, min_score=0)) == 6
    assert "every pair is a positive, because the scores go from 0 to 5 and min_score is 0" in caplog.text
    caplog.clear()
    open_source_file(path)
    assert not caplog.messages


def test_in_batch_negatives_are_off_by_default_for_labels(tmp_path: Path) -> None:
    labels, pairs = write_jsonl(tmp_path / "l", LABEL_ROWS), write_jsonl(tmp_path / "p", PAIR_ROWS)
    assert (open_source_file(labels).in_batch, open_source_file(pairs).in_batch) == (False, True)
    assert open_source_file(labels, in_batch_negatives=True).in_batch
    assert not open_source_file(pairs, in_batch_negatives=False).in_batch


def test_source_names_and_digests(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIR_ROWS)
    first = open_source_file(path)
    assert (first.name, open_source_file(path, name="mine").name) == ("pairs", "mine")
    assert open_source_file(path).digest == first.digest
    write_jsonl(path, PAIR_ROWS[:2])
    assert open_source_file(path).digest != first.digest


def write_beir_folder(folder: Path, split: str = "train") -> Path:
    corpus = {"d1": "one", "d2": "two", "d3": "three"}
    write_beir(folder, corpus, {"q1": "first", "q2": "second", "q3": "third"}, {}, split)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "Title", "text": "one"}\n'
        '{"_id": "d2", "title": "", "text": "two"}\n{"_id": "d3", "text": "three"}'
    )
    qrels = f"{HEADER}\nq3\td2\t1\r\nq1\td1\t2\nq1\td3\t1\n\nq2\td1\t0\n"
    (folder / "qrels" / f"{split}.tsv").write_text(qrels)
    return folder


def test_beir_queries_with_relevant_documents_are_examples(tmp_path: Path) -> None:
    source = open_source_file(write_beir_folder(tmp_path))
    assert len(source) == 2
    indices = {source.draw(i, np.random.default_rng(0), 3).query: i for i in range(2)}
    assert sorted(indices) == ["first", "third"]
    examples = draw_examples(source, indices["first"], 3)
    assert {example.positive for example in examples} == {"Title one", "three"}
    assert {example.positives for example in examples} == {("Title one", "three")}
    assert source.sampler.max_positives == 2


def test_a_beir_document_without_text_is_not_a_positive(tmp_path: Path) -> None:
    corpus = write_beir_folder(tmp_path) / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"two"', '" "').replace('"three"', '""'))
    source = open_source_file(tmp_path)
    assert list(source.iter_pairs()) == [{"query": "first", "pos": ["Title one"]}]
    assert source.sampler.drop_counts == {"queries without a document that has a text": 1}
    corpus.write_text(corpus.read_text().replace('"one"', '""').replace('"Title"', '""'))
    with pytest.raises(UserError, match=r"can be used \(queries without a document that has a text: 2\)\.$"):
        open_source_file(tmp_path)


def test_the_split_is_named_or_the_first_that_exists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    write_beir_folder(tmp_path, "test")
    assert len(open_beir(tmp_path, ("dev", "test")).query_rows) == 2
    assert caplog.messages == [f"{tmp_path}: uses qrels/test.tsv, the first that exists of dev, test"]
    (tmp_path / "qrels" / "dev.tsv").write_text(f"{HEADER}\nq2\td2\t1\n")
    beir = open_beir(tmp_path, ("dev", "test"))
    assert (beir.get_query_text(0), beir.relevant, beir.get_document_text(0)) == ("second", [{1: 1}], "Title one")
    assert "uses qrels/dev.tsv, the first that exists of dev, test; also there: test. Set split to choose" in caplog.text
    caplog.clear()
    assert open_beir(tmp_path, ("dev", "test"), "test").split == "test" and not caplog.messages
    with pytest.raises(UserError, match=r"qrels/train.tsv is missing \(found dev, test\)\. Set split to one of them\.$"):
        open_beir(tmp_path, ("dev", "test"), "train")


def test_training_and_evaluation_read_the_split_that_is_named(tmp_path: Path) -> None:
    write_beir_folder(tmp_path, "dev")
    (tmp_path / "qrels" / "test.tsv").write_text(f"{HEADER}\nq2\td2\t1\n")
    sets = {split: EvalSetConfig(name="s", path=str(tmp_path), split=split) for split in ("", "dev", "test")}
    scored: dict[str, Any] = {split: open_held_out_sets([one], tmp_path)[0] for split, one in sets.items()}
    assert [scored[split].queries for split in sets] == [["second"], ["third", "first"], ["second"]]
    sources = {split: open_source_file(tmp_path, split=split) for split in sets}
    assert [len(source) for source in sources.values()] == [2, 2, 1]
    assert sources[""].digest == sources["dev"].digest != sources["test"].digest
    plans = [BatchPlan([sources[split]], 1, 0).hash for split in ("", "dev")]
    assert plans[0] == plans[1]  # runs from before the key was known resume
    with pytest.raises(UserError, match=r"a.jsonl: split is 'dev', but this has no splits \(.*\)\. Remove split\."):
        open_source_file(write_jsonl(tmp_path / "a.jsonl", PAIR_ROWS), split="dev")


def test_fractional_relevance_is_a_gain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_beir_folder(tmp_path, "test")
    (tmp_path / "qrels" / "test.tsv").write_text(f"{HEADER}\nq1\td1\t0.9\nq1\td2\t0.5\nq2\td2\t0.4\nq3\td3\t1.0\nq3\td1\t0.0")
    beir = open_beir(tmp_path, ("test",))
    assert beir.relevant == [{0: 0.9, 1: 0.5}, {1: 0.4}, {2: 1}]
    ranked = np.array([[1, 0], [1, 2], [0, 1]])
    first = (0.5 + 0.9 / np.log2(3)) / (0.9 + 0.5 / np.log2(3))
    assert ndcg(beir.relevant, ranked).mean() == pytest.approx((first + 1 + 0) / 3, abs=1e-12)
    assert len(open_source_file(tmp_path)) == 3
    assert "qrels/test.tsv has fractional scores, from 0.4 to 1; every document above 0 is trained on" in caplog.text


def test_judgments_that_differ_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qrels = write_beir_folder(tmp_path, "test") / "qrels" / "test.tsv"
    qrels.write_text(f"{HEADER}\nq1\td1\t1\nq1\td1\t1\nq1\td1\t2\nq2\td2\t1\nq2\td2\t0\nq3\td9\t0\n")
    assert open_beir(tmp_path, ("test",)).relevant == [{0: 2}]
    assert f"{qrels}: 2 judgments differ from an earlier one of the same query and document; the last counts" in caplog.messages


def test_judgments_of_absent_documents_are_counted_and_cost_recall(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qrels = write_beir_folder(tmp_path, "test") / "qrels" / "test.tsv"
    qrels.write_text(f"{HEADER}\nq1\td1\t1\n" + "".join(f"q1\tx{i}\t1\n" for i in range(5)) + "q2\tx0\t1\nq9\td1\t1\n")
    beir = open_beir(tmp_path, ("test",))
    assert beir.relevant == [{0: 1, -1: 1, -2: 1, -3: 1, -4: 1, -5: 1}, {-1: 1}]
    listed = "'x0' (line 3), 'x1' (line 4), 'x2' (line 5), ...; they count as relevant documents that no search finds"
    assert f"{qrels}: 5 ids are not in {tmp_path}/corpus.jsonl: {listed}" in caplog.text
    assert "1 ids are not in" in caplog.text and "'q9' (line 9); their judgments are left out" in caplog.text
    ranked = np.array([[0, 1], [1, 2]])
    theirs = pytrec_eval.RelevanceEvaluator(
        {"q1": {"d0": 1} | {f"x{i}": 1 for i in range(5)}, "q2": {"x0": 1}}, {"ndcg_cut.2", "recall.2"}
    ).evaluate({q: {"d0": 2.0, "d1": 1.0} if q == "q1" else {"d1": 2.0, "d2": 1.0} for q in ("q1", "q2")})
    assert ndcg(beir.relevant, ranked).mean() == pytest.approx(np.mean([one["ndcg_cut_2"] for one in theirs.values()]))
    assert recall(beir.relevant, ranked).mean() == pytest.approx(np.mean([one["recall_2"] for one in theirs.values()]))
    source = open_source_file(tmp_path)
    assert list(source.iter_pairs()) == [{"query": "first", "pos": ["Title one"]}]


def test_a_written_beir_folder_is_read_back(tmp_path: Path) -> None:
    write_beir(tmp_path, {"d1": "ein\nText", "d2": "é🙂"}, {"q1": "who?", "q2": "unasked"}, {"q1": {"d2": 3, "d1": 1}})
    beir = open_beir(tmp_path, ("test",))
    assert [beir.get_document_text(row) for row in range(2)] == ["ein\nText", "é🙂"]
    assert (beir.get_query_text(0), beir.relevant) == ("who?", [{1: 3, 0: 1}])


def test_the_digest_of_a_beir_folder_depends_on_every_file(tmp_path: Path) -> None:
    digests = {open_source_file(write_beir_folder(tmp_path)).digest}
    for name, old, new in [
        ("corpus.jsonl", "two", "2"),
        ("queries.jsonl", "third", "3rd"),
        ("qrels/train.tsv", "d2\t1", "d3\t1"),
    ]:
        path = tmp_path / name
        path.write_text(path.read_text().replace(old, new))
        digests.add(open_source_file(tmp_path).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels/train.tsv", "q1\td1\tscore\n", "train.tsv:1: expected query-id, corpus-id, score separated by tabs"),
        ("qrels/train.tsv", f"{HEADER}\nq1 d1 1", "train.tsv:2: expected query-id, .* tabs .found 'q1 d1 1'"),
        ("qrels/train.tsv", f"{HEADER}\n\nq1\td1\tx", "train.tsv:3: expected query-id, corpus-id, score"),
        ("qrels/train.tsv", f"{HEADER}\nq1\td1\tinf", "train.tsv:2: expected query-id, corpus-id, score"),
        ("qrels/train.tsv", f"{HEADER}\nq1\td1\tnan", "train.tsv:2: expected query-id, corpus-id, score"),
        ("qrels/train.tsv", f"{HEADER}\nq9\td1\t1", "train.tsv: no query has a relevant document"),
        ("qrels/train.tsv", f"{HEADER}\nq1\td1\t0", "train.tsv: no query has a relevant document"),
        ("qrels/train.tsv", HEADER.encode() + b"\n\xff", "train.tsv: not valid UTF-8"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n\n' * 2, "corpus.jsonl:3: duplicate _id 'd1' .first in .*corpus.jsonl:1"),
        ("corpus.jsonl", '{"_id": "d1"}', 'corpus.jsonl:1: "text" is missing'),
        ("corpus.jsonl", '{"_id": 1, "text": "a"}', 'corpus.jsonl:1: "_id" is 1 .expected a non-empty string'),
        ("corpus.jsonl", '{"_id": "d1", "text": "a", "title": 1}', 'corpus.jsonl:1: "title" is 1 .expected a string'),
        ("queries.jsonl", '{"_id": "q1", "text": ""}', "queries.jsonl:1: \"text\" is '' .expected a non-empty string"),
        ("queries.jsonl", None, "queries.jsonl: no such file"),
        ("qrels/train.tsv", None, "qrels/train.tsv is missing .expected it next to corpus.jsonl and queries.jsonl"),
    ],
)
def test_beir_errors_name_the_file(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = write_beir_folder(tmp_path) / name
    path.unlink() if content is None else path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        open_source_file(tmp_path)


def test_qrels_without_a_header_keep_every_judgment(tmp_path: Path) -> None:
    write_beir(tmp_path, {"d1": "one", "d2": "two"}, {"q1": "first", "q2": "second"}, {"q1": {"d1": 1}, "q2": {"d2": 1}})
    qrels = next((tmp_path / "qrels").iterdir())
    beir = open_beir(tmp_path, ("test",))
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[1:]))
    assert open_beir(tmp_path, ("test",)).relevant == beir.relevant == [{0: 1}, {1: 1}]
