"""The split of pairs into training rows and a held-out BEIR folder."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxembed.data import heldout
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.beir import EVALUATION_SPLITS, open_beir
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError

ROWS = [{"prompt": "p", "query": f"question {i}", "pos": [f"passage {i // 2}"]} for i in range(200)]


def split(folder: Path, *options: str, rows: list[dict[str, Any]] = ROWS) -> dict[str, Any]:
    write_jsonl(folder / "pairs.jsonl", rows)
    return main(make_parser().parse_args(["split", str(folder / "pairs.jsonl"), str(folder / "out"), *options]))


def read_train(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_no_document_is_trained_on_and_held_out(tmp_path: Path) -> None:
    report = split(tmp_path, "--percent", "20")
    train, beir = read_train(tmp_path / "out"), open_beir(tmp_path / "out" / "heldout", EVALUATION_SPLITS)
    assert report == {"out": str(tmp_path / "out"), "train": len(train), "heldout": len(beir.query_rows), "documents": 100}
    assert len(train) + len(beir.query_rows) == 200 and 20 <= len(beir.query_rows) <= 60
    trained = {text for row in train for text in row["pos"]}
    for i, relevant in enumerate(beir.relevant):
        number = int(beir.get_query_text(i).split()[1])
        assert [beir.get_document_text(row) for row in relevant] == [f"passage {number // 2}"]
        assert f"passage {number // 2}" not in trained
    assert all(row in ROWS for row in train)


def test_rows_that_share_any_positive_stay_together(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "pos": [f"first {i}", f"second {i // 4}"]} for i in range(200)]
    split(tmp_path, rows=rows)
    trained = {text for row in read_train(tmp_path / "out") for text in row["pos"]}
    beir = open_beir(tmp_path / "out" / "heldout", EVALUATION_SPLITS)
    heldout = {beir.get_document_text(row) for relevant in beir.relevant for row in relevant}
    assert trained.isdisjoint(heldout) and len(trained) + len(heldout) == 250 and 20 <= len(beir.query_rows) <= 120


def test_nulls_are_absent_fields(tmp_path: Path) -> None:
    assert split(tmp_path, rows=[row | {"prompt": None, "neg": None} for row in ROWS])["documents"] == 100
    assert all(row.keys() == {"query", "pos"} for row in read_train(tmp_path / "out"))


def test_added_rows_move_no_others(tmp_path: Path) -> None:
    split(tmp_path, rows=ROWS[:100])
    (tmp_path / "out").rename(tmp_path / "before")
    split(tmp_path)
    before, after = ({row["query"] for row in read_train(tmp_path / name)} for name in ("before", "out"))
    assert before <= after


def test_the_corpus_has_other_documents_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "passages.jsonl", [{"id": str(i), "title": "t", "text": f"passage {i}"} for i in range(130)])
    assert split(tmp_path, "--documents", str(tmp_path / "passages.jsonl"))["documents"] == 130


def test_documents_have_titles_if_the_positives_have_them(tmp_path: Path) -> None:
    """Recipes that retrieve their positives join title and text. A document must not be in the corpus twice."""
    write_jsonl(tmp_path / "passages.jsonl", [{"title": "t", "text": f"passage {i}"} for i in range(130)])
    rows = [row | {"pos": [f"t {row['pos'][0]}"]} for row in ROWS]
    assert split(tmp_path, "--documents", str(tmp_path / "passages.jsonl"), rows=rows)["documents"] == 130
    beir = open_beir(tmp_path / "out" / "heldout", EVALUATION_SPLITS)
    assert {beir.get_document_text(row) for row in range(130)} == {f"t passage {i}" for i in range(130)}


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'pairs\.jsonl:1: "pos"'):
        split(tmp_path, rows=[{"query": "q"}])
    with pytest.raises(
        UserError, match=r"pairs\.jsonl: \d rows to train on and \d held out \(expected 1%\)\. Change the percentage"
    ):
        split(tmp_path, "--percent", "1", rows=ROWS[:4])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        split(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out.unfinished").mkdir()  # a folder of the user
    monkeypatch.setattr(heldout, "write_jsonl", fail)
    with pytest.raises(UserError, match=r"/out: not written \(No space left on device\)\. Free space"):
        split(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.unfinished", "pairs.jsonl"]
