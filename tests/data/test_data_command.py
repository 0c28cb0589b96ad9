"""The data command: its reports, previews, conversions and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import tiny
from helpers.commands import run_command
from jaxembed.config import SourceConfig, load_config
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.sources import open_rows, open_source
from jaxembed.errors import UserError

PAIRS = [{"query": f"q {i}", "pos": [f"the answer {i}", "x"], "neg": [f"not {i}"] * (i % 3)} for i in range(12)]
LABELS = [{"text": f"q {i}", "label": "aab"[i % 3]} for i in range(9)]
PREMISES = [("p", 0), ("p", 2), ("q", 1), ("r", -1)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with sources and make it the working directory and the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[0]])
    write_jsonl(tmp_path / "labels.jsonl", LABELS)
    (tmp_path / "texts.txt").write_text("one\ntwo words\n")
    write_beir(tmp_path / "beir", {"d": "one"}, {"q": "q 1"}, {"q": {"d": 1}})
    write_jsonl(tmp_path / "nli.jsonl", [{"premise": p, "hypothesis": f"h {i}", "label": i} for p, i in PREMISES])
    write_jsonl(tmp_path / "sts.jsonl", [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(6)])
    write_jsonl(tmp_path / "three.jsonl", [{"text": f"t {i}", "label": i % 3} for i in range(6)])
    tea = {"title": "Tea", "body": "Tea is a drink.", "lang": "en"}
    write_jsonl(tmp_path / "docs.jsonl", [tea, tea | {"lang": "de"}, {"title": "Ink", "lang": "en"}])
    write_jsonl(tmp_path / "odd names.jsonl", [{"question": "q 0", "answers": ["a", "b"], "id": 1}])
    templates = [*TEMPLATES, {"query": "{title}", "positive": "{title}: {body}"}]
    docs = {"path": "docs.jsonl", "pair_templates": templates, "where": {"lang": "en"}}
    scored = {"path": "sts.jsonl", "name": "sts", "min_score": 3}
    odd = {"path": "odd names.jsonl", "columns": {"query": "question", "pos": "answers"}}
    some = {"path": "pairs.jsonl", "name": "some", "max_examples": 4}
    two = {"path": "labels.jsonl", "name": "two", "label_names": {"a": "the good", "b": "the bad"}}
    configs = {
        "all": [{"path": "nli.jsonl"}, scored, some, docs, two, {"path": "three.jsonl"}, {"path": "texts.txt"}],
        "three": [docs, odd, scored],
        "typo": [{"path": "pairs.jsonl", "formt": "pairs"}],
    }
    for name, sources in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    return tmp_path


def run(*args: str) -> dict[str, Any]:
    return main(make_parser().parse_args(args))


def test_validate_lists_every_bad_row(data: Path) -> None:
    bad = ['{"query": "q"}', "no json", '{"query": "q", "pos": "p"}', *['{"pos": ["p"]}'] * 30]
    (data / "bad.jsonl").write_text("\n\n".join([json.dumps(PAIRS[0]), *bad]))
    done = run_command("jaxembed.data", "validate", "pairs.jsonl", "bad.jsonl", "texts.txt", "beir", "labels.jsonl")
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 2 and report["bad_rows"] == 33
    kinds = [(r["format"], r["rows"], r["bad_rows"]) for r in report["sources"]]
    assert kinds == [("pairs", 13, 0), ("pairs", 34, 33), ("text", 2, 0), ("beir", 1, 0), ("labels", 9, 0)]
    problems = report["sources"][1]["problems"]
    assert done.stderr.splitlines() == ["beir: uses qrels/test.tsv, the first that exists of train, dev, test", *problems]
    assert len(problems) == 20
    assert [problem.split(" ")[0] for problem in problems[:4]] == [
        "bad.jsonl:3:",
        "bad.jsonl:5:",
        "bad.jsonl:7:",
        "bad.jsonl:9:",
    ]


def test_validate_good_and_absent_sources(data: Path) -> None:
    done = run_command("jaxembed.data", "validate", "pairs.jsonl")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["bad_rows"]) == (0, "", 0)
    absent = run("validate", "absent.jsonl", "--format", "labels", "pairs.jsonl")["sources"]
    assert absent[0]["problems"] == ["absent.jsonl: no such file or folder."]
    assert absent[1]["bad_rows"] == 13


ONE = {"text": "alone", "label": "c"}
TEMPLATES = [{"query": "{title}", "positive": "{body}"}]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*LABELS, ONE], {}, "1 of 3 labels have a single text, which has no positive: 'c'. Add texts"),
        (LABELS, {"label_names": {"a": "x"}}, "label_names has no name for 'b'"),
        ([{"title": "t", "body": "b"}], {"pair_templates": [{"query": "{titel}", "positive": "{body}"}]}, "makes no pair"),
        ([{"title": "t", "body": "b"}], {"pair_templates": TEMPLATES, "where": {"lang": "en"}}, "where lang: 1"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}], {}, "no pair has a score of 4.0 or more"),
        ([{"premise": "a", "hypothesis": "b", "label": 1}], {}, "no premise has an entailed hypothesis"),
        (PAIRS, {"columns": {"prompt": "task"}}, "no row has the column 'task', which `columns` names for prompt"),
    ],
)
def test_validate_refuses_what_training_refuses(data: Path, rows: Any, options: Any, message: str) -> None:
    write_jsonl(data / "a.jsonl", rows)
    (data / "a.yaml").write_text(yaml.safe_dump({"data": {"sources": [{"path": "a.jsonl", "name": "mine", **options}]}}))
    with pytest.raises(UserError, match=message) as error:
        open_source(SourceConfig(path="a.jsonl", **options), data)
    (report,) = run("validate", "--config", "a.yaml")["sources"]
    assert report == {"source": "mine", "format": report["format"], "rows": len(rows), "examples": 0} | {
        "status": "missing column" if "columns" in options else "refused", "bad_rows": 1, "problems": [str(error.value)]
    }  # fmt: skip


def test_validate_prints_a_table_of_the_sources_of_a_config(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(data / "bad.jsonl", [*PAIRS, {"query": "q"}])
    sources = [
        {"path": "pairs.jsonl"},
        {"path": "absent.jsonl", "name": "absent"},
        {"path": "odd names.jsonl", "columns": {"query": "question", "pos": "reply"}},
        {"path": "bad.jsonl"},
    ]
    (data / "a.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    report = run("validate", "--config", "a.yaml")
    table = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in table] == [
        ["pairs.jsonl", "ok"], ["absent", "unreachable"], ["odd names.jsonl", "missing column"], ["bad.jsonl", "bad rows"],
    ]  # fmt: skip
    assert [line[2] for line in table] == ["13", "-", "1", "13"]
    assert [line[3:] for line in table] == [source["problems"][:1] for source in report["sources"]]
    assert table[2][3].startswith("odd names.jsonl: no row has the column 'reply', which `columns` names for pos")


def test_stats(data: Path, base_folder: Callable[[str], Path]) -> None:
    report = run("stats", "pairs.jsonl", "labels.jsonl", "beir")
    pairs, labels, beir = report["sources"]
    assert (pairs["rows"], pairs["duplicate_queries"], pairs["duplicate_pairs"]) == (13, 1, 2)
    assert pairs["a_row"]["positives"] == {"mean": 2, "median": 2, "p95": 2, "most": 2}
    assert pairs["a_row"]["negatives"] == {"mean": 0.92, "median": 1, "p95": 2, "most": 2}
    assert pairs["lengths"]["query"] == {"mean": 3.15, "median": 3, "p95": 4, "most": 4}
    assert (labels["labels"], labels["largest_labels"]) == (2, {"a": 6, "b": 3})
    assert (beir["format"], beir["rows"], beir["examples"]) == ("beir", 1, 1)
    shared = {"+".join(s["sources"]): (s["queries"], s["texts"]) for s in report["shared"]}
    assert shared == {"pairs.jsonl+labels.jsonl": (9, 9), "pairs.jsonl+beir": (1, 1), "labels.jsonl+beir": (1, 1)}
    tokens = run("stats", "texts.txt", "--model", str(base_folder("qwen3")))
    tokenizer = tiny.build_tokenizer()
    counted = [len(tokenizer(text)["input_ids"]) + 1 for text in ("one", "two words")]  # and EOS
    assert tokens["lengths_in"] == "tokens"
    assert tokens["sources"][0]["lengths"]["query"]["most"] == max(counted)


def test_stats_count_what_training_draws_from(data: Path) -> None:
    (nli, scored, some, documents, two, three, texts) = run("stats", "--config", "all.yaml")["sources"]
    counted = lambda report: (report["source"], report["rows"], report["examples"], report.get("left_out"))  # noqa: E731
    assert counted(nli) == ("nli.jsonl", 4, 1, {"rows without a label": 1, "premises without an entailed hypothesis": 2})
    assert nli["a_row"]["positives"]["most"] == nli["a_row"]["negatives"]["most"] == 1
    assert counted(scored) == ("sts", 6, 3, {"score below min_score": 3}) and scored["duplicate_queries"] == 0
    assert counted(some) == ("some", 13, 4, {"negatives equal to the query, to a positive or to each other": 4})
    assert counted(documents) == ("docs.jsonl", 3, 1, {"where lang": 1, "no template has all its fields": 1})
    assert documents["lengths"]["positive"]["most"] == len("Tea: Tea is a drink.")
    assert counted(two)[:3] == ("two", 9, 9) and two["largest_labels"] == {"the good": 6, "the bad": 3}
    assert (two["label_documents"], two["lengths"]["positive"]["most"]) == ("labels", len("the good"))
    assert (three["label_documents"], three["a_row"]["positives"]["most"]) == ("examples", 1)
    assert three["lengths"]["positive"]["most"] == len("t 5")
    assert texts["a_row"]["positives"]["mean"] == 1 and texts["lengths"]["positive"] == texts["lengths"]["query"]


def test_configs_of_the_guide_load(tmp_path: Path) -> None:
    """These configs have no model section, because the data commands need none."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text()
    configs = re.findall(r"```yaml\n(data:\n.*?)```", page, re.S)
    assert len(configs) == 3
    for text in configs:
        (tmp_path / "a.yaml").write_text(text)
        assert load_config(tmp_path / "a.yaml", base="").data.sources


