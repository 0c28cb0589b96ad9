"""Mined negatives against brute force and sentence-transformers; what a kill, duplicates and bad input do."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.runs import ENV
from jaxembed import cli
from jaxembed import mine as mine_command
from jaxembed.config import PythonPackagesConfig, SourceConfig
from jaxembed.curation import mining
from jaxembed.curation.mining import MiningOptions, Result, mine
from jaxembed.curation.pool import Pool, open_input, read_corpus, read_pool
from jaxembed.curation.report import details, line, summary
from jaxembed.curation.rules import RULES, Rule
from jaxembed.data.batch import RawText
from jaxembed.data.beir import write_beir
from jaxembed.data.sources import Source
from jaxembed.errors import Stopped, UserError
from jaxembed.hub.cross_encoder import open_cross_encoder
from jaxembed.hub.frozen_encoder import FrozenEncoder

DEPTH = 40
RULE = {"negatives": 4, "depth": DEPTH, "window": (5, 12), "max_score": 0.2, "margin": 0.1, "share": 0.8}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, cache: Path) -> Source:
    return open_input(SourceConfig(path=str(path)), PythonPackagesConfig(), cache)


def pool_of(folder: Path, rows: Sequence[Mapping[str, Any]], corpus: Sequence[str] | None = None, seed: int = 0) -> Pool:
    return read_pool(opened(write(folder / "pairs.jsonl", rows), folder), corpus, seed)


@functools.cache
def vector(text: str) -> np.ndarray:
    """A unit vector of a text; the numbers in a query and its positive lie near one another."""
    random = np.random.default_rng(list(text.strip().encode()))
    number = int("".join(filter(str.isdigit, text)) or 0)
    mixed = random.normal(size=6) + np.random.default_rng(number).normal(size=6)
    return (mixed / np.linalg.norm(mixed)).astype(np.float32)


def vectors(texts: Sequence[str]) -> np.ndarray:
    return np.stack([vector(text) for text in texts])


def mined(pool: Pool, rescore: mining.Score | None = None, rule: str = "top_k", **ways: Any) -> Result:
    changed = {name: ways.pop(name) for name in list(ways) if name in RULE}
    queries, documents = vectors([query.text for query in pool.queries]), vectors(pool.documents)
    return mine(pool, queries, documents, MiningOptions(Rule(rule, **{**RULE, **changed}), **ways), rescore)


def lines(pool: Pool, result: Result) -> dict[str, dict[str, Any]]:
    """The rows as they are written, by query."""
    return {row["query"]: row for row in (line(pool, mined) for mined in result.rows)}


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return [{"query": f"query {i}", "pos": [f"answer {i}"], "neg": [f"old {i}", f"older {i}"]} for i in range(60)]


def allowed(query: str, positive: str, texts: Sequence[str], rule: str) -> list[str]:
    """What a rule allows, best first, by a plain loop."""
    scores = {text: float(vector(query) @ vector(text)) for text in texts}
    own = scores.pop(positive)
    best = sorted(scores, key=lambda text: -scores[text])
    limit = {"topk_abs": 0.2, "topk_margin_pos": own - 0.1, "topk_perc_pos": own - 0.2 * abs(own)}
    if rule == "window":
        return best[4:12]
    return [text for text in best[:DEPTH] if scores[text] <= limit.get(rule, 2)]


@pytest.mark.parametrize("rule", RULES)
def test_rules_against_brute_force(pairs: list[dict[str, Any]], tmp_path: Path, rule: str) -> None:
    drawn_by_chance = rule in ("sampled_top_k", "window")
    pools = [pool_of(tmp_path, pairs, seed=seed) for seed in range(25 if drawn_by_chance else 1)]
    results, differ = [lines(pool, mined(pool, rule=rule)) for pool in pools], 0
    for pair in pairs:
        query, positive = pair["query"], pair["pos"][0]
        expected = allowed(query, positive, pools[0].documents, rule)
        found = [result[query]["neg"] for result in results]
        if drawn_by_chance:
            assert all(sorted(drawn, key=expected.index) == drawn and len(set(drawn)) == 4 for drawn in found)
            assert len({text for drawn in found for text in drawn} & set(expected)) >= min(len(expected), 30)
        else:
            assert found == [expected[:4]]
            differ += found[0] != allowed(query, positive, pools[0].documents, "top_k")[:4]
        row = results[0][query]
        np.testing.assert_allclose(row["pos_scores"], vectors([positive]) @ vector(query), atol=2e-6)
        np.testing.assert_allclose(row["neg_scores"], [vector(text) @ vector(query) for text in row["neg"]], atol=2e-6)
    assert (differ > 10) == rule.startswith("topk")


class Stub:
    """What sentence-transformers' miner asks of a model."""

    device = torch.device("cpu")

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return vectors(texts)

    encode_document = encode_query

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> torch.Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=1)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("top_k", {}),
        ("topk_abs", {"max_score": 0.2}),
        ("topk_margin_pos", {"absolute_margin": 0.1}),
        ("topk_perc_pos", {"relative_margin": 0.2}),
    ],
)
def test_rules_equal_those_of_sentence_transformers(
    pairs: list[dict[str, Any]], tmp_path: Path, rule: str, options: dict[str, float]
) -> None:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    corpus = [f"document {i}" for i in range(80)]
    columns = {"query": [row["query"] for row in pairs], "pos": [row["pos"][0] for row in pairs]}
    theirs = mine_hard_negatives(
        Dataset.from_dict(columns), Stub(), corpus=corpus, num_negatives=4, range_max=140, output_format="labeled-list",
        output_scores=True, verbose=False, **options,
    )  # fmt: skip
    pool = pool_of(tmp_path, pairs, [*corpus, *columns["pos"]])
    ours = lines(pool, mined(pool, rule=rule, depth=140))
    assert 40 < len(theirs) == sum(bool(row["neg"]) for row in ours.values())
    for query, (positive, *negatives), scores in zip(*theirs.to_dict().values(), strict=True):
        row = ours[query]
        assert (row["pos"], row["neg"]) == ([positive], negatives)
        np.testing.assert_allclose([*row["pos_scores"], *row["neg_scores"]], scores, atol=2e-6)


