"""Mined negatives against brute force and sentence-transformers, and the texts that mining reads."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.mining import DEPTH, RULE, draw_vector, draw_vectors, make_pool, mine_pool, open_file, rows_by_query
from helpers.sources import write_jsonl
from jaxembed.config import MineConfig
from jaxembed.config.mining import MINING_RULES
from jaxembed.curation import mining
from jaxembed.curation.mining import MiningOptions, check_rows_left, mine_negatives
from jaxembed.curation.pool import read_corpus
from jaxembed.curation.report import collect_scores_and_samples, count_outcomes, to_output_row
from jaxembed.data.beir import write_beir
from jaxembed.errors import UserError
from jaxembed.hub.cross_encoder import open_cross_encoder


def find_allowed(query: str, positive: str, texts: Sequence[str], rule: str) -> list[str]:
    """Return what a rule allows, best first, by a plain loop."""
    scores = {text: float(draw_vector(query) @ draw_vector(text)) for text in texts}
    own = scores.pop(positive)
    best = sorted(scores, key=lambda text: -scores[text])
    limit = {"topk_abs": 0.2, "topk_margin_pos": own - 0.1, "topk_perc_pos": own - 0.2 * abs(own)}
    if rule == "window":
        return best[4:12]
    return [text for text in best[:DEPTH] if scores[text] <= limit.get(rule, 2)]


@pytest.mark.parametrize("rule", MINING_RULES)
def test_rules_match_brute_force(pairs: list[dict[str, Any]], tmp_path: Path, rule: str) -> None:
    drawn_by_chance = rule in ("sampled_top_k", "window")
    pools = [make_pool(tmp_path, pairs, seed=seed) for seed in range(25 if drawn_by_chance else 1)]
    results, differ = [rows_by_query(pool, mine_pool(pool, rule=rule)) for pool in pools], 0
    for pair in pairs:
        query, positive = pair["query"], pair["pos"][0]
        expected = find_allowed(query, positive, pools[0].documents, rule)
        found = [result[query]["neg"] for result in results]
        if drawn_by_chance:
            assert all(sorted(drawn, key=expected.index) == drawn and len(set(drawn)) == 4 for drawn in found)
            assert len({text for drawn in found for text in drawn} & set(expected)) >= min(len(expected), 30)
        else:
            assert found == [expected[:4]]
            differ += found[0] != find_allowed(query, positive, pools[0].documents, "top_k")[:4]
        row = results[0][query]
        np.testing.assert_allclose(row["pos_scores"], draw_vectors([positive]) @ draw_vector(query), atol=2e-6)
        np.testing.assert_allclose(
            row["neg_scores"], [draw_vector(text) @ draw_vector(query) for text in row["neg"]], atol=2e-6
        )
    assert (differ > 10) == rule.startswith("topk")


class StubModel:
    """The part of a model that sentence-transformers' miner uses."""

    device = torch.device("cpu")

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return draw_vectors(texts)

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
def test_rules_match_sentence_transformers(
    pairs: list[dict[str, Any]], tmp_path: Path, rule: str, options: dict[str, float]
) -> None:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    corpus = [f"document {i}" for i in range(80)]
    columns = {"query": [row["query"] for row in pairs], "pos": [row["pos"][0] for row in pairs]}
    theirs = mine_hard_negatives(
        Dataset.from_dict(columns), StubModel(), corpus=corpus, num_negatives=4, range_max=140, output_format="labeled-list",
        output_scores=True, verbose=False, **options,
    )  # fmt: skip
    pool = make_pool(tmp_path, pairs, [*corpus, *columns["pos"]])
    ours = rows_by_query(pool, mine_pool(pool, rule=rule, depth=140))
    assert 40 < len(theirs) == sum(bool(row["neg"]) for row in ours.values())
    for query, (positive, *negatives), scores in zip(*theirs.to_dict().values(), strict=True):
        row = ours[query]
        assert (row["pos"], row["neg"]) == ([positive], negatives)
        np.testing.assert_allclose([*row["pos_scores"], *row["neg_scores"]], scores, atol=2e-6)


