"""The command `curate`: its files and report, continuation after a kill, and bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxembed import cli, config
from jaxembed import curate as curate_command
from jaxembed.config import SourceConfig
from jaxembed.config.curation import load_curate_config
from jaxembed.curation import engine
from jaxembed.curation.batches import map_batches
from jaxembed.curation.curation_sources import open_curated_sources
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.sources import open_source
from jaxembed.errors import UserError
from jaxembed.files import read_json

ROOT = Path(__file__).parents[2]
STEPS: list[dict[str, Any]] = [
    {"name": "clean", "html": True},
    {"name": "duplicates", "of": "pairs"},
    {"name": "quality", "min_chars": 3},
    {"name": "duplicates", "of": "positives", "match": "near", "keep": ["source_priority", "longest"]},
    {"name": "balance", "max_rows": 40},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """A source of pairs with trouble, and one of scored pairs."""
    topics = ["budget", "garden", "harbor", "violin", "engine", "planet"]
    pairs = [
        {"query": f"<b>question {i}</b> about {topics[i % 6]}", "pos": [f"{topics[-1 - i % 6]} number {i * 7919} is described"]}
        for i in range(60)
    ]
    pairs += [pairs[3], {**pairs[4], "neg": ["no"]}, {"query": "<script>x</script>", "pos": ["alert & <i>more</i>"]}]
    scored = [{"sentence1": f"sentence {i}", "sentence2": "ab" * (i % 3), "score": 5.0} for i in range(1, 30) if i % 3]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "scored.jsonl", scored)
    return [{"path": str(tmp_path / "pairs.jsonl")}, {"path": str(tmp_path / "scored.jsonl")}]


def write_config(
    tmp_path: Path, sources: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]] = STEPS, **keys: Any
) -> Path:
    path = tmp_path / "config.yaml"
    tree = {"out": str(tmp_path / "out"), "sources": list(sources), "steps": list(steps), **keys}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return path


def run(path: Path, *overrides: str) -> dict[str, Any]:
    return curate_command.main(curate_command.make_parser().parse_args([str(path), *overrides]))


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_train_and_the_report_accounts_for_every_row(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    result = run(write_config(tmp_path, sources))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(read_all(tmp_path / "out")) == ["pairs.jsonl", "report.html", "report.json", "scored.jsonl"]
    assert result["rows"] == {"pairs": {"in": 63, "out": 40}, "scored": {"in": 20, "out": 1}}
    for name, counts in result["rows"].items():
        source = config.SourceConfig(path=str(tmp_path / "out" / f"{name}.jsonl"), min_score=1)
        assert len(open_source(source, tmp_path)) == counts["out"] == report["output"]["sources"][name]["rows"]
        steps = [step["sources"][name] for step in report["steps"]]
        assert [counts["in"], *(step["out"] for step in steps)] == [*(step["in"] for step in steps), counts["out"]]
    for steps in (report["steps"], report["config"]["steps"]):
        assert [step["name"] for step in steps] == [step["name"] for step in STEPS]
    assert report["steps"][0]["reasons"]["dropped"] == {"query: empty": 1}
    assert report["steps"][1]["reasons"]["dropped"] == {"positives: copy of another of the pairs": 2}
    assert report["steps"][2]["reasons"]["dropped"] == {"positives: shorter than min_chars": 10}
    assert report["steps"][0]["samples"]["changed"] and report["steps"][1]["samples"]["dropped"]
    assert set(report["output"]["samples"]) == {"random", "longest", "strangest"}


def test_the_page_escapes_every_text_and_loads_nothing(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    sources[0]["name"] = "<img src=x>"
    run(write_config(tmp_path, sources, [{"name": "quality", "min_chars": 3}]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;question" in page and "<b>" not in page and "<script" not in page
    assert "<img" not in page and "http" not in page and "src=" not in page.replace("src=x", "")


def test_the_same_config_gives_the_same_bytes_in_any_memory(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    path = write_config(tmp_path, sources)
    results = []
    for name, memory in (("a", 16), ("b", 512)):
        run(path, f"out={tmp_path / name}", f"memory_mb={memory}")
        results.append(read_all(tmp_path / name))
    assert results[0] == results[1]
    run(path, f"out={tmp_path / 'c'}", "seed=1")
    assert read_all(tmp_path / "c")["pairs.jsonl"] != results[0]["pairs.jsonl"]


def test_the_order_of_rows_does_not_affect_the_kept_rows(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    path, kept = write_config(tmp_path, sources), []
    for name in ("a", "b"):
        run(path, f"out={tmp_path / name}")
        kept.append([sorted((tmp_path / name / f"{source}.jsonl").read_text().splitlines()) for source in ("pairs", "scored")])
        for source in sources:
            lines = Path(source["path"]).read_text().splitlines(keepends=True)
            Path(source["path"]).write_text("".join(lines[::-1]))
    assert kept[0] == kept[1]


KILLER = """
import os, signal
def kill_once(row):
    if row.get("query", "").endswith("question 50 about harbor") and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return row