def test_draws_are_the_same_in_any_order(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of the rows, and with rows before them."""
    rows = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    first, second = (pool_of(tmp_path, some, [f"document {i}" for i in range(90)]) for some in (pairs, rows))
    assert lines(first, mined(first, rule="window")) == lines(second, mined(second, rule="window"))


def test_no_positive_is_a_negative(tmp_path: Path) -> None:
    """Not of another row with the query, nor with other white space around it, nor the query itself."""
    rows = [
        {"query": "q 1", "pos": ["a 1", "b 1"], "prompt": "Find it"},
        {"query": " q 1", "pos": ["c 1"], "neg": ["b 1 ", "d 2"]},
        {"query": "q 2", "pos": ["d 2"], "neg": ["a 1"]},
    ]
    pool = pool_of(tmp_path, rows, ["a 1\n", " b 1", "b 1", "c 1", "q 1 ", "d 2", "q 2", "", " ", "e"])
    assert (pool.searched, len(pool.documents), len(pool.queries)) == (7, 7, 3)
    result = mined(pool)
    written = [line(pool, row) for row in result.rows]
    assert [row["pos"] for row in written] == [["a 1\n", " b 1"], ["c 1"], ["d 2"]]
    assert [row.get("prompt") for row in written] == ["Find it", None, None]
    assert [set(row["neg"]) for row in written] == [{"d 2", "q 2", "e"}] * 2 + [{"a 1\n", " b 1", "c 1", "q 1 ", "e"} - {min(
        ["a 1\n", " b 1", "c 1", "q 1 ", "e"], key=lambda text: vector("q 2") @ vector(text))}]  # fmt: skip
    counts = summary(pool, result, Rule(**RULE))
    expected = {"rows": 3, "written": 3, "dropped": {"inconsistent": 0}, "corpus": 7, "blank_documents": 2}
    expected |= {"negatives": 10, "short_rows": 2, "missing_negatives": 2, "rows_without_negatives": 0, "queries": 3}
    assert counts.items() >= expected.items()
    kept = [line(pool, row) for row in mined(pool, keep_negatives=True).rows]
    assert kept[1]["neg"][0] == "d 2" and kept[2]["neg"][0] == "a 1\n"
    for row in kept:
        assert len(set(row["neg"])) == len(row["neg"]) == len(row["neg_scores"])
        np.testing.assert_allclose(row["neg_scores"], [vector(row["query"]) @ vector(text) for text in row["neg"]], atol=2e-6)
    assert len(kept[2]["neg"]) == 5  # its own, and as many new ones as asked for


def test_positives_that_the_model_does_not_find_leave(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**pair, "pos": [*pair["pos"], f"another {i}"]} for i, pair in enumerate(pairs)]
    pool = pool_of(tmp_path, rows)
    expected = {}
    for row in rows:
        others = [text for text in pool.documents if text not in row["pos"]]
        ranks = [sum(vector(row["query"]) @ vector(o) > vector(row["query"]) @ vector(p) for o in others) for p in row["pos"]]
        if passed := [text for text, rank in zip(row["pos"], ranks, strict=True) if rank < 3]:
            expected[row["query"]] = passed
    result = mined(pool, rule="topk_margin_pos", consistency=3)
    assert {query: row["pos"] for query, row in lines(pool, result).items()} == expected
    assert 10 < len(expected) == len(rows) - len(result.inconsistent) < 50
    assert 0 < sum(len(positives) == 1 for positives in expected.values()) < len(expected)
    for query, row in lines(pool, result).items():  # a positive that left is still no negative
        assert not set(row["neg"]) & {f"answer {query.split()[1]}", f"another {query.split()[1]}"}
    assert summary(pool, result, Rule())["dropped"] == {"inconsistent": len(rows) - len(expected)}
    few = {"positives": sum(map(len, expected.values())), "inconsistent_positives": 120 - sum(map(len, expected.values()))}
    assert summary(pool, result, Rule()).items() >= few.items()
    told = details(pool, result)
    assert len(told["samples"]["kept"]) == len(told["samples"]["inconsistent"]) == 5
    assert sum(told["scores"]["positive"]) == sum(map(len, expected.values()))
    everything = mined(pool, rule="topk_margin_pos", consistency=3, by_bm25=True)
    assert [row.positives for row in everything.rows] == [row.positives for row in result.rows]
    far = pool_of(
        tmp_path, [{"query": "query 1", "pos": [min(pool.documents, key=lambda text: vector("query 1") @ vector(text))]}]
    )
    far = dataclasses.replace(far, documents=[*far.documents, *pool.documents], searched=1 + len(pool.documents))
    with pytest.raises(UserError, match="no positive is among the 2 nearest of its query; raise --consistency-top-k"):
        mined(far, consistency=2)


def test_an_approximate_search_tells_its_recall(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    pool = pool_of(tmp_path, pairs)
    result = mined(pool, approximate=True)
    assert 0.9 < summary(pool, result, Rule())["recall"] <= 1
    assert mined(pool).recall is None


def test_candidates_by_bm25_keep_its_order_and_have_the_models_scores(tmp_path: Path) -> None:
    texts = ["red apple tree", "red apple", "green apple pie", "blue sky", "grey stone wall"]
    pool = pool_of(tmp_path, [{"query": "red apple tree house", "pos": ["a house with a red apple tree"]}], texts)
    row = lines(pool, mined(pool, by_bm25=True, negatives=2))["red apple tree house"]
    assert row["neg"] == ["red apple tree", "red apple"]
    np.testing.assert_allclose(row["neg_scores"], [vector(row["query"]) @ vector(text) for text in row["neg"]], atol=2e-6)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross")
    body = tiny.bert_folder(folder)
    BertForSequenceClassification.from_pretrained(body, num_labels=1).save_pretrained(folder / "scorer")
    for file in body.glob("*token*"):
        shutil.copy(file, folder / "scorer")
    assert CrossEncoder(str(folder / "scorer"), device="cpu").num_labels == 1
    return folder / "scorer"


def test_a_cross_encoder_scores_anew(
    cross_encoder: Path,
    pairs: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sentence_transformers import CrossEncoder

    score = open_cross_encoder(str(cross_encoder), tmp_path)
    pool = pool_of(tmp_path, pairs[:4])
    found = lines(pool, mined(pool, mining.of_texts(score, pool), depth=8))
    reference = CrossEncoder(str(cross_encoder), device="cpu")
    for row in found.values():
        nearest = allowed(row["query"], row["pos"][0], pool.documents, "top_k")[:8]
        scores = dict(zip(nearest, reference.predict([(row["query"], text) for text in nearest]), strict=True))
        assert row["neg"] == sorted(nearest, key=lambda text: -scores[text])[:4] != nearest[:4]
        np.testing.assert_allclose(row["neg_scores"], [scores[text] for text in row["neg"]], atol=2e-6)
        np.testing.assert_allclose(row["pos_scores"], reference.predict([(row["query"], row["pos"][0])]), atol=2e-6)
    monkeypatch.setattr(CrossEncoder, "predict", None)  # what was scored is kept
    again = mined(pool, mining.of_texts(open_cross_encoder(str(cross_encoder), tmp_path), pool), depth=8)
    assert lines(pool, again) == found
    with pytest.raises(UserError, match="nowhere: neither a folder"):
        open_cross_encoder(str(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weights in safetensors files"):
        open_cross_encoder(str(tmp_path), tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="sentence-transformers cannot load it as a cross-encoder"):
        open_cross_encoder(str(tmp_path), tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with pytest.raises(UserError, match=r"model: holds no classifier\.weight, classifier\.bias, so that its scores would be"):
        open_cross_encoder(str(cross_encoder.with_name("model")), tmp_path)
    assert "classifier" not in caplog.text  # transformers' own report of it


KILLED = """
import os, runpy, signal
from jaxembed.curation import mining
from jaxembed.hub.frozen_encoder import OtherModel
mining.AT_ONCE, run, calls = 8, OtherModel._run, []
def killed(self, texts, lead):
    calls.append(texts)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, texts, lead)
