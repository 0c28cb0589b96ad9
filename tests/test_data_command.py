"""The data command: what it tells of sources, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tiny
from jaxembed.config import PythonPackagesConfig, SourceConfig
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_lines
from jaxembed.data.sources import open_rows
from jaxembed.errors import UserError
from runs import command

PAIRS = [{"query": f"q {i}", "pos": [f"the answer {i}", "x"], "neg": [f"not {i}"] * (i % 3)} for i in range(12)]
LABELS = [{"text": f"q {i}", "label": "aab"[i % 3]} for i in range(9)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sources, where the command looks and keeps its indexes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[0]])
    write_lines(tmp_path / "labels.jsonl", LABELS)
    (tmp_path / "texts.txt").write_text("one\ntwo words\n")
    write_beir(tmp_path / "beir", {"d": "one"}, {"q": "q 1"}, {"q": {"d": 1}})
    return tmp_path


def run(*args: str) -> dict[str, Any]:
    return main(make_parser().parse_args(args))


def test_validate_tells_every_bad_row(data: Path) -> None:
    bad = ['{"query": "q"}', "no json", '{"query": "q", "pos": "p"}', *['{"pos": ["p"]}'] * 30]
    (data / "bad.jsonl").write_text("\n\n".join([json.dumps(PAIRS[0]), *bad]))
    done = command("jaxembed.data", "validate", "pairs.jsonl", "bad.jsonl", "texts.txt", "beir", "labels.jsonl")
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 2 and report["bad_rows"] == 33
    kinds = [(r["format"], r["rows"], r["bad_rows"]) for r in report["sources"]]
    assert kinds == [("pairs", 13, 0), ("pairs", 34, 33), ("text", 2, 0), ("beir", 1, 0), ("labels", 9, 0)]
    told = report["sources"][1]["problems"]
    assert told == done.stderr.splitlines() and len(told) == 20
    assert [problem.split(" ")[0] for problem in told[:4]] == ["bad.jsonl:3:", "bad.jsonl:5:", "bad.jsonl:7:", "bad.jsonl:9:"]


def test_validate_of_good_and_of_absent_sources(data: Path) -> None:
    done = command("jaxembed.data", "validate", "pairs.jsonl")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["bad_rows"]) == (0, "", 0)
    absent = run("validate", "absent.jsonl", "pairs.jsonl", "--format", "labels")["sources"]
    assert absent[0]["problems"] == ["absent.jsonl: no such file or folder"]
    assert absent[1]["bad_rows"] == 13


def test_stats(data: Path, base_folder: Callable[[str], Path]) -> None:
    report = run("stats", "pairs.jsonl", "labels.jsonl", "beir")
    pairs, labels, beir = report["sources"]
    assert (pairs["rows"], pairs["duplicate_queries"], pairs["duplicate_pairs"]) == (13, 1, 2)
    assert pairs["a_row"]["positives"] == {"mean": 2, "median": 2, "p95": 2, "most": 2}
    assert pairs["a_row"]["negatives"] == {"mean": 0.92, "median": 1, "p95": 2, "most": 2}
    assert pairs["lengths"]["query"] == {"mean": 3.15, "median": 3, "p95": 4, "most": 4}
    assert (labels["labels"], labels["largest_labels"]) == (2, {"a": 6, "b": 3})
    assert (beir["format"], beir["rows"]) == ("beir", 1)
    shared = {"+".join(s["sources"]): (s["queries"], s["texts"]) for s in report["shared"]}
    assert shared == {"pairs.jsonl+labels.jsonl": (9, 9), "pairs.jsonl+beir": (1, 1), "labels.jsonl+beir": (1, 1)}
    tokens = run("stats", "texts.txt", "--model", str(base_folder("qwen3")))
    tokenizer = tiny.tokenizer()
    counted = [len(tokenizer(text)["input_ids"]) + 1 for text in ("one", "two words")]  # and EOS
    assert tokens["lengths_in"] == "tokens"
    assert tokens["sources"][0]["lengths"]["query"]["most"] == max(counted)


def test_preview_shows_what_a_model_sees(
    data: Path, base_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("preview", "pairs.jsonl", "texts.txt", "--batch-size", "15")
    shown = capsys.readouterr().out.splitlines()
    assert report["query"]["texts"] == 15 and report["lengths_in"] == "characters"
    assert sum("'the answer 3'" in line or "'x'" in line for line in shown) and any("negative" in line for line in shown)
    config = {
        "model": {"base": "preset:tiny", "instruction_template": "Do {instruction}:"},
        "data": {"max_length": 48, "sources": [{"path": "pairs.jsonl", "instructions": ["find it"]}]},
    }
    (data / "a.yaml").write_text(yaml.safe_dump(config))
    run("preview", "--config", "a.yaml", "--batch-size", "3")
    shown = capsys.readouterr().out.splitlines()
    queries = [line for line in shown if " query " in line]
    assert len(queries) == 3 and all("'[Do find it:] q " in line for line in queries)
    report = run("preview", "--config", "a.yaml", "--model", str(base_folder("qwen3")))
    shown = capsys.readouterr().out.splitlines()
    assert report["lengths_in"] == "tokens" and report["query"]["longest"] <= 48
    assert all("[Do find it:] q " in line and "</s>" in line for line in shown if " query " in line)


def test_convert(data: Path) -> None:
    write_lines(data / "odd.jsonl", [{"question": r["query"], "answer": r["pos"][0], "id": 3} for r in PAIRS])
    columns = ("--columns", "{query: question, pos: answer}")
    report = run("convert", "odd.jsonl", "out/a.array_record", "--shards", "5", *columns)
    assert report["files"] == [f"out/a-{i:05d}-of-00005.array_record" for i in range(5)] and report["rows"] == 12
    run("convert", "out", "b.jsonl")
    expected = [{"query": r["query"], "pos": r["pos"][:1]} for r in PAIRS]
    assert [json.loads(line) for line in (data / "b.jsonl").read_text().splitlines()] == expected
    run("convert", "beir", "c.array_record")
    kind, rows = open_rows(SourceConfig(path="c.array_record"), PythonPackagesConfig(), data)
    assert (kind, len(rows), rows[0]) == ("pairs", 1, {"query": "q 1", "pos": ["one"]})
    assert not list(data.glob("**/*.partial"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stats"], "name the sources to look at, or a config that has some by --config, not both"),
        (["convert", "pairs.jsonl", "labels.jsonl"], "labels.jsonl: already exists"),
        (["convert", "pairs.jsonl", "a.csv"], "a.csv: expected an output that ends in .jsonl or .array_record"),
        (["convert", "labels.jsonl", "a.jsonl", "--format", "pairs"], 'labels.jsonl:1: "query" is missing'),
        (["stats", "labels.jsonl", "--columns", "{qury: text}"], "command line: sources.0.columns.qury"),
        (["stats", "labels.jsonl", "--columns", "text"], "command line: sources.0.columns: expected a mapping"),
        (["stats", "labels.jsonl", "--format", "lables"], "command line: sources.0.format: expected 'auto', 'pairs'"),
        (["preview", "labels.jsonl", "--model", "preset:tiny"], "--model preset:tiny: a preset has no tokenizer"),
        (["preview", "labels.jsonl", "--hard-negatives", "-1"], "command line: hard_negatives"),
        (["validate", "--config", "absent.yaml"], "absent.yaml: no such config file"),
    ],
)
def test_bad_input_is_told_in_one_line(data: Path, args: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        run(*args)
    assert str(error.value).startswith(message)
    assert not list(data.glob("**/*.partial"))


def test_a_batch_is_that_of_the_plan(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for seed in ("0", "0", "1"):
        run("preview", "pairs.jsonl", "--seed", seed)
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1] != seen[2]
    assert np.all([line.startswith("pairs ") for line in seen[0].splitlines()])