"""


def test_a_killed_curation_continues_with_the_same_bytes(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    """The second stage of four is killed. The first one is not repeated."""
    (tmp_path / "killer.py").write_text(KILLER)
    path = write_config(tmp_path, sources, [*STEPS[:2], {"name": "function", "function": "killer.kill_once"}, *STEPS[2:]])
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "jaxembed.curate", str(path)]
    killed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert killed.returncode == -9 and (tmp_path / "killed").exists()
    first_stage = tmp_path / "out" / ".unfinished" / "0"
    assert (first_stage / "stage.json").exists() and not (first_stage.parent / "1" / "stage.json").exists()
    assert not list((tmp_path / "out").glob("*.jsonl"))
    written = (first_stage / "stage.json").stat().st_mtime_ns
    continued = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert continued.returncode == 0 and "continues after 1 of 4 stages" in continued.stderr, continued.stderr
    whole = subprocess.run([*command, f"out={tmp_path / 'whole'}"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert json.loads(whole.stdout.splitlines()[-1])["rows"]["pairs"] == {"in": 63, "out": 40}
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")
    assert written < (tmp_path / "out" / "report.json").stat().st_mtime_ns


def test_a_changed_step_is_repeated_and_earlier_stages_are_not(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, sources, [*STEPS, {"name": "quality", "min_chars": 9999}])
    started: list[int] = []
    run_stage = engine.Curation._run_stage
    monkeypatch.setattr(engine.Curation, "_run_stage", lambda self, i, digest: (started.append(i), run_stage(self, i, digest)))
    message = (
        r"^the output: no row is left, because steps.5 \(quality\) dropped the last ones \(query: shorter than min_chars: 41"
    )
    with pytest.raises(UserError, match=message):
        run(path)
    with pytest.raises(UserError, match=message):
        run(path, "steps.5.max_chars=10000")
    assert started == [0, 1, 2, 3, 3]
    run(path, "steps.4.max_rows=50", "steps.5.min_chars=1")  # the rows that step 4 needs are gone
    assert started[5:] == [0, 1, 2, 3]
    run(path, "steps.4.max_rows=50", "steps.5.min_chars=1", f"out={tmp_path / 'reference'}")
    assert read_all(tmp_path / "out") == read_all(tmp_path / "reference")


def test_metadata_is_written_if_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q one", "pos": ["p"], "year": 2020, "lang": "en"}])
    path = write_config(tmp_path, [{"path": str(tmp_path / "a.jsonl")}], STEPS[:1], metadata=["year"])
    run(path)
    assert json.loads((tmp_path / "out" / "a.jsonl").read_text()) == {"query": "q one", "pos": ["p"], "year": 2020}


def test_every_format_goes_through_all_steps(tmp_path: Path) -> None:
    """Documents, NLI data and BEIR folders become pairs; other formats stay. The files train."""
    topics = ["garden", "harbor", "violin", "engine"]
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"query": f"the <i>{t}</i>", "pos": [f"about {t}s"], "neg": ["x y z"]} for t in topics],
        "scored": [{"sentence1": f"the {t}", "sentence2": f"a {t}", "score": 5} for t in topics],
        "labels": [{"text": f"a text on {t}", "label": "early" if t < "h" else "late"} for t in topics],
        "text": [{"text": f"only the {t}"} for t in topics],
        "nli": [{"premise": f"one {t}", "hypothesis": f"some {t}", "label": "entailment"} for t in topics],
        "documents": [{"title": f"title {t}", "body": f"body of the {t}", "lang": "en"} for t in topics],
    }
    for name, written in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", written)
    sources: list[dict[str, Any]] = [{"path": str(tmp_path / f"{name}.jsonl")} for name in rows]
    sources[-1]["pair_templates"] = [{"query": "{title}", "positive": "{body}"}]
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_jsonl(beir / "corpus.jsonl", [{"_id": t, "text": f"passage on {t}"} for t in topics])
    write_jsonl(beir / "queries.jsonl", [{"_id": t, "text": f"which {t}?"} for t in topics])
    (beir / "qrels" / "train.tsv").write_text("".join(f"{t}\t{t}\t1\n" for t in topics))
    steps = [
        *STEPS,
        {"name": "negatives"},
        {"name": "decontaminate", "files": [str(tmp_path / "text.jsonl")], "sides": ["negatives"]},
    ]
    run(write_config(tmp_path, [*sources, {"path": str(beir)}], steps, format="array_record"))
    formats = {name: source["format"] for name, source in read_json(tmp_path / "out" / "report.json")["sources"].items()}
    assert formats == {name: name for name in ("pairs", "labels", "text")} | {"scored": "scored_pairs"} | dict.fromkeys(
        ["nli", "documents", "beir"], "pairs"
    )
    for name in formats:
        source = open_source(config.SourceConfig(path=str(tmp_path / "out" / f"{name}.array_record")), tmp_path)
        assert source.row_count == len(topics), name


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps.0.nam=clean"], r"unknown key steps.0.nam. Did you mean steps.0.name\?"),
        (["steps.0.htlm=true"], r"unknown key steps.0.htlm. Did you mean steps.0.html\?"),
        (["steps.0={name: cleen}"], r"steps\.0\.name is 'cleen' \(expected clean or quality or language"),
        (["steps.2.min_chars=-1"], r"steps.2.min_chars is -1 \(expected a number that is at least 0\)"),
        (["steps.2.max_chars=2"], r"max_chars is 2, less than min_chars, 3. Swap them"),
        (["steps.2.min_tokens=2"], r"min_tokens and max_tokens count the tokens of a model. Set tokenizer"),
        (['steps.2.drop_patterns=["("]'], r"steps.2.drop_patterns: '\(' is not a regular expression"),
        (["steps.4={name: balance}"], "a balance step needs rows, max_rows or share"),
        (["steps.4={name: language}"], "a language step needs languages, pairs, or language_pairs"),
        (["steps.4={name: function, function: f}"], "expected the dotted path of a function"),
        (["sources.0.path=absent.jsonl"], r"absent.jsonl: no such file or folder"),
        (["sources.0.pth=a"], r"unknown key sources.0.pth. Did you mean sources.0.path"),
        (["sources.0.name=scored"], "several sources are named scored"),
        (["steps.4={name: balance, by: topic, max_rows: 3}"], "balance by topic: no row has this field"),
        (["steps.2={name: quality, min_chars: 10000}"], r"steps.3 \(duplicates\): no row is left, because steps.2 \(quality\)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, sources: list[dict[str, Any]], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(write_config(tmp_path, sources), *overrides)


def test_a_side_that_no_source_has_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "some text", "label": "x"}])
    path = write_config(tmp_path, [{"path": str(tmp_path / "a.jsonl")}], [{"name": "clean", "sides": ["positives"]}])
    with pytest.raises(UserError, match=r"steps.0 \(clean\): no source has positives \(the rows are labels\)"):
        run(path)
    with pytest.raises(UserError, match=r"steps.0 \(negatives\): no source has pairs"):
        run(path, "steps=[{name: negatives}]")


def test_the_output_of_another_curation_is_refused(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    path = write_config(tmp_path, sources)
    run(path)
    before = read_all(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: already exists\. Remove it"):
        run(path)
    assert read_all(tmp_path / "out") == before
    with pytest.raises(UserError, match="no row is left"):
        run(path, f"out={tmp_path / 'other'}", "steps.2.min_chars=10000")
    with pytest.raises(UserError, match="other: holds an unfinished curation of other sources"):
        run(path, f"out={tmp_path / 'other'}", f"sources=[{{path: {tmp_path / 'pairs.jsonl'}}}]")
    with pytest.raises(UserError, match="other: holds an unfinished curation of other sources"):
        run(path, f"out={tmp_path / 'other'}", "sources.0.min_chars=1")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: already exists"):
        run(path, f"out={tmp_path / 'file'}")
    with pytest.raises(UserError, match="cannot be created"):
        run(path, f"out={tmp_path / 'file' / 'below'}")


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write_config(tmp_path, sources)
    with monkeypatch.context() as context:
        context.setattr(engine, "write_rows", full)
        with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\). Make room"):
            run(path)
    assert run(path)["rows"]["pairs"] == {"in": 63, "out": 40}


def test_two_processes_do_not_write_one_output(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    path = write_config(tmp_path, sources)
    with engine.lock_output(tmp_path / "out", "digest"), pytest.raises(UserError, match="another process is writing it"):
        run(path)


def test_a_function_that_fails_keeps_finished_stages_and_continues_after_the_repair(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fragile.py").write_text("def check(row):\n    return 1 / 0\n")
    path = write_config(tmp_path, sources, [*STEPS[:2], {"name": "function", "function": "fragile.check"}])
    with pytest.raises(UserError, match=r"pairs.jsonl:1: fragile.check failed \(ZeroDivisionError: division by zero\)"):
        run(path)
    assert (tmp_path / "out" / ".unfinished" / "0" / "stage.json").exists()
    result = run(path, "steps.2.on_error=keep")
    assert result["rows"]["pairs"] == {"in": 63, "out": 60}
    sys.modules.pop("fragile")


def test_an_output_whose_disk_was_full_at_the_start_is_used_later(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    assert run(write_config(tmp_path, sources))["files"]


def test_the_command_prints_one_json_object(
    tmp_path: Path, sources: list[dict[str, Any]], capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["curate", str(write_config(tmp_path, sources))])
    cli.run_command(curate_command.main, curate_command.make_parser())
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "curation").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_open_with_their_command(path: Path) -> None:
    assert load_curate_config(path) == load_curate_config(path.stem)
    with pytest.raises(UserError, match=f"Did you mean the shipped config {path.stem}"):
        load_curate_config(f"{path.stem}s")
    assert path.read_text().startswith(f"# python -m jaxembed.curate configs/curation/{path.name}\n")


def test_max_examples_has_no_effect(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}
    write_jsonl(tmp_path / "chat.jsonl", [chat, chat])
    source = SourceConfig(path=str(tmp_path / "chat.jsonl"), max_examples=1)
    assert open_curated_sources([source], tmp_path / "cache", "config.yaml")[0].num_rows == 2


def test_only_the_first_independent_steps_are_mapped_in_workers(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"name": "judge", "judge": {"model": "J"}}
    path = write_config(tmp_path, sources, [{"name": "clean"}, judge, {"name": "quality", "min_chars": 1}])
    monkeypatch.setattr("jaxembed.curation.model_steps.open_judge", lambda *_: lambda pairs: np.ones(len(pairs), np.float32))
    monkeypatch.setattr("jaxembed.curation.model_steps.find_folder", Path)
    mapped = []

    def map_in_workers(functions: Any, batches: Any) -> Any:
        mapped.append(len(functions))
        return map_batches(functions, batches)

    engine.curate(load_curate_config(path), curate_command.make_context(tmp_path / "cache"), str(path), map_in_workers)
    assert mapped == [1]