OtherModel._run = killed
runpy.run_module("jaxembed.mine", run_name="__main__", alter_sys=True)
"""


def test_a_killed_command_goes_on_where_it_was(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors of the parts that were done are not computed again, and there is no half file."""
    pairs = [{"query": f"q {i}", "pos": [f"answer {i}"]} for i in range(20)]
    source, out, texts = write(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl", []
    arguments = [str(base_folder("qwen3")), str(source), str(out), "--rule", "top_k", "--instruction", "Find it"]
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    environment = {**ENV, "JAXEMBED_CACHE": str(tmp_path / "cache")}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert killed.returncode == -9
    assert not out.exists()
    (kept,) = (tmp_path / "cache").rglob("vectors/*/vectors")
    before = kept.read_bytes()
    assert len(before) == 28 * 4 * 32  # three parts of the queries, one of the documents

    run = FrozenEncoder._run
    monkeypatch.setattr(FrozenEncoder, "_run", lambda self, new, lead: texts.extend(new) or run(self, new, lead))
    monkeypatch.setattr(sys, "argv", ["mine", *arguments])
    cli.run(mine_command.main, mine_command.make_parser())
    assert texts == [f"answer {i}" for i in range(8, 20)]
    assert kept.read_bytes()[: len(before)] == before
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["negatives"] == 20 * 7 and told["out"] == str(out)
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["query"] for row in rows] == [pair["query"] for pair in pairs]
    assert all(row["prompt"] == "Find it" and len(row["neg"]) == len(row["neg_scores"]) == 7 for row in rows)
    report = json.loads(Path(told["report"]).read_text())
    assert report["written"] == 20 and report["model"]["name"] == arguments[0] and report["ways"]["rule"]["name"] == "top_k"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in.jsonl", "out.jsonl", "out.jsonl.report.json"]