def test_sampled_negatives_do_not_depend_on_row_order(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    """The sample of a row depends on its own texts only."""
    rows = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    first, second = (make_pool(tmp_path, some, [f"document {i}" for i in range(90)]) for some in (pairs, rows))
    assert rows_by_query(first, mine_pool(first, rule="window")) == rows_by_query(second, mine_pool(second, rule="window"))


def test_positives_never_become_negatives(tmp_path: Path) -> None:
    """Positives of other rows with the same query count too, as do other white space and the query itself."""
    rows = [
        {"query": "q 1", "pos": ["a 1", "b 1"], "prompt": "Find it"},
        {"query": " q 1", "pos": ["c 1"], "neg": ["b 1 ", "d 2"]},
        {"query": "q 2", "pos": ["d 2"], "neg": ["a 1"]},
    ]
    pool = make_pool(tmp_path, rows, ["a 1\n", " b 1", "b 1", "c 1", "q 1 ", "d 2", "q 2", "", " ", "e"])
    assert (pool.corpus_size, len(pool.documents), len(pool.queries)) == (7, 7, 3)
    result = mine_pool(pool)
    written = [to_output_row(pool, row) for row in result.rows]
    assert [row["pos"] for row in written] == [["a 1\n", " b 1"], ["c 1"], ["d 2"]]
    assert [row.get("prompt") for row in written] == ["Find it", None, None]
    assert [set(row["neg"]) for row in written] == [{"d 2", "q 2", "e"}] * 2 + [{"a 1\n", " b 1", "c 1", "q 1 ", "e"} - {min(
        ["a 1\n", " b 1", "c 1", "q 1 ", "e"], key=lambda text: draw_vector("q 2") @ draw_vector(text))}]  # fmt: skip
    counts = count_outcomes(pool, result, MineConfig(**RULE))
    expected = {"rows": 3, "written": 3, "dropped": {"inconsistent": 0}, "corpus": 7, "blank_documents": 2}
    expected |= {"negatives": 10, "short_rows": 2, "missing_negatives": 2, "rows_without_negatives": 0, "queries": 3}
    assert counts.items() >= expected.items()
    kept = [to_output_row(pool, row) for row in mine_pool(pool, keep_negatives=True).rows]
    assert kept[1]["neg"][0] == "d 2" and kept[2]["neg"][0] == "a 1\n"
    for row in kept:
        assert len(set(row["neg"])) == len(row["neg"]) == len(row["neg_scores"])
        np.testing.assert_allclose(
            row["neg_scores"], [draw_vector(row["query"]) @ draw_vector(text) for text in row["neg"]], atol=2e-6
        )
    assert len(kept[2]["neg"]) == 5  # Its own one, and as many new ones as requested.


def test_consistency_filter_removes_positives_the_model_does_not_find(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**pair, "pos": [*pair["pos"], f"another {i}"]} for i, pair in enumerate(pairs)]
    pool = make_pool(tmp_path, rows)
    expected = {}
    for row in rows:
        others = [text for text in pool.documents if text not in row["pos"]]
        ranks = [
            sum(draw_vector(row["query"]) @ draw_vector(o) > draw_vector(row["query"]) @ draw_vector(p) for o in others)
            for p in row["pos"]
        ]
        if passed := [text for text, rank in zip(row["pos"], ranks, strict=True) if rank < 3]:
            expected[row["query"]] = passed
    result = mine_pool(pool, rule="topk_margin_pos", consistency_top_k=3)
    assert {query: row["pos"] for query, row in rows_by_query(pool, result).items()} == expected
    assert 10 < len(expected) == len(rows) - len(result.inconsistent_rows) < 50
    assert 0 < sum(len(positives) == 1 for positives in expected.values()) < len(expected)
    for query, row in rows_by_query(pool, result).items():  # A removed positive is still not a negative.
        assert not set(row["neg"]) & {f"answer {query.split()[1]}", f"another {query.split()[1]}"}
    assert count_outcomes(pool, result, MineConfig())["dropped"] == {"inconsistent": len(rows) - len(expected)}
    few = {"positives": sum(map(len, expected.values())), "inconsistent_positives": 120 - sum(map(len, expected.values()))}
    assert count_outcomes(pool, result, MineConfig()).items() >= few.items()
    report = collect_scores_and_samples(pool, result)
    assert len(report["samples"]["kept"]) == len(report["samples"]["inconsistent"]) == 5
    assert sum(report["scores"]["positive"]) == sum(map(len, expected.values()))
    everything = mine_pool(pool, rule="topk_margin_pos", consistency_top_k=3, rankers=("bm25",))
    assert [row.row.positives for row in everything.rows] == [row.row.positives for row in result.rows]
    far = make_pool(
        tmp_path,
        [{"query": "query 1", "pos": [min(pool.documents, key=lambda text: draw_vector("query 1") @ draw_vector(text))]}],
    )
    far = dataclasses.replace(far, documents=[*far.documents, *pool.documents], corpus_size=1 + len(pool.documents))
    nothing = mine_pool(far, consistency_top_k=2)
    assert (nothing.rows, nothing.row_numbers, len(nothing.inconsistent_rows)) == ([], [], 1)
    with pytest.raises(UserError, match=r"^KEY: no positive is among the 2 nearest documents of its query\. Raise it\.$"):
        check_rows_left(nothing, MineConfig(consistency_top_k=2), "KEY")


