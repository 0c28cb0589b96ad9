"""The mine command: its options, errors, outputs, and what a kill or a stop leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ENV, start_module
from helpers.mining import KILL_WHILE_ENCODING, StubEncoder
from helpers.sources import write_jsonl
from jaxembed import cli
from jaxembed import mine as mine_command
from jaxembed.config import MineConfig
from jaxembed.errors import Stopped, UserError
from jaxembed.hub.embedder import Embedder


def test_killed_command_continues_where_it_stopped(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished vectors are not computed again, and no partial file is left."""
    pairs = [{"query": f"q {i}", "pos": [f"answer {i}"]} for i in range(20)]
    source, out, texts = write_jsonl(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl", []
    arguments = [str(base_folder("qwen3")), str(source), str(out), "--rule", "top_k", "--instruction", "Find it"]
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    environment = {**ENV, "JAXEMBED_CACHE": str(tmp_path / "cache")}
    killed = start_module("jaxembed.mine", *arguments, env=environment, setup_code=KILL_WHILE_ENCODING)
    killed.communicate()
    assert killed.returncode == -9
    assert not out.exists()
    (kept,) = (tmp_path / "cache").rglob("vectors/*/vectors-v2")
    before = kept.read_bytes()
    assert len(before) == 28 * 4 * 32  # Three parts of the queries, one of the documents.

    encode = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, new, **options: texts.extend(new) or encode(self, new, **options))
    monkeypatch.setattr(sys, "argv", ["mine", *arguments])
    cli.run_command(mine_command.main, mine_command.make_parser())
    assert texts == [f"answer {i}" for i in range(8, 20)]
    assert kept.read_bytes()[: len(before)] == before
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts["negatives"] == 20 * 7 and counts["out"] == str(out)
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["query"] for row in rows] == [pair["query"] for pair in pairs]
    assert all(row["prompt"] == "Find it" and len(row["neg"]) == len(row["neg_scores"]) == 7 for row in rows)
    report = json.loads(Path(counts["report"]).read_text())
    assert report["written"] == 20 and report["model"]["name"] == arguments[0] and report["ways"]["rule"]["name"] == "top_k"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in.jsonl", "out.jsonl", "out.jsonl.report.json"]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[dict[str, Any]]) -> StubEncoder:
    """Run commands with a stub model, in a folder with pairs.jsonl and config.yaml."""
    stub = StubEncoder()
    monkeypatch.setattr("jaxembed.curation.source_mining.open_frozen_encoder", lambda *_: stub)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "documents.jsonl", [{"title": row["query"], "body": row["pos"][0]} for row in pairs])
    templates = [{"query": "{title}", "positive": "{body}"}]
    documents = {"path": "documents.jsonl", "name": "titles", "pair_templates": templates, "max_examples": 30}
    documents |= {"instructions": ["Find it"], "document_instruction": "A body"}
    sources = [documents, {"path": "pairs.jsonl"}]
    tree = {"model": {"base": "preset:tiny"}, "data": {"sources": sources}, "train": {"steps": 1}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    return stub


def run_mine(*arguments: str) -> dict[str, Any]:
    return mine_command.main(mine_command.make_parser().parse_args(["MODEL", *arguments]))


def test_a_missing_bm25_is_reported_before_anything_is_encoded(encoder: StubEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"^BM25: bm25s is not installed"):
        run_mine("pairs.jsonl", "out.jsonl", "--candidates", "bm25")
    assert not encoder.inputs


LONG = "x" * 245 + ".jsonl"  # Too long for the suffix that is added while it is written.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pairs.jsonl out.parquet", "out.parquet: expected an output that ends in .jsonl"),
        (f"pairs.jsonl {LONG}", "x.jsonl: cannot be written (File name too long). Name another output"),
        (f"pairs.jsonl out.jsonl --report {LONG}", "x.jsonl: cannot be written (File name too long). Name another output"),
        (f"pairs.jsonl {LONG[10:]}", "x.jsonl.report.json: cannot be written (File name too long). Name another output"),
        ("pairs.jsonl out.jsonl --report y/../out.jsonl", "--report y/../out.jsonl: is the same file as OUT"),
        ("pairs.jsonl out.jsonl --share 2", "--rule topk_perc_pos: share is 2.0 (expected "),
        ("pairs.jsonl out.jsonl --rule topk_margin_pos --margin -1", "--rule topk_margin_pos: margin is -1.0 (expected "),
        (
            "pairs.jsonl out.jsonl --depth 5",
            "--rule topk_perc_pos: depth is 5, fewer candidates than the 7 negatives. Raise it.",
        ),
        ("pairs.jsonl out.jsonl --rule window --window 9 3", "window is 9 to 3 (expected two ranks in ascending order"),
        ("pairs.jsonl out.jsonl --rule window --window 3 8", "window is 3 to 8, fewer ranks than the 7 negatives"),
        (
            "pairs.jsonl out.jsonl --rule window --share 1",
            "--share: --rule window does not read it (read by: topk_perc_pos). Remove it or choose",
        ),
        (
            "pairs.jsonl out.jsonl --rule window --depth 9",
            "--depth: --rule window does not read it (read by: topk_perc_pos, topk_",
        ),
        ("pairs.jsonl out.jsonl --window 1 9", "--window: --rule topk_perc_pos does not read it (read by: window). Remove it"),
        (
            "pairs.jsonl out.jsonl --rule window --window 180 190",
            "--rule window --window 180 190: negatives start at rank 180, but a query has at most 179 candidates among 180 doc",
        ),
        ("pairs.jsonl out.jsonl --fsdp 3", "--fsdp is 3 (expected a divisor of 8, the number of devices here"),
        ("pairs.jsonl out.jsonl --format pair", "command line: format is 'pair' (expected 'auto', 'pairs'"),
        ("no out.jsonl --config config.yaml", "config.yaml: 0 sources are named no (expected one of: titles, pairs)"),
        (
            "pairs out.jsonl --config config.yaml --format text",
            "--config: its sources describe their own rows. Remove --format",
        ),
    ],
)
def test_bad_arguments_fail_before_anything_is_encoded(encoder: StubEncoder, arguments: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_mine(*arguments.split())
    assert message in str(error.value)
    assert not encoder.inputs and not list(Path().glob("*out*")) and not list(Path().glob("x*"))


def test_source_of_a_config_is_mined_with_all_its_keys(encoder: StubEncoder, pairs: list[dict[str, Any]]) -> None:
    """Its instructions and `max_examples` apply. Without a config, an option names the columns."""
    counts = run_mine("titles", "out.jsonl", "--config", "config.yaml", "--rule", "top_k")
    assert (counts["rows"], counts["corpus"], counts["negatives"]) == (30, 30, 30 * 7)
    assert {(text.side, text.instruction) for text in encoder.inputs} == {("query", "Find it"), ("document", "A body")}
    rows = [json.loads(row) for row in Path("out.jsonl").read_text().splitlines()]
    positives = {pair["query"]: pair["pos"] for pair in pairs}
    assert all(row["prompt"] == "Find it" and row["pos"] == positives[row["query"]] for row in rows)
    assert json.loads(Path("out.jsonl.report.json").read_text())["source"]["name"] == "titles"
    mapping = "{query: title, pos: body}"
    counts = run_mine("documents.jsonl", "other.jsonl", "--columns", mapping, "--instruction", "Ask", "--rule", "top_k")
    assert counts["rows"] == 60 and '"prompt": "Ask"' in Path("other.jsonl").read_text()


def test_rule_that_no_candidate_passes_gives_a_warning(encoder: StubEncoder, caplog: pytest.LogCaptureFixture) -> None:
    counts = run_mine("pairs.jsonl", "out.jsonl", "--rule", "topk_abs", "--max-score", "-2")
    warning = "nothing was mined: no query has a candidate that passes --rule topk_abs --max-score -2.0"
    assert counts["negatives"] == 0 and counts["warning"] == warning
    assert json.loads(Path(counts["report"]).read_text())["warning"] == warning
    assert f"warning: {warning}" in caplog.text
    assert "warning" not in run_mine("pairs.jsonl", "some.jsonl", "--rule", "topk_abs")


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        ("write_json", "report.json: cannot be written (No space left on device). out.jsonl is complete."),
        ("write_jsonl", "out.jsonl: cannot be written (No space left on device). Make room, and the same command"),
    ],
)
def test_full_disk_fails_with_the_name_of_the_file(
    encoder: StubEncoder, monkeypatch: pytest.MonkeyPatch, writer: str, message: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"jaxembed.curation.source_mining.{writer}", full)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        run_mine("pairs.jsonl", "out.jsonl", "--report", "report.json")
    assert [path.name for path in Path().glob("out.jsonl*")] == ["out.jsonl"] * (writer == "write_json")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_message_says_what_is_kept(encoder: StubEncoder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(encoder, "encode", lambda texts: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=r"the vectors and scores so far are kept in .*cache; the same command continues") as stop:
        run_mine("pairs.jsonl", "out.jsonl")
    assert stop.value.signal == number and signal.getsignal(number) == before
    assert not Path("out.jsonl").exists()


def test_options_mirror_the_mine_section() -> None:
    """Names, defaults and descriptions of the options come from the section."""
    text = " ".join(mine_command.make_parser().format_help().split())
    for key, field in mine_command.list_rule_fields().items():
        assert f"--{key.replace('_', '-')}" in text and " ".join(str(field.description).split()) in text
    arguments = mine_command.make_parser().parse_args(["MODEL", "IN", "OUT"])
    assert mine_command.read_rule(arguments) == MineConfig()
    arguments = mine_command.make_parser().parse_args(["MODEL", "IN", "OUT", "--rule", "window", "--window", "3", "9"])
    assert mine_command.read_rule(arguments) == MineConfig(rule="window", window=(3, 9))
    arguments = mine_command.make_parser().parse_args(["MODEL", "IN", "OUT", "--consistency-top-k", "0"])
    assert mine_command.read_rule(arguments) == MineConfig()
