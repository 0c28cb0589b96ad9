"""Scored pairs that keep their scores: ranges, scores of labels, examples and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.sources import SCORED_ROWS, draw_examples, open_source_file, write_jsonl
from helpers.training_batches import SPEC
from jaxembed.config import Config, SourceConfig
from jaxembed.config.sections import parse_section
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.convert import convert_sources
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.devices.mesh import make_all_shards
from jaxembed.errors import UserError

NLI_LABELS = ["entailment", "neutral", "contradiction"]


def write_scores(folder: Path, scores: list[Any]) -> Path:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": score} for i, score in enumerate(scores)]
    return write_jsonl(folder / "sts.jsonl", rows)


def read_scores(source: Source) -> list[float]:
    return [source.draw(i, np.random.default_rng(0), 0).score for i in range(len(source))]


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([0, 0.25, 1], {}, [0, 0.25, 1]),
        ([-1, 0, 0.5], {}, [-1, 0, 0.5]),
        ([0, 2.5, 5], {}, [0, 0.5, 1]),
        ([0, 1], {"score_range": [0, 5]}, [0, 0.2]),
        ([1, 3], {"score_range": [1, 5]}, [0, 0.5]),
        ([-2, 0, 3], {"score_range": [-5, 5]}, [-0.4, 0, 0.6]),
    ],
)
def test_scores_are_mapped_to_the_scale_of_cosines(tmp_path: Path, scores: Any, options: Any, expected: Any) -> None:
    source = open_source_file(write_scores(tmp_path, scores), graded=True, **options)
    assert read_scores(source) == pytest.approx(expected)


def test_all_pairs_are_drawn_and_some_are_positives(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    source = open_source_file(path, graded=True, min_score=3)
    assert len(source) == 6 and source.sampler.positive_count == 3 and not source.is_mineable
    assert {(e.query, e.positive) for e in draw_examples(source, 0, 2)} == {("a0", "b0"), ("b0", "a0")}
    low, high = (source.draw(i, np.random.default_rng(0), 2) for i in (2, 3))
    assert (low.is_positive, low.positives, low.score) == (False, (), 0.4)
    assert (high.is_positive, high.positives, high.score) == (True, (high.positive,), 0.6)
    assert [row["query"] for row in source.iter_pairs()] == [f"{side}{i}" for i in range(6) for side in "ab"]
    plain = open_source_file(path, min_score=3)
    assert all(np.isnan(e.score) and e.is_positive for e in draw_examples(plain, 0, 2))


def test_only_positives_are_converted_to_pairs(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), tmp_path / "pairs.jsonl"
    sources = make_config([{"name": "cosent"}], {"path": str(path)}).stages[0].data
    assert convert_sources(sources, tmp_path, [[out]], as_pairs=True) == 4
    assert [json.loads(line)["query"] for line in out.read_text().splitlines()] == ["a4", "b4", "a5", "b5"]


def test_in_context_examples_are_positives(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS)
    options = {"few_shot": {"most": 4, "zero_shot": 0}, "instructions": ["Find it"], "min_score": 4}
    shown = {e.query for x in draw_examples(open_source_file(path, graded=True, **options), 0, 0) for e in x.few_shot}
    assert shown == {"a4", "b4", "a5", "b5"}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([0, 60, 100], {"graded": True}, "sts.jsonl: the scores go from 0 to 100 (expected 0 to 1, -1 to 1, or 0 to 5). Set"),
        ([-2, 3], {"graded": True}, "sts.jsonl: the scores go from -2 to 3 (expected"),
        ([1, 6], {"score_range": [0, 5]}, 'sts.jsonl:2: "score" is 6 (expected 0 to 5, the source\'s score_range)'),
        ([1, 2, -0.5], {"score_range": [0, 5], "graded": True}, 'sts.jsonl:3: "score" is -0.5 (expected 0 to 5'),
        (["yes", 0.5], {"label_scores": {"yes": 1}}, 'sts.jsonl:2: "score" is 0.5 (expected a non-empty string or an integer)'),
        (["no", "No"], {"label_scores": {"yes": 1}}, "no row can be used (labels without a score in label_scores: 2)"),
    ],
)
def test_scores_outside_of_the_range_are_refused(tmp_path: Path, scores: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_source_file(write_scores(tmp_path, scores), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"score_range": [5, 0]}, "score_range is [5, 0] (expected the lowest score, then the highest). Swap them."),
        ({"score_range": [0, 5, 9]}, "score_range"),
        ({"score_range": [0, 1], "label_scores": {"a": 2}}, "label_scores: a is 2 (expected 0 to 1, the score_range)"),
        ({"label_scores": {"a": "b"}}, "label_scores.a is 'b' (expected a number)"),
    ],
)
def test_keys_of_scores_are_checked(keys: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_section(SourceConfig, {"path": "a", **keys}, "here")
    assert message in str(error.value)


@pytest.mark.parametrize("named", [True, False])
def test_labels_have_scores(tmp_path: Path, named: bool) -> None:
    """As UAE reads NLI: entailment 1, contradiction 0, neutral left out. Labels may be names, numbers, or absent."""
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": NLI_LABELS[i % 3] if named else i % 3} for i in range(6)]
    rows += [{"premise": "p", "hypothesis": "h", "label": "-" if named else -1}, {"premise": "p", "hypothesis": "h"}]
    columns = {"sentence1": "premise", "sentence2": "hypothesis", "score": "label"}
    scores = {"entailment": 1, "contradiction": 0} if named else {0: 1, 2: 0}
    options = {"columns": columns, "label_scores": scores, "min_score": 1, "max_chars": 2}
    source = open_source_file(write_jsonl(tmp_path / "nli.jsonl", rows), graded=True, **options)
    assert (source.format, read_scores(source)) == ("scored_pairs", [1, 0, 1, 0])
    assert source.sampler.drop_counts == {"labels without a score in label_scores": 4}
    assert source.sampler.positive_count == 2


def make_config(objectives: list[dict[str, Any]], *sources: dict[str, Any], **sections: Any) -> Config:
    tree = {"model": {"base": "preset:tiny"}, "data": {"sources": sources}, "objectives": objectives, **sections}
    return parse_section(Config, tree, "here")


def test_sources_of_graded_objectives_are_graded() -> None:
    scored = {"path": "a.jsonl", "format": "scored_pairs"}
    sources = (scored, {**scored, "path": "b.jsonl"}, {"path": "c.jsonl"}, {"path": "d.jsonl", "format": "pairs"})

    def list_graded(config: Config) -> list[bool | None]:
        return [source.graded for source in config.stages[0].data.sources]

    assert list_graded(make_config([{"name": "infonce"}], *sources)) == [None] * 4
    graded = make_config([{"name": "infonce"}, {"name": "cosent"}], *sources)
    assert list_graded(graded) == [True, True, True, None]
    assert list_graded(make_config([{"name": "angle", "sources": ["b"]}], *sources)) == [None, True, None, None]
    assert list_graded(make_config([{"name": "angle"}], {**scored, "graded": False})) == [False]
    one_step = {"train": {"steps": 1}}
    stages = [one_step, {**one_step, "objectives": [{"name": "infonce"}]}]
    staged = make_config([{"name": "cosent"}], *sources, stages=stages)
    assert [stage.data.sources[0].graded for stage in staged.stages] == [True, None]


def test_a_plan_of_an_earlier_version_keeps_its_hash(tmp_path: Path) -> None:
    plain = open_source_file(write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), min_score=0)
    assert BatchPlan([plain], 2, seed=0).hash == "20344da2d8d75302"
    graded = open_source_file(tmp_path / "a.jsonl", min_score=0, graded=True)
    assert BatchPlan([graded], 2, seed=0).hash != BatchPlan([plain], 2, seed=0).hash


def test_a_batch_has_scores_and_marks_positive_pairs(tmp_path: Path) -> None:
    scored = open_source_file(write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), graded=True)
    pairs = open_source_file(write_jsonl(tmp_path / "b.jsonl", [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(6)]))
    tokenizer = tiny.build_tokenizer()
    append_eos(tokenizer)
    sampler = BatchSampler(sources=[scored, pairs], tokenizer=TextTokenizer(tokenizer, SPEC), hard_negatives=0, seed=0)
    batch = BatchBuilder(sampler=sampler, row_length=32, shards=make_all_shards(1))(0, np.arange(12)).batch
    np.testing.assert_allclose(batch.score, [0, 0.2, 0.4, 0.6, 0.8, 1, *[np.nan] * 6], rtol=1e-6)
    assert batch.is_positive.tolist() == [False] * 4 + [True] * 8
    assert batch.score.dtype == np.float32