def test_approximate_search_reports_its_recall(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    pool = make_pool(tmp_path, pairs)
    result = mine_pool(pool, approximate=True)
    assert 0.9 < count_outcomes(pool, result, MineConfig())["recall"] <= 1
    assert mine_pool(pool).recall is None


def test_bm25_candidates_keep_their_order_and_get_scores_of_the_model(tmp_path: Path) -> None:
    texts = ["red apple tree", "red apple", "green apple pie", "blue sky", "grey stone wall"]
    pool = make_pool(tmp_path, [{"query": "red apple tree house", "pos": ["a house with a red apple tree"]}], texts)
    row = rows_by_query(pool, mine_pool(pool, rankers=("bm25",), negatives=2))["red apple tree house"]
    assert row["neg"] == ["red apple tree", "red apple"]
    all_found = rows_by_query(pool, mine_pool(pool, rankers=("bm25",), negatives=5))["red apple tree house"]["neg"]
    assert all_found == [*row["neg"], "green apple pie"], "documents without a term of the query are no candidates"
    np.testing.assert_allclose(
        row["neg_scores"], [draw_vector(row["query"]) @ draw_vector(text) for text in row["neg"]], atol=2e-6
    )


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross")
    body = tiny.write_bert_folder(folder)
    BertForSequenceClassification.from_pretrained(body, num_labels=1).save_pretrained(folder / "scorer")
    for file in body.glob("*token*"):
        shutil.copy(file, folder / "scorer")
    assert CrossEncoder(str(folder / "scorer"), device="cpu").num_labels == 1
    return folder / "scorer"


def test_cross_encoder_replaces_scores_and_order(
    cross_encoder: Path,
    pairs: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sentence_transformers import CrossEncoder

    score = open_cross_encoder(str(cross_encoder), tmp_path)
    pool = make_pool(tmp_path, pairs[:4])
    found = rows_by_query(pool, mine_pool(pool, mining.make_id_scorer(score, pool), depth=8))
    reference = CrossEncoder(str(cross_encoder), device="cpu")
    for row in found.values():
        nearest = find_allowed(row["query"], row["pos"][0], pool.documents, "top_k")[:8]
        scores = dict(zip(nearest, reference.predict([(row["query"], text) for text in nearest]), strict=True))
        assert row["neg"] == sorted(nearest, key=lambda text: -scores[text])[:4] != nearest[:4]
        np.testing.assert_allclose(row["neg_scores"], [scores[text] for text in row["neg"]], atol=2e-6)
        np.testing.assert_allclose(row["pos_scores"], reference.predict([(row["query"], row["pos"][0])]), atol=2e-6)
    monkeypatch.setattr(CrossEncoder, "predict", None)  # Scores are cached.
    again = mine_pool(pool, mining.make_id_scorer(open_cross_encoder(str(cross_encoder), tmp_path), pool), depth=8)
    assert rows_by_query(pool, again) == found
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
    with pytest.raises(UserError, match=r"model: has no classifier\.weight, classifier\.bias, so its scores would be random"):
        open_cross_encoder(str(cross_encoder.with_name("model")), tmp_path)
    assert "classifier" not in caplog.text  # The message of transformers itself.


def test_very_long_texts_are_truncated_and_counted(tmp_path: Path) -> None:
    giant = "word " * 50_000
    pool, seen = make_pool(tmp_path, [{"query": "a", "pos": [giant, "b"]}]), []

    def encode(texts: Sequence[Any]) -> np.ndarray:
        seen.extend(texts)
        return draw_vectors([text.text for text in texts])

    documents = mining.embed_texts([pool.queries[0]._replace(text=text) for text in pool.documents], encode, 6, "documents")
    assert [len(text.text) for text in seen] == [mining.MAX_MINED_TEXT_CHARS, 1] and len(documents) == 2
    result = mine_negatives(pool, draw_vectors(["a"]), documents, MiningOptions(MineConfig()))
    assert count_outcomes(pool, result, MineConfig())["cut_texts"] == 1
    assert to_output_row(pool, result.rows[0])["pos"] == [giant, "b"]


def test_bad_corpora_and_sources_raise_user_errors(tmp_path: Path) -> None:
    def catch_error(function: Callable[..., Any], *args: Any) -> str:
        with pytest.raises(UserError) as error:
            function(*args)
        return str(error.value)

    def corpus(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    pairs = [{"query": "a", "pos": ["b"]}]
    labels = write_jsonl(tmp_path / "labels.jsonl", [{"text": "a", "label": "b"}])
    assert "negatives of rows with text and label come from other labels" in catch_error(open_file, labels, tmp_path)
    assert "corpus: contains no text" in catch_error(make_pool, tmp_path, pairs, [" ", ""])
    assert "nowhere: no such file or folder" in catch_error(list, read_corpus([str(tmp_path / "nowhere")], tmp_path))
    assert '"text" is missing' in catch_error(list, read_corpus([corpus("bad.jsonl", '{"id": 1}\n')], tmp_path))
    write_beir(tmp_path / "beir", {"1": "one", "2": "two"}, {"q": "?"}, {"q": {"1": 1}})
    lines = [corpus("lines.txt", "three\nfour"), corpus("rows.jsonl", '{"title": "five", "text": "six"}\n')]
    assert list(read_corpus([str(tmp_path / "beir"), *lines], tmp_path)) == ["one", "two", "three", "four", "five six"]
    assert list(read_corpus([corpus("other.jsonl", '{"body": "seven"}\n')], tmp_path, "body")) == ["seven"]
    with (tmp_path / "beir" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "1", "text": "again"}\n')
    assert "corpus.jsonl:3: duplicate _id '1' (first in" in catch_error(list, read_corpus([str(tmp_path / "beir")], tmp_path))
