"""The data plan, the batches it leads to, and resuming it."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers import tiny
from jaxembed.config import BatchingConfig, MixtureConfig, PythonPackagesConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import Batch, BatchBuilder, HostBatch
from jaxembed.data.batch_plan import BatchPlan, ExampleIndex
from jaxembed.data.pipeline import batches
from jaxembed.data.schema import Example, text_hash
from jaxembed.data.shuffle import key_of, permuted
from jaxembed.data.sources import Source, open_source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError

SPEC = EmbeddingSpec(max_length=24, instruction_template="I: {instruction} Q: ")


def source(folder: Path, file: str, rows: Sequence[Any], **options: Any) -> Source:
    path = folder / file
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(path=str(path), **options), PythonPackagesConfig(), folder)


def pairs(count: int, name: str = "p") -> list[dict[str, Any]]:
    """Rows with one or two positives, and none to three negatives."""
    return [
        {
            "query": f"{name} query {i} " + "word " * (i % 7),
            "pos": [f"{name} positive {i} {j}" for j in range(1 + i % 2)],
            "neg": [f"{name} negative {i} {j} " + "long " * j for j in range(i % 4)],
        }
        for i in range(count)
    ]


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    labels = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(10)]
    return [
        source(tmp_path, "pairs", pairs(30), weight=3.0, instructions=["find", "seek"]),
        source(tmp_path, "labels", labels, instructions=["sort"], document_instruction="name"),
    ]


def builder(
    sources: Sequence[Source], shards: int = 1, seed: int = 0, negatives: int = 2, distinct: bool = False
) -> BatchBuilder:
    tokenizer = tiny.tokenizer(bos=True)
    append_eos(tokenizer)
    made = TextTokenizer(tokenizer, SPEC.max_length)
    return BatchBuilder(
        sources, made, SPEC, row_length=48, hard_negatives=negatives, seed=seed, shards=shards, distinct=distinct
    )


def equal(a: HostBatch, b: HostBatch) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), a.batch, b.batch)
    return all(jax.tree.leaves(same)) and (a.useful_tokens, a.padded_tokens) == (b.useful_tokens, b.padded_tokens)


def test_the_plan_is_a_function_of_seed_and_step(sources: list[Source]) -> None:
    plan, again = BatchPlan(sources, 8, seed=1), BatchPlan(sources, 8, seed=1)
    steps = [7, 0, 123, 3, 7]
    assert all(np.array_equal(plan[step], again[step]) for step in reversed(steps))
    assert not np.array_equal(plan[0], plan[1])
    assert not np.array_equal(plan[0], BatchPlan(sources, 8, seed=2)[0])
    assert len(BatchPlan(sources, 8, seed=2**40)[10**6]) == 8


def test_weights_are_shares_of_the_mixture(sources: list[Source]) -> None:
    plan = BatchPlan(sources, 8, seed=0)
    ids = np.concatenate([plan[step] for step in range(100)])
    assert np.sum(ids < 30) == 600  # weight 3 of 4, of 800
    assert set(ids) == set(range(40))


def test_every_epoch_is_another_permutation(tmp_path: Path) -> None:
    plan = BatchPlan([source(tmp_path, "pairs", pairs(30))], 10, seed=0)
    epochs = [np.concatenate([plan[3 * epoch + part] for part in range(3)]).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_two_sources_of_one_size_are_shuffled_differently(tmp_path: Path) -> None:
    plan = BatchPlan([source(tmp_path, name, pairs(30)) for name in "ab"], 60, seed=0)
    ids = plan[0]
    assert (ids[ids < 30] != ids[ids >= 30] - 30).any()


def test_permutations_are_bijections_that_look_drawn() -> None:
    for count in (1, 7, 4096, 4097, 5000, 2**13, 70_001):
        found = permuted(np.arange(count), count, key_of("a", count))
        assert np.array_equal(np.sort(found), np.arange(count))
    count = 20_000_000
    drawn = np.stack([permuted(np.arange(512), count, key_of("b", i)) for i in range(200)])
    assert drawn.min() >= 0 and drawn.max() < count and all(len(set(row)) == 512 for row in drawn)
    assert abs(np.mean(drawn) / count - 0.5) < 4 * np.sqrt(1 / 12 / drawn.size)
    followers = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    same_place = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert max(abs(followers), abs(same_place)) < 4 / np.sqrt(drawn.size)


@pytest.mark.parametrize("kind", ["blended", "homogeneous", "semi_homogeneous"])
def test_every_kind_of_batch_sees_every_example_once_an_epoch(tmp_path: Path, kind: Any) -> None:
    made = [source(tmp_path, name, pairs(size), weight=size) for name, size in (("a", 100), ("b", 60), ("c", 40))]
    plan = BatchPlan(made, 20, 3, batching=BatchingConfig(kind=kind, ratio=0.7))
    steps = [plan[step] for step in range(500)]
    for i, (start, size) in enumerate(((0, 100), (100, 60), (160, 40))):
        ids = np.concatenate(steps)
        ids = ids[(ids >= start) & (ids < start + size)]
        whole = ids[: len(ids) // size * size].reshape(-1, size)
        # Epochs end inside batches, whose order is shuffled: an example is there once an epoch but for its ends.
        assert abs(len(ids) - 500 * 20 * size / 200) <= 30
        assert np.abs(np.bincount(ids - start) - len(ids) / size).max() <= 1
        assert plan.epochs(500)[i] == len(ids) / size
        assert len({tuple(epoch) for epoch in whole}) == len(whole)


def of_one(ids: np.ndarray) -> int:
    """The most examples of one of four sources of 50 examples."""
    return int(np.bincount(ids // 50).max())


def test_batches_of_one_source_and_partly_of_one(tmp_path: Path) -> None:
    made = [source(tmp_path, name, pairs(50), weight=1 + (name == "d")) for name in "abcd"]

    def plan(kind: Any, ratio: float = 0.5, **options: Any) -> BatchPlan:
        return BatchPlan(made, 20, 0, batching=BatchingConfig(kind=kind, ratio=ratio), **options)

    blended, homogeneous, half = plan("blended"), plan("homogeneous"), plan("semi_homogeneous")
    assert {tuple(np.bincount(blended[step] // 50, minlength=4)) for step in range(50)} == {(4, 4, 4, 8)}
    assert {of_one(homogeneous[step]) for step in range(50)} == {20}
    of_d = [step for step in range(1000) if homogeneous[step][0] >= 150]
    assert abs(len(of_d) - 400) <= 1 and max(np.diff(of_d)) <= 3
    assert {of_one(half[step]) for step in range(50)} == {12, 14}  # 10 of one source, and 2 or 4 of it among the others
    halves = [[np.bincount(part // 50, minlength=4) for part in np.split(half[step], 2)] for step in range(20)]
    assert np.max([np.abs(first - second) for first, second in halves]) <= 2  # two shards have alike parts of each source
    assert all(np.array_equal(plan("semi_homogeneous", 0)[step], blended[step]) for step in range(20))
    assert np.array_equal(half[700], plan("semi_homogeneous")[700]) and not np.array_equal(half[7], plan("blended", stage=1)[7])
    with pytest.raises(
        UserError, match=r"kind=homogeneous takes 51 examples of one source into a batch, but a holds 50; lower"
    ):
        BatchPlan(made, 51, 0, batching=BatchingConfig(kind="homogeneous"))


def test_shares_by_size_and_temperature(tmp_path: Path) -> None:
    made = [source(tmp_path, name, pairs(size), weight=weight) for name, size, weight in (("a", 90, 1.0), ("b", 10, 4.0))]

    def shares(**mixture: Any) -> list[float]:
        plan = BatchPlan(made, 50, 0, mixture=MixtureConfig(**mixture))
        ids = np.concatenate([plan[step] for step in range(200)])
        return [round(float(np.mean(ids < 90)), 3), round(float(np.mean(ids >= 90)), 3)]

    assert shares() == [0.2, 0.8]
    assert shares(by="size") == [0.692, 0.308]  # 90 to 40
    assert shares(by="size", temperature=2.0) == [0.6, 0.4]  # the root of it, 3 to 2
    assert shares(temperature=1e6) == [0.5, 0.5]


def test_a_source_may_use_a_part_of_its_examples(tmp_path: Path) -> None:
    capped, whole = source(tmp_path, "a", pairs(50), max_examples=20), source(tmp_path, "b", pairs(50), max_examples=80)
    assert (len(capped), len(whole)) == (20, 50)
    random = np.random.default_rng(0)
    drawn = [capped.draw(i, random, 0).query for i in range(20)]
    assert len(set(drawn)) == 20 and drawn != [whole.draw(i, random, 0).query for i in range(20)]
    again = source(tmp_path, "a", pairs(50), max_examples=20)
    assert [again.draw(i, random, 0).query for i in range(20)] == drawn
    ids = np.concatenate([BatchPlan([capped], 10, seed=0)[step] for step in range(2)])
    assert sorted(ids) == list(range(20))


def test_no_text_stands_twice_in_a_batch(tmp_path: Path) -> None:
    rows = [{"query": f"q{i % 30}", "pos": [f"p{i // 2}"]} for i in range(60)]
    labels = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    made = [source(tmp_path, "pairs", rows), source(tmp_path, "labels", labels, weight=0.5)]
    plan = BatchPlan(made, 24, seed=0)

    def positives(build: BatchBuilder, step: int) -> list[str]:
        examples = build.examples(step, plan[step])
        return [text for e in examples if e.query.startswith("q") for text in (e.query, e.positive)]

    build = builder(made, distinct=True)
    for step in range(30):
        texts = positives(build, step)
        assert len(texts) == len(set(texts)) == 32
        assert np.array_equal(build(step, plan[step]).batch.source, plan[step] >= 60)
        assert positives(builder(made, distinct=True), step) == texts
    assert any(len(set(texts)) < 32 for texts in (positives(builder(made), step) for step in range(30)))
    few = source(tmp_path, "few", [{"query": "q", "pos": ["p"]}] * 12)
    assert len(builder([few], distinct=True).examples(0, np.arange(12))) == 12  # there is no other


def test_a_batch_larger_than_the_data_is_refused(sources: list[Source]) -> None:
    BatchPlan(sources, 40, seed=0)
    with pytest.raises(UserError, match=r"^train.batch_size is 41, but the sources hold 40 examples; use at most that$"):
        BatchPlan(sources, 41, seed=0)


def test_ids_number_the_examples_of_all_sources(sources: list[Source]) -> None:
    source_of, index = ExampleIndex(sources).locate(np.array([0, 29, 30, 39]))
    assert (source_of.tolist(), index.tolist()) == ([0, 0, 1, 1], [0, 29, 0, 9])


def test_the_hash_of_a_plan_changes_with_what_a_step_sees(tmp_path: Path) -> None:
    first = source(tmp_path, "a", pairs(30))
    other = source(tmp_path, "b", pairs(31))
    hashes = [
        BatchPlan([first], 8, 0).hash, BatchPlan([first], 9, 0).hash, BatchPlan([first], 8, 1).hash,
        BatchPlan([other], 8, 0).hash,
        BatchPlan([first, other], 8, 0).hash, BatchPlan([source(tmp_path, "a", pairs(30), weight=2.0)], 8, 0).hash,
        BatchPlan([source(tmp_path, "a", pairs(30), instructions=["find"])], 8, 0).hash,
    ]  # fmt: skip
    assert len(set(hashes)) == len(hashes)
    assert BatchPlan([source(tmp_path, "elsewhere", pairs(30), name="x")], 8, 0).hash == hashes[0]


def text_at(batch: Batch, shard: int, slot: int) -> np.ndarray:
    """The tokens of a text, found through its slot as the step finds its vector."""
    texts = batch.texts
    rows = texts.tokens.shape[0] // texts.shards
    row, segment = shard * rows + slot // texts.segments, slot % texts.segments + 1
    return texts.tokens[row][texts.segment_ids[row] == segment]


def texts_of(example: Example, negatives: int) -> list[tuple[str | None, str]]:
    """Query, positive and negatives of an example, None for an absent one, each with its instruction."""
    documents = [example.positive, *example.negatives, *[None] * (negatives - len(example.negatives))]
    return [(example.query, example.instruction), *((text, example.document_instruction) for text in documents)]


@pytest.mark.parametrize("shards", [1, 8])
def test_slots_point_at_the_texts_of_the_examples(sources: list[Source], shards: int) -> None:
    build = builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, batch = build.examples(5, ids), build(5, ids).batch
    tokenizer = build._tokenizer
    assert {len(example.negatives) for example in examples} == {0, 1, 2}
    for i, example in enumerate(examples):
        slots = [batch.query_slot[i], *batch.doc_slot[i]]
        hashes = [batch.query_hash[i], *batch.doc_hash[i]]
        for slot, found, (text, instruction) in zip(slots, hashes, texts_of(example, 2), strict=True):
            if text is None:
                assert slot == -1 and not found.any()
                continue
            prompt = SPEC.instruction_template.replace("{instruction}", instruction) if instruction else ""
            assert np.array_equal(text_at(batch, i // (24 // shards), slot), tokenizer([text], [prompt]).ids[0])
            assert np.array_equal(found, text_hash(text))


@pytest.mark.parametrize("shards", [1, 8])
def test_a_batch_holds_what_the_examples_say(sources: list[Source], shards: int) -> None:
    build = builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, host = build.examples(5, ids), build(5, ids)
    batch = host.batch
    assert batch.source.tolist() == [int(id_ >= 30) for id_ in ids]
    assert batch.in_batch.tolist() == [bool(id_ < 30) for id_ in ids]
    assert batch.label.tolist() == [example.label for example in examples]
    assert np.isnan(batch.score).all()
    for i, example in enumerate(examples):
        known = {tuple(found) for found in batch.positive_hash[i] if found.any()}
        assert known == {tuple(text_hash(text)) for text in example.positives}
    assert host.useful_tokens == (batch.texts.segment_ids > 0).sum()
    assert host.padded_tokens == batch.texts.tokens.size
    assert batch.texts.tokens.shape[0] % shards == 0
    assert {array.dtype.name for array in (batch.query_slot, batch.doc_slot, batch.label, batch.source)} == {"int32"}


@pytest.mark.parametrize("shards", [1, 8])
def test_pooling_starts_after_the_instruction(sources: list[Source], shards: int) -> None:
    build = builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, batch = build.examples(5, ids), build(5, ids).batch
    texts, rows = batch.texts, batch.texts.tokens.shape[0] // shards
    for i, example in enumerate(examples):
        for slot, instruction in (
            (batch.query_slot[i], example.instruction),
            (batch.doc_slot[i, 0], example.document_instruction),
        ):
            row = i // (24 // shards) * rows + slot // texts.segments
            members = texts.segment_ids[row] == slot % texts.segments + 1
            skipped = build._tokenizer.prompt_lengths([SPEC.prompt(instruction)])[0]
            assert (skipped > 0) == bool(instruction)
            assert np.array_equal(texts.pool_mask[row][members], np.arange(members.sum()) >= skipped)


def test_the_examples_do_not_depend_on_the_shards(sources: list[Source]) -> None:
    ids = BatchPlan(sources, 24, seed=0)[0]
    one, eight = builder(sources, 1)(0, ids).batch, builder(sources, 8)(0, ids).batch
    for name in ("query_hash", "doc_hash", "positive_hash", "in_batch", "label", "source"):
        assert np.array_equal(getattr(one, name), getattr(eight, name)), name


def test_a_batch_is_a_function_of_seed_step_and_ids(sources: list[Source]) -> None:
    ids = BatchPlan(sources, 24, seed=0)[0]
    build = builder(sources)
    first = build(3, ids)
    build(4, ids)
    assert equal(build(3, ids), first)
    assert equal(builder(sources)(3, ids), first)
    assert not equal(build(4, ids), first)
    assert not equal(builder(sources, seed=1)(3, ids), first)


def test_scores_reach_the_batch(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(8)]
    scored = source(tmp_path, "scored", rows, min_score=2.0)
    assert sorted(builder([scored])(0, np.arange(6)).batch.score.tolist()) == [2, 3, 4, 5, 6, 7]


def test_no_negatives_asked_for(sources: list[Source]) -> None:
    batch = builder(sources, negatives=0)(0, np.arange(8)).batch
    assert batch.doc_slot.shape == (8, 1) and (batch.doc_slot >= 0).all()


def test_the_pipeline_resumes_at_any_step_with_the_same_batches(sources: list[Source]) -> None:
    def run(start: int, stop: int = 12) -> list[HostBatch]:
        return list(batches(BatchPlan(sources, 8, seed=0), builder(sources, 2), start, stop))

    whole = run(0)
    assert len(whole) == 12
    assert not any(equal(a, b) for a, b in pairwise(whole))
    for start in (1, 5, 11, 12):
        rest = run(start)
        assert len(rest) == 12 - start
        assert all(equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_a_run_sees_every_positive_and_new_negatives(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "pos": ["x", "y"], "neg": [f"n{j}" for j in range(9)]} for i in range(8)]
    build = builder([source(tmp_path, "pairs", rows)])
    seen = Counter(chain.from_iterable(e.negatives for step in range(10) for e in build.examples(step, np.arange(8))))
    assert len(seen) == 9
    assert {e.positive for step in range(3) for e in build.examples(step, np.arange(8))} == {"x", "y"}
