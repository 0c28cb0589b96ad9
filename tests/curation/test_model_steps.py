"""Steps of a curation that need a model: semantic duplicates, mining, clusters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.curation import pair, queries_left, run_all_rows_step
from helpers.mining import draw_vectors
from jaxembed import curate as curate_command
from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.curation.steps.semantic_copies import FIRST_NEIGHBORS, find_similar
from jaxembed.data.batch import EncoderInput
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError


class StubEncoder:
    """Texts that share a number have similar vectors (`draw_vectors`)."""

    width = 6

    def __init__(self) -> None:
        self.inputs: list[EncoderInput] = []

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        self.inputs += texts
        return draw_vectors([text.text for text in texts])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> StubEncoder:
    stub = StubEncoder()
    monkeypatch.setattr("jaxembed.curation.model_steps.open_frozen_encoder", lambda name, cache: stub)
    return stub


def run_curate(
    folder: Path, steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], **keys: Any
) -> list[dict[str, Any]]:
    """Curate rows by the command's function. Return the rows that are written."""
    write_jsonl(folder / "rows.jsonl", rows)
    tree = {"out": str(folder / "out"), "sources": [{"path": str(folder / "rows.jsonl")}], "steps": list(steps), **keys}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    curate_command.main(curate_command.make_parser().parse_args([str(folder / "config.yaml")]))
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
    vectors = draw_clustered_vectors([1, 2, 5, 3 * FIRST_NEIGHBORS])
    found = find_similar(vectors, threshold, 16)
    similarities = vectors @ vectors.T
    expected: list[bool] = []
    for i in range(len(vectors)):
        expected.append(any(similarities[i, j] >= threshold and not expected[j] for j in range(i)))
    assert found.tolist() == expected and 0 < sum(expected) < len(expected)


def test_semantic_copies_are_dropped_by_rule(encoder: StubEncoder, tmp_path: Path) -> None:
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


def test_semantic_copies_do_not_depend_on_the_order_of_rows(encoder: StubEncoder, tmp_path: Path) -> None:
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
