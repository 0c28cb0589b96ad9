"""Steps of a curation that need a model: semantic duplicates, mining, clusters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.commands import ENV, start_module
from helpers.curation import pair, queries_left, run_all_rows_step
from helpers.mining import KILL_WHILE_ENCODING, StubEncoder, draw_vectors, make_pool, mine_pool, rows_by_query
from jaxembed import curate as curate_command
from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.config.curation_models import MineStepConfig
from jaxembed.curation.steps.curated_row import CuratedRow, StepOutcome
from jaxembed.curation.steps.semantic_duplicates import INITIAL_NEIGHBORS, find_similar
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.hub.embedder import Embedder
from jaxembed.search.fusion import fuse_rankings


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> StubEncoder:
    stub = StubEncoder()
    monkeypatch.setattr("jaxembed.curation.model_steps.open_frozen_encoder", lambda name, cache: stub)
    return stub


def write_curation(folder: Path, steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], **keys: Any) -> Path:
    """Write rows and the config of their curation. Return the config."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "rows.jsonl", rows)
    tree = {"out": str(folder / "out"), "sources": [{"path": str(folder / "rows.jsonl")}], "steps": list(steps), **keys}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def run_curate(
    folder: Path, steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], **keys: Any
) -> list[dict[str, Any]]:
    """Curate rows by the command's function. Return the rows that are written."""
    config = write_curation(folder, steps, rows, **keys)
    curate_command.main(curate_command.make_parser().parse_args([str(config)]))
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]


# duplicates, semantic


def draw_clustered_vectors(sizes: Sequence[int]) -> np.ndarray:
    """Return unit vectors in tight clusters of some sizes, in random order."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(len(sizes), 8))
    vectors = np.repeat(centers, sizes, axis=0) + 0.05 * rng.normal(size=(sum(sizes), 8))
    vectors = rng.permutation(vectors)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.995])
def test_similar_vectors_are_those_of_a_comparison_of_all_pairs(threshold: float) -> None:
    """A cluster larger than the first search is found whole. No two kept ones are similar; each dropped one has a kept one."""
    vectors = draw_clustered_vectors([1, 2, 5, 3 * INITIAL_NEIGHBORS])
    found = find_similar(vectors, threshold, 16)
    similarities = vectors @ vectors.T
    expected: list[bool] = []
    for i in range(len(vectors)):
        expected.append(any(similarities[i, j] >= threshold and not expected[j] for j in range(i)))
    assert found.tolist() == expected and 0 < sum(expected) < len(expected)


def test_semantic_duplicates_are_dropped_by_rule(encoder: StubEncoder, tmp_path: Path) -> None:
    config = DuplicatesStepConfig(match="semantic", model="M", of="queries", threshold=0.7, keep=("source_priority",))
    texts = ["a 1", "b 2", "c 3", "d 1", "e 2", "f 3", "A  1"]
    rows = [pair(text, "p", source=int(i < 3)) for i, text in enumerate(texts)]
    similarities = np.triu(draw_vectors(texts[:6]) @ draw_vectors(texts[:6]).T, 1)
    similar = [(texts[i], texts[j]) for i, j in np.argwhere(similarities >= 0.7).tolist()]
    left = queries_left(run_all_rows_step(config, tmp_path / "a", rows))
    assert similar and len(set(left) & {"a 1", "A  1"}) <= 1
    assert all(not {first, second} <= set(left) for first, second in similar)
    assert {text.side for text in encoder.inputs} == {"query"}
    apart = queries_left(run_all_rows_step(config.replace(across_sources=False), tmp_path / "b", rows))
    assert set(texts[:3]) <= set(apart) and len(apart) >= len(left)


def test_semantic_duplicates_do_not_depend_on_the_order_of_rows(encoder: StubEncoder, tmp_path: Path) -> None:
    rng, results = np.random.default_rng(0), set()
    rows = [pair(f"text {chr(97 + i % 26)} {i % 9}", f"p{i}") for i in range(40)]
    config = DuplicatesStepConfig(match="semantic", model="M", of="queries", threshold=0.6)
    for trial in range(3):
        outcomes = run_all_rows_step(config, tmp_path / str(trial), [rows[i] for i in rng.permutation(len(rows))])
        results.add(tuple(sorted(queries_left(outcomes))))
    assert len(results) == 1 and 0 < len(results.pop()) < 40


def test_a_real_model_finds_equal_meanings_through_the_command(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    rows = [{"query": query, "pos": ["p"]} for query in ("the same text", "The same  text", "another one")]
    step = {"name": "duplicates", "match": "semantic", "of": "queries", "model": str(base_folder("qwen3")), "threshold": 1}
    assert len(run_curate(tmp_path, [step], rows)) == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"][0]["reasons"]["dropped"] == {"semantic copy of another of the queries": 1}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"match": "semantic"}, r"match is 'semantic': it compares vectors of a model. Set model"),
        ({"match": "near", "model": "M"}, r"match is 'near': only semantic reads model. Remove it"),
        ({"match": "semantic", "model": "no-such-folder"}, r"no-such-folder: neither a folder with a config.json"),
    ],
)
def test_bad_models_are_refused_before_anything_is_read(tmp_path: Path, step: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_curate(tmp_path, [{"name": "duplicates", **step}], [{"query": "q", "pos": ["p"]}])
    assert not (tmp_path / "out").exists()


# mine

NUMBERED = [{"query": f"query {i}", "pos": [f"answer {i}"], "neg": [f"old {i}"]} for i in range(30)]


def score_numbers(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Score a document 1 if it has the number of the query, else less, the more its number differs."""
    return np.array([1 - abs(int(a.split()[-1]) - int(b.split()[-1])) / 100 for a, b in pairs], np.float32)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxembed.curation.model_steps.open_judge", lambda config, context: score_numbers)
    monkeypatch.setattr("jaxembed.curation.model_steps.find_folder", lambda name: Path(name))