def test_giant_texts_are_cut_and_counted(tmp_path: Path) -> None:
    giant = "word " * 50_000
    pool, seen = pool_of(tmp_path, [{"query": "a", "pos": [giant, "b"]}]), []

    def encode(texts: Sequence[Any]) -> np.ndarray:
        seen.extend(texts)
        return vectors([text.text for text in texts])

    documents = mining.embed([pool.queries[0]._replace(text=text) for text in pool.documents], encode, 6, "documents")
    assert [len(text.text) for text in seen] == [mining.LONGEST, 1] and len(documents) == 2
    result = mine(pool, vectors(["a"]), documents, MiningOptions(Rule()))
    assert summary(pool, result, Rule())["cut_texts"] == 1
    assert line(pool, result.rows[0])["pos"] == [giant, "b"]


def test_bad_input_is_told_in_a_line(tmp_path: Path) -> None:
    def error_of(function: Callable[..., Any], *args: Any) -> str:
        with pytest.raises(UserError) as error:
            function(*args)
        return str(error.value)

    def corpus(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    pairs = [{"query": "a", "pos": ["b"]}]
    labels = write(tmp_path / "labels.jsonl", [{"text": "a", "label": "b"}])
    assert "rows of text and label draw their negatives by label" in error_of(opened, labels, tmp_path)
    assert "holds no text" in error_of(pool_of, tmp_path, pairs, [" ", ""])
    assert "nowhere: no such file or folder" in error_of(list, read_corpus([str(tmp_path / "nowhere")], tmp_path))
    assert '"text" is missing' in error_of(list, read_corpus([corpus("bad.jsonl", '{"id": 1}\n')], tmp_path))
    write_beir(tmp_path / "beir", {"1": "one", "2": "two"}, {"q": "?"}, {"q": {"1": 1}})
    lines = [corpus("lines.txt", "three\nfour"), corpus("rows.jsonl", '{"title": "five", "text": "six"}\n')]
    assert list(read_corpus([str(tmp_path / "beir"), *lines], tmp_path)) == ["one", "two", "three", "four", "five six"]
    assert list(read_corpus([corpus("other.jsonl", '{"body": "seven"}\n')], tmp_path, "body")) == ["seven"]
    with (tmp_path / "beir" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "1", "text": "again"}\n')
    assert "corpus.jsonl:3: _id '1' is that of" in error_of(list, read_corpus([str(tmp_path / "beir")], tmp_path))


class Encoder:
    """What mining asks of a model; `asked` are the texts that it encoded."""

    identity, width = {"name": "stub"}, 6

    def __init__(self) -> None:
        self.asked: list[RawText] = []

    def encode(self, texts: Sequence[RawText]) -> np.ndarray:
        self.asked += texts
        return vectors([text.text for text in texts])


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[dict[str, Any]]) -> Encoder:
    """The model of commands that run in a folder with pairs.jsonl and config.yaml."""
    stub = Encoder()
    monkeypatch.setattr("jaxembed.hub.frozen_encoder.open_encoder", lambda *_: stub)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "documents.jsonl", [{"title": row["query"], "body": row["pos"][0]} for row in pairs])
    templates = [{"query": "{title}", "positive": "{body}"}]
    documents = {"path": "documents.jsonl", "name": "titles", "pair_templates": templates, "max_examples": 30}
    documents |= {"instructions": ["Find it"], "document_instruction": "A body"}
    sources = [documents, {"path": "pairs.jsonl"}]
    tree = {"model": {"base": "preset:tiny"}, "data": {"sources": sources}, "train": {"steps": 1}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    return stub


def command(*arguments: str) -> dict[str, Any]:
    return mine_command.main(mine_command.make_parser().parse_args(["MODEL", *arguments]))


LONG = "x" * 245 + ".jsonl"  # a name that leaves no room for what is added while it is written


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("pairs.jsonl out.parquet", "out.parquet: expected an output that ends in .jsonl"),
        (f"pairs.jsonl {LONG}", "x.jsonl: cannot be written (File name too long); name another output"),
        (f"pairs.jsonl out.jsonl --report {LONG}", "x.jsonl: cannot be written (File name too long); name another output"),
        (f"pairs.jsonl {LONG[10:]}", "x.jsonl.report.json: cannot be written (File name too long); name another output"),
        ("pairs.jsonl out.jsonl --report ./out.jsonl", "--report out.jsonl: is OUT itself; name another file"),
        ("pairs.jsonl out.jsonl --share 2", "--rule topk_perc_pos: share: expected "),
        ("pairs.jsonl out.jsonl --rule topk_margin_pos --margin -1", "--rule topk_margin_pos: margin: expected "),
        ("pairs.jsonl out.jsonl --depth 5", "--rule topk_perc_pos: depth is 5, fewer candidates than the 7 negatives"),
        ("pairs.jsonl out.jsonl --rule window --window 9 3", "window is 9 to 3; expected two ranks, the first not after"),
        ("pairs.jsonl out.jsonl --rule window --window 3 8", "window is 3 to 8, fewer ranks than the 7 negatives"),
        ("pairs.jsonl out.jsonl --rule window --share 1", "--share is not read by --rule window, but by topk_perc_pos; leave"),
        ("pairs.jsonl out.jsonl --rule window --depth 9", "--depth is not read by --rule window, but by topk_perc_pos, topk_"),
        ("pairs.jsonl out.jsonl --window 1 9", "--window is not read by --rule topk_perc_pos, but by window; leave it out"),
        (
            "pairs.jsonl out.jsonl --rule window --window 180 190",
            "of 180 documents at most 179 may be negatives of one query, and --rule window --window 180 190 takes them from",
        ),
        ("pairs.jsonl out.jsonl --fsdp 3", "--fsdp is 3, which does not divide the number of devices here, 8; use a divisor"),
        ("pairs.jsonl out.jsonl --format pair", "command line: format: expected 'auto', 'pairs'"),
        ("no out.jsonl --config config.yaml", "config.yaml: 0 sources are named no; expected the name of one: titles, pairs"),
        ("pairs out.jsonl --config config.yaml --format text", "--config: its sources say what their rows are; leave --format"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_encoded(encoder: Encoder, arguments: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        command(*arguments.split())
    assert told in str(error.value)
    assert not encoder.asked and not list(Path().glob("*out*")) and not list(Path().glob("x*"))


def test_documents_of_a_config_are_mined_as_it_says(encoder: Encoder, pairs: list[dict[str, Any]]) -> None:
    """With its instructions, of its first `max_examples`; and other columns by an option."""
    told = command("titles", "out.jsonl", "--config", "config.yaml", "--rule", "top_k")
    assert (told["rows"], told["corpus"], told["negatives"]) == (30, 30, 30 * 7)
    assert {(text.side, text.instruction) for text in encoder.asked} == {("query", "Find it"), ("document", "A body")}
    rows = [json.loads(row) for row in Path("out.jsonl").read_text().splitlines()]
    positives = {pair["query"]: pair["pos"] for pair in pairs}
    assert all(row["prompt"] == "Find it" and row["pos"] == positives[row["query"]] for row in rows)
    assert json.loads(Path("out.jsonl.report.json").read_text())["source"]["name"] == "titles"
    mapping = "{query: title, pos: body}"
    told = command("documents.jsonl", "other.jsonl", "--columns", mapping, "--instruction", "Ask", "--rule", "top_k")
    assert told["rows"] == 60 and '"prompt": "Ask"' in Path("other.jsonl").read_text()


def test_a_rule_that_nothing_passes_is_warned_of(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    told = command("pairs.jsonl", "out.jsonl", "--rule", "topk_abs", "--max-score", "-2")
    warning = "nothing was mined: no query has a candidate that passes --rule topk_abs --max-score -2.0"
    assert told["negatives"] == 0 and told["warning"] == warning == json.loads(Path(told["report"]).read_text())["warning"]
    assert f"warning: {warning}" in caplog.text
    assert "warning" not in command("pairs.jsonl", "some.jsonl", "--rule", "topk_abs")


@pytest.mark.parametrize(
    ("writer", "told"),
    [
        ("files.write_json", "report.json: cannot be written (No space left on device); out.jsonl is whole"),
        ("data.jsonl.write_lines", "out.jsonl: cannot be written (No space left on device); make room, and the same command"),
    ],
)
def test_a_full_disk_costs_one_file(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, writer: str, told: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"jaxembed.{writer}", full)
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        command("pairs.jsonl", "out.jsonl", "--report", "report.json")
    assert [path.name for path in Path().glob("out.jsonl*")] == ["out.jsonl"] * (writer == "files.write_json")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_says_what_is_kept(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(encoder, "encode", lambda texts: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=r"the vectors and scores so far are kept in .*cache; the same command goes on") as stop:
        command("pairs.jsonl", "out.jsonl")
    assert stop.value.signal == number and signal.getsignal(number) == before
    assert not Path("out.jsonl").exists()