def test_preview_shows_the_input_of_the_model(
    data: Path, base_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    report = run("preview", "pairs.jsonl", "texts.txt", "--batch-size", "16")
    assert caplog.messages == ["--batch-size: the sources have only 15 examples (found 16); all are shown"]
    shown = capsys.readouterr().out.splitlines()
    assert report["query"]["texts"] == 15 and report["lengths_in"] == "characters"
    assert sum("'the answer 3'" in line or "'x'" in line for line in shown) and any("negative" in line for line in shown)
    assert report["query"]["total"] == sum(int(line.split()[2]) for line in shown if " query " in line)
    config = {
        "model": {"instruction_template": "Do {instruction}:"},
        "data": {"max_length": 48, "sources": [{"path": "pairs.jsonl", "instructions": ["find it"]}]},
    }
    second_stage = {"data": {"sources": [{"path": "texts.txt"}]}, "train": {"steps": 1}}  # not in the first batch
    (data / "a.yaml").write_text(yaml.safe_dump({**config, "stages": [{"train": {"steps": 1}}, second_stage]}))
    report = run("preview", "--config", "a.yaml", "--batch-size", "3")
    shown = capsys.readouterr().out.splitlines()
    queries = [line for line in shown if " query " in line]
    assert report["query"]["total"] == sum(len(line.split("'")[1]) - len("[] ") for line in queries)
    assert len(queries) == 3 and all("'[Do find it:] q " in line for line in queries)
    report = run("preview", "--config", "a.yaml", "--model", str(base_folder("qwen3")))
    shown = capsys.readouterr().out.splitlines()
    assert report["lengths_in"] == "tokens" and report["query"]["longest"] <= 48
    assert all("[Do find it:] q " in line and "</s>" in line for line in shown if " query " in line)


def test_convert_renames_columns_and_writes_shards(data: Path) -> None:
    write_jsonl(data / "odd.jsonl", [{"question": r["query"], "answer": r["pos"][0], "id": 3} for r in PAIRS])
    columns = ("--columns", "{query: question, pos: answer}")
    report = run("convert", "odd.jsonl", "--shards", "5", "--out", "out/a.array_record", *columns)
    assert report["files"] == [f"out/a-{i:05d}-of-00005.array_record" for i in range(5)] and report["rows"] == 12
    assert run("convert", *report["paths"], "--out", "b.jsonl") == {"files": ["b.jsonl"], "paths": ["b.jsonl"], "rows": 12}
    expected = [{"query": r["query"], "pos": r["pos"][:1]} for r in PAIRS]
    assert [json.loads(line) for line in (data / "b.jsonl").read_text().splitlines()] == expected
    run("convert", "beir", "--out", "c.array_record")
    kind, rows = open_rows(SourceConfig(path="c.array_record"), data)
    assert (kind, len(rows), rows[0]) == ("pairs", 1, {"query": "q 1", "pos": ["one"]})
    assert not list(data.glob("**/*.partial"))


def test_convert_writes_the_sources_of_a_config(data: Path) -> None:
    done = run("convert", "--pairs", "--config", "three.yaml", "--out", "out/*.jsonl")
    assert done["paths"] == done["files"] == ["out/docs.jsonl", "out/odd_names.jsonl", "out/sts.jsonl"] and done["rows"] == 9
    docs, odd, sts = ([json.loads(line) for line in Path(path).read_text().splitlines()] for path in done["files"])
    assert docs == [{"query": "Tea", "pos": ["Tea is a drink."]}, {"query": "Tea", "pos": ["Tea: Tea is a drink."]}]
    assert odd == [{"query": "q 0", "pos": ["a", "b"]}]
    assert [row["query"] for row in sts] == ["a3", "b3", "a4", "b4", "a5", "b5"]
    done = run("convert", "--config", "three.yaml", "--shards", "2", "--out", "again/*.jsonl")
    assert done["rows"] == 2 + 1 + 6 and done["paths"][2] == "again/sts-*-of-00002.jsonl"
    assert [run("validate", path)["sources"][0]["rows"] for path in done["paths"]] == [2, 1, 6]


@pytest.mark.parametrize(
    "args",
    [
        ("pairs.jsonl", "out.jsonl"),
        ("pairs.jsonl", "--format", "pairs", "out.jsonl"),
        ("--pairs", "pairs.jsonl", "out.jsonl"),
    ],
)
def test_convert_takes_the_last_source_as_output_with_a_note(
    data: Path, args: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    assert run("convert", *args) == {"files": ["out.jsonl"], "paths": ["out.jsonl"], "rows": 13}
    note = "convert: the last SOURCE, out.jsonl, is taken as the output. Name it with --out out.jsonl instead."
    assert caplog.messages == [note]
    caplog.clear()
    run("convert", "pairs.jsonl", "--out", "same.jsonl")
    assert not caplog.messages and (data / "same.jsonl").read_bytes() == (data / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stats"], "SOURCE: expected either sources or --config CONFIG.yaml. Name one of the two."),
        (["convert"], "convert: the output is missing. Name it with --out OUT."),
        (["convert", "--out", "a.jsonl"], "SOURCE: expected either sources or --config"),
        (["convert", "pairs.jsonl", "--out", "labels.jsonl"], "labels.jsonl: already exists"),
        (["convert", "pairs.jsonl", "labels.jsonl"], "labels.jsonl: already exists"),
        (["convert", "pairs.jsonl", "a.csv"], "a.csv: expected an output that ends in .jsonl or .array_record"),
        (["convert", "labels.jsonl", "a.jsonl", "--format", "pairs"], 'labels.jsonl:1: "query" is missing'),
        (["stats", "labels.jsonl", "--columns", "{qury: text}"], "command line: unknown key columns.qury. Did you mean"),
        (["stats", "labels.jsonl", "--columns", "text"], "command line: columns is 'text' (expected a mapping"),
        (["stats", "labels.jsonl", "--format", "lables"], "command line: format is 'lables' (expected 'auto', 'pairs'"),
        (["preview", "labels.jsonl", "--model", "preset:tiny"], "--model preset:tiny: a preset has no tokenizer. Name a model"),
        (
            ["stats", "python_packages"],
            "command line: path: 'python_packages' is no longer a source. Run 'python -m jaxembed.data",
        ),
        (["validate", "--config", "absent.yaml"], "absent.yaml: no such config file"),
        (["stats", "--config", "three.yaml", "--columns", "{text: a}"], "--config: its sources describe their own rows."),
        (
            ["preview", "--config", "three.yaml", "--hard-negatives", "2"],
            "--hard-negatives: applies to named sources only. Set data",
        ),
        (
            ["stats", "--config", "typo.yaml"],
            "typo.yaml: unknown key data.sources.0.formt. Did you mean data.sources.0.format?",
        ),
        (
            ["convert", "--config", "three.yaml", "a.jsonl"],
            "a.jsonl: needs a * (replaced by the source name) because there are 3 sources.",
        ),
        (
            ["convert", "labels.jsonl", "beir/../labels.jsonl", "*.jsonl"],
            "*.jsonl: several sources are named labels. Give each its own",
        ),
    ],
)
def test_bad_input_raises_user_errors(data: Path, args: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        run(*args)
    assert str(error.value).startswith(message)
    assert not list(data.glob("**/*.partial"))


@pytest.mark.parametrize("option", ["--batch-size", "--hard-negatives", "--seed"])
def test_bad_numbers_are_argument_errors(data: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("preview", "labels.jsonl", option, "-1")
    assert f"argument {option}: -1 is less than" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("preview", "labels.jsonl", option, "x")
    assert f"argument {option}: 'x' is not an integer. See" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("preview", "labels.jsonl", f"{option}s", "-1")
    assert "error: unrecognized arguments: --" in capsys.readouterr().err


def test_preview_depends_on_the_seed_only(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for seed in ("0", "0", "1"):
        run("preview", "pairs.jsonl", "--seed", seed)
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1] != seen[2]
    assert np.all([line.startswith("pairs ") for line in seen[0].splitlines()])