def test_mined_negatives_are_those_of_the_mine_command(
    encoder: StubEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step and the command share the miner. A scored pair and rows of another source stay as they are."""
    monkeypatch.setattr("jaxembed.curation.model_steps.check_model_exists", lambda name: None)
    step = {"name": "mine", "model": "M", "rule": "sampled_top_k", "depth": 20, "negatives": 3, "consistency_top_k": 4}
    rows = run_curate(tmp_path, [step], NUMBERED, seed=5)
    pool = make_pool(tmp_path, NUMBERED, seed=5)
    options = {"rule": "sampled_top_k", "depth": 20, "negatives": 3, "consistency_top_k": 4}
    result = mine_pool(pool, keep_negatives=True, **options)
    assert rows == list(rows_by_query(pool, result).values()) and len(rows) < 30
    report = json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["reasons"]
    assert report["dropped"] == {"positives: not among the 4 nearest documents": 30 - len(rows)}
    assert report["changed"] == {"negatives: mined": len(rows)}


def test_positives_are_replaced_by_better_documents(encoder: StubEncoder, judge: None, tmp_path: Path) -> None:
    """A shuffled positive is replaced, a right one stays, and neither becomes a negative."""
    rows = [pair(f"query {i}", f"answer {i if i % 10 else (i + 9) % 30}") for i in range(30)] + [pair("query 5", "answer 5")]
    step = MineStepConfig(
        model="M", judge={"model": "J"}, relabel=True, relabel_margin=0.02, negatives=2, rule="top_k", depth=29
    )
    outcomes = run_all_rows_step(step, tmp_path, rows)
    found = [outcome.row["pos"] for outcome in outcomes if outcome.row]
    right = [f"answer {i}" if i % 10 else found[i][0] for i in range(30)]
    assert [texts[0] for texts in found[:30]] == right
    for i in (0, 10, 20):  # no row has the answer itself, so the nearest number is best
        assert abs(int(found[i][0].split()[-1]) - i) == 1
        assert outcomes[i].reasons == ("positives: replaced by a better document", "negatives: mined")
        assert not {found[i][0], f"answer {(i + 9) % 30}"} & set(outcomes[i].row["neg"])
    assert outcomes[1].reasons == ("negatives: mined",) and outcomes[1].row["pos_scores"] == [1.0]


def test_mined_rows_are_kept_when_a_later_step_fails(
    encoder: StubEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second command does not mine again, and its output equals that of a command without a failure."""
    monkeypatch.setattr("jaxembed.curation.model_steps.check_model_exists", lambda name: None)
    mine = {"name": "mine", "model": "M", "rule": "top_k", "depth": 9, "negatives": 2}
    fail = {"name": "balance", "by": "topic", "max_rows": 5}
    with pytest.raises(UserError, match="no row has this field"):
        run_curate(tmp_path, [mine, fail], NUMBERED)
    num_encoded = len(encoder.inputs)
    written = run_curate(tmp_path, [mine, {**fail, "by": "source"}], NUMBERED)
    assert len(written) == 5 and len(encoder.inputs) == num_encoded > 0
    assert written == run_curate(tmp_path / "whole", [mine, {**fail, "by": "source"}], NUMBERED)


def test_a_kill_while_mining_loses_no_vectors_and_the_bytes_are_the_same(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"query": f"q {i}", "pos": [f"answer {i}"]} for i in range(20)]
    step = {"name": "mine", "model": str(base_folder("qwen3")), "rule": "top_k", "depth": 9, "negatives": 2}
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "whole-cache"))
    run_curate(tmp_path / "whole", [step], rows)
    config = write_curation(tmp_path / "killed", [step], rows)
    environment = {**ENV, "JAXEMBED_CACHE": str(tmp_path / "cache")}
    killed = start_module("jaxembed.curate", str(config), env=environment, setup_code=KILL_WHILE_ENCODING)
    _, error = killed.communicate()
    assert killed.returncode == -9, error
    (vectors,) = (tmp_path / "cache").rglob("vectors/*/vectors-v2")
    assert vectors.stat().st_size == 28 * 4 * 32  # three parts of the queries, one of the documents
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    encode, texts = Embedder.encode, list[str]()
    monkeypatch.setattr(Embedder, "encode", lambda self, new, **options: texts.extend(new) or encode(self, new, **options))
    run_curate(tmp_path / "killed", [step], rows)
    assert texts == [f"answer {i}" for i in range(8, 20)]
    for name in ("rows.jsonl", "report.html"):
        written, expected = ((tmp_path / folder / "out" / name).read_text() for folder in ("killed", "whole"))
        assert written.replace("/killed/", "/whole/") == expected


def test_rankings_are_fused(encoder: StubEncoder, judge: None, tmp_path: Path) -> None:
    """BM25 ranks texts by words, the vectors and the judge by number. A document that all rank high comes first."""
    rows = [pair(f"red stone {i}", f"blue water {i}") for i in range(1, 20)] + [
        pair("x 50", "red stone 60"),
        pair("y 51", "z 1"),
    ]
    tops = {}
    for name, rankers in {"bm25": ["bm25"], "fused": ["vectors", "bm25"], "all": ["vectors", "bm25", "judge"]}.items():
        keys = {"judge": {"model": "J"}} if name == "all" else {}
        step = MineStepConfig(model="M", rankers=rankers, negatives=2, rule="top_k", depth=19, **keys)
        outcomes = run_all_rows_step(step, tmp_path / name, rows)
        tops[name] = outcomes[0].row["neg"]
    assert tops["bm25"][0] == "red stone 60"
    assert all("z 1" in texts or "red stone 60" in texts for texts in tops.values())
    assert "z 1" in tops["all"]


def test_ranks_are_fused_by_their_reciprocals() -> None:
    fused = fuse_rankings([np.array([3, 1, 2]), np.array([1, 4])])
    points = {3: 1 / 61, 1: 1 / 62 + 1 / 61, 2: 1 / 63, 4: 1 / 62}
    assert fused.tolist() == sorted(points, key=lambda document: -points[document])
    assert fuse_rankings([np.array([5, 6]), np.array([6, 5])]).tolist() == [5, 6]  # equal sums


def test_rows_of_other_formats_and_sources_are_not_mined(encoder: StubEncoder, tmp_path: Path) -> None:
    rows = [CuratedRow(0, i, "text", {"text": f"t {i}"}) for i in range(3)]
    step = MineStepConfig(model="M", negatives=1, rule="top_k", depth=9)
    assert run_all_rows_step(step, tmp_path, rows) == [StepOutcome(row.fields) for row in rows] and not encoder.inputs
    named = step.replace(sources=("other",))
    assert [o.reasons for o in run_all_rows_step(named, tmp_path / "b", [pair("q 1", "a 1"), pair("q 2", "a 2")])] == [(), ()]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rankers": ["vectors", "judge"]}, "rankers needs the scores of a judge. Set judge"),
        ({"rankers": ["judge"]}, "a judge only reorders candidates. Add vectors or bm25 to rankers"),
        ({"rankers": ["vector"]}, r"rankers.0 is 'vector'"),
        ({"judge": {"kind": "cross"}}, r"judge"),
        ({"model": "no-such-folder"}, "no-such-folder: neither a folder"),
        ({"rule": "window", "window": [5, 9], "negatives": 9}, "window is 5 to 9, fewer ranks than the 9 negatives"),
    ],
)
def test_bad_mining_keys_are_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_curate(tmp_path, [{"name": "mine", "model": "M", **keys}], NUMBERED[:2])


def test_a_window_after_the_last_candidate_is_refused(encoder: StubEncoder, tmp_path: Path) -> None:
    step = MineStepConfig(model="M", rule="window", window=(500, 600))
    with pytest.raises(
        UserError, match=r"negatives start at rank 500, but a query has at most .* Name more documents with corpus"
    ):
        run_all_rows_step(step, tmp_path, [pair("q 1", "a 1"), pair("q 2", "a 2")])


# cluster


def test_rows_of_a_cluster_are_balanced(encoder: StubEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that share a number are near each other. The field of the cluster is written, and rows are grouped by it."""
    monkeypatch.setattr("jaxembed.curation.model_steps.check_model_exists", lambda name: None)
    rows = [{"query": f"text {chr(97 + i)} {8 * (i % 2)}", "pos": ["p"]} for i in range(20)]
    cluster = {"name": "cluster", "model": "M", "clusters": 2}
    written = run_curate(tmp_path, [cluster, {"name": "balance", "by": "cluster", "rows": 6, "exponent": 0}], rows)
    assert Counter(row["cluster"] for row in written) == {0: 3, 1: 3}
    with pytest.raises(UserError, match=r"cluster: clusters is 30, but only 20 rows are left. Lower it"):
        run_curate(tmp_path / "x", [{**cluster, "clusters": 30}], rows)
