"""The batch plan, the batches that are built from it, and resuming at any step."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers import tiny
from helpers.sources import open_source_file, write_jsonl
from jaxembed.config import BatchingConfig, MixtureConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import Batch, BatchBuilder, HostBatch
from jaxembed.data.batch_plan import BatchPlan, ExampleIndex
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.equality import hash_text
from jaxembed.data.pipeline import iter_batches
from jaxembed.data.schema import Example
from jaxembed.data.shuffle import make_key, permute_indices
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.devices.mesh import make_all_shards
from jaxembed.errors import UserError
from jaxembed.losses.negatives import collect_text_info, in_batch_candidates, is_known_positive

SPEC = EmbeddingSpec(max_length=24, instruction_template="I: {instruction} Q: ")


def make_source(folder: Path, file: str, rows: Sequence[Any], **options: Any) -> Source:
    return open_source_file(write_jsonl(folder / file, rows), **options)


def make_pairs(count: int, name: str = "p") -> list[dict[str, Any]]:
    """Make rows with one or two positives, and zero to three negatives."""
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
        make_source(tmp_path, "pairs", make_pairs(30), weight=3.0, instructions=["find", "seek"]),
        make_source(tmp_path, "labels", labels, instructions=["sort"], document_instruction="name"),
    ]


def make_builder(sources: Sequence[Source], shards: int = 1, **options: Any) -> BatchBuilder:
    """Make a builder; options are those of `BatchSampler`."""
    tokenizer = tiny.build_tokenizer(bos=True)
    append_eos(tokenizer)
    options = {"hard_negatives": 2, "seed": 0} | options
    sampler = BatchSampler(sources=sources, tokenizer=TextTokenizer(tokenizer, SPEC), **options)
    return BatchBuilder(sampler=sampler, row_length=48, shards=make_all_shards(shards))


def are_equal(a: HostBatch, b: HostBatch) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), a.batch, b.batch)
    return all(jax.tree.leaves(same)) and (a.useful_tokens, a.padded_tokens) == (b.useful_tokens, b.padded_tokens)


def test_plan_is_a_function_of_seed_and_step(sources: list[Source]) -> None:
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


def test_every_epoch_is_a_different_permutation(tmp_path: Path) -> None:
    plan = BatchPlan([make_source(tmp_path, "pairs", make_pairs(30))], 10, seed=0)
    epochs = [np.concatenate([plan[3 * epoch + part] for part in range(3)]).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_sources_of_equal_size_are_shuffled_differently(tmp_path: Path) -> None:
    plan = BatchPlan([make_source(tmp_path, name, make_pairs(30)) for name in "ab"], 60, seed=0)
    ids = plan[0]
    assert (ids[ids < 30] != ids[ids >= 30] - 30).any()


def test_permutations_are_bijections_that_look_random() -> None:
    for count in (1, 7, 4096, 4097, 5000, 2**13, 70_001):
        permuted = permute_indices(np.arange(count), count, make_key("a", count))
        assert np.array_equal(np.sort(permuted), np.arange(count))
    count = 20_000_000
    drawn = np.stack([permute_indices(np.arange(512), count, make_key("b", i)) for i in range(200)])
    assert drawn.min() >= 0 and drawn.max() < count and all(len(set(row)) == 512 for row in drawn)
    assert abs(np.mean(drawn) / count - 0.5) < 4 * np.sqrt(1 / 12 / drawn.size)
    neighbor_correlation = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    key_correlation = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert max(abs(neighbor_correlation), abs(key_correlation)) < 4 / np.sqrt(drawn.size)


@pytest.mark.parametrize("kind", ["blended", "homogeneous", "semi_homogeneous"])
def test_every_batching_kind_draws_every_example_once_per_epoch(tmp_path: Path, kind: Any) -> None:
    sizes = {"a": 100, "b": 60, "c": 40}
    weighted = [make_source(tmp_path, name, make_pairs(size), weight=size) for name, size in sizes.items()]
    plan = BatchPlan(weighted, 20, 3, batching=BatchingConfig(kind=kind, ratio=0.7))
    steps = [plan[step] for step in range(500)]
    for i, (start, size) in enumerate(((0, 100), (100, 60), (160, 40))):
        ids = np.concatenate(steps)
        ids = ids[(ids >= start) & (ids < start + size)]
        whole_epochs = ids[: len(ids) // size * size].reshape(-1, size)
        # Epochs end inside batches, whose order is shuffled: an example appears once per epoch except at its ends.
        assert abs(len(ids) - 500 * 20 * size / 200) <= 30
        assert np.abs(np.bincount(ids - start) - len(ids) / size).max() <= 1
        assert plan.count_epochs(500)[i] == len(ids) / size
        assert len({tuple(epoch) for epoch in whole_epochs}) == len(whole_epochs)


def count_largest_source(ids: np.ndarray) -> int:
    """Return the number of ids that belong to the most frequent of four sources with 50 examples each."""
    return int(np.bincount(ids // 50).max())


def test_homogeneous_and_semi_homogeneous_batches(tmp_path: Path) -> None:
    four = [make_source(tmp_path, name, make_pairs(50), weight=1 + (name == "d")) for name in "abcd"]

    def make_plan(kind: Any, ratio: float = 0.5, **options: Any) -> BatchPlan:
        return BatchPlan(four, 20, 0, batching=BatchingConfig(kind=kind, ratio=ratio), **options)

    blended, homogeneous, half = make_plan("blended"), make_plan("homogeneous"), make_plan("semi_homogeneous")
    assert {tuple(np.bincount(blended[step] // 50, minlength=4)) for step in range(50)} == {(4, 4, 4, 8)}
    assert {count_largest_source(homogeneous[step]) for step in range(50)} == {20}
    steps_of_d = [step for step in range(1000) if homogeneous[step][0] >= 150]
    assert abs(len(steps_of_d) - 400) <= 1 and max(np.diff(steps_of_d)) <= 3
    # 10 examples of the single source, and 2 or 4 of it among the blended ones.
    assert {count_largest_source(half[step]) for step in range(50)} == {12, 14}
    # Two shards have similar parts of each source.
    halves = [[np.bincount(part // 50, minlength=4) for part in np.split(half[step], 2)] for step in range(20)]
    assert np.max([np.abs(first - second) for first, second in halves]) <= 2
    assert all(np.array_equal(make_plan("semi_homogeneous", 0)[step], blended[step]) for step in range(20))
    assert np.array_equal(half[700], make_plan("semi_homogeneous")[700])
    assert not np.array_equal(half[7], make_plan("blended", stage=1)[7])
    with pytest.raises(UserError, match=r"kind: homogeneous takes 51 examples of one source .*, but a has 50\. Lower"):
        BatchPlan(four, 51, 0, batching=BatchingConfig(kind="homogeneous"))


def test_shares_by_size_and_temperature(tmp_path: Path) -> None:
    rows = (("a", 90, 1.0), ("b", 10, 4.0))
    weighted = [make_source(tmp_path, name, make_pairs(size), weight=weight) for name, size, weight in rows]

    def measure_shares(**mixture: Any) -> list[float]:
        plan = BatchPlan(weighted, 50, 0, mixture=MixtureConfig(**mixture))
        ids = np.concatenate([plan[step] for step in range(200)])
        return [round(float(np.mean(ids < 90)), 3), round(float(np.mean(ids >= 90)), 3)]

    assert measure_shares() == [0.2, 0.8]
    assert measure_shares(by="size") == [0.692, 0.308]  # 90 to 40
    assert measure_shares(by="size", temperature=2.0) == [0.6, 0.4]  # the square roots, 3 to 2
    assert measure_shares(temperature=1e6) == [0.5, 0.5]


def test_max_examples_uses_a_fixed_random_subset(tmp_path: Path) -> None:
    capped = make_source(tmp_path, "a", make_pairs(50), max_examples=20)
    whole = make_source(tmp_path, "b", make_pairs(50), max_examples=80)
    assert (len(capped), len(whole)) == (20, 50)
    random = np.random.default_rng(0)
    queries = [capped.draw(i, random, 0).query for i in range(20)]
    assert len(set(queries)) == 20 and queries != [whole.draw(i, random, 0).query for i in range(20)]
    again = make_source(tmp_path, "a", make_pairs(50), max_examples=20)
    assert [again.draw(i, random, 0).query for i in range(20)] == queries
    ids = np.concatenate([BatchPlan([capped], 10, seed=0)[step] for step in range(2)])
    assert sorted(ids) == list(range(20))


def test_no_duplicates_redraws_repeated_texts(tmp_path: Path) -> None:
    rows = [{"query": f"q{i % 30}", "pos": [f"p{i // 2}"]} for i in range(60)]
    labels = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    pair_and_label_sources = [make_source(tmp_path, "pairs", rows), make_source(tmp_path, "labels", labels, weight=0.5)]
    plan = BatchPlan(pair_and_label_sources, 24, seed=0)

    def list_pair_texts(build: BatchBuilder, step: int) -> list[str]:
        examples = build.sampler.sample(step, plan[step])
        return [text for e in examples if e.query.startswith("q") for text in (e.query, e.positive)]

    build = make_builder(pair_and_label_sources, no_duplicates=True)
    for step in range(30):
        texts = list_pair_texts(build, step)
        assert len(texts) == len(set(texts)) == 32
        assert np.array_equal(build(step, plan[step]).batch.source, plan[step] >= 60)
        assert list_pair_texts(make_builder(pair_and_label_sources, no_duplicates=True), step) == texts
    assert any(
        len(set(texts)) < 32 for texts in (list_pair_texts(make_builder(pair_and_label_sources), step) for step in range(30))
    )
    few = make_source(tmp_path, "few", [{"query": "q", "pos": ["p"]}] * 12)
    assert len(make_builder([few], no_duplicates=True).sampler.sample(0, np.arange(12))) == 12  # there is no other example


def test_sampling_part_of_a_batch_returns_that_part_of_its_examples(tmp_path: Path) -> None:
    rows = [{"query": f"q{i % 30}", "pos": [f"p{i // 2}"]} for i in range(60)]
    repeated = [make_source(tmp_path, "pairs", rows)]
    ids, members = BatchPlan(repeated, 24, seed=0)[0], np.arange(12, 24)
    for no_duplicates in (False, True):
        sampler = make_builder(repeated, no_duplicates=no_duplicates).sampler
        assert sampler.sample(0, ids, members) == sampler.sample(0, ids)[12:]


def test_batch_larger_than_the_data_is_refused(sources: list[Source]) -> None:
    BatchPlan(sources, 40, seed=0)
    message = r"^train\.batch_size: 41 is more than the examples of the sources \(40\)\. Use at most 40\.$"
    with pytest.raises(UserError, match=message):
        BatchPlan(sources, 41, seed=0)


def test_ids_number_the_examples_of_all_sources(sources: list[Source]) -> None:
    source, index = ExampleIndex(sources).locate(np.array([0, 29, 30, 39]))
    assert (source.tolist(), index.tolist()) == ([0, 0, 1, 1], [0, 29, 0, 9])


def test_plan_hash_is_that_of_earlier_versions() -> None:
    """A run resumes only if its plan has the recorded hash. A new key of a source must not change it."""
    config = SourceConfig(path="pairs.jsonl", instructions=("Find it",), max_examples=5)
    sampler: Any = range(9)
    source = Source(config, "pairs", sampler, in_batch=True, digest="0" * 64, format="pairs", row_count=9)
    assert BatchPlan([source], 2, 7, 1).hash == "35c9ba8309706214"


def test_plan_hash_changes_with_the_examples_of_a_step(tmp_path: Path) -> None:
    first = make_source(tmp_path, "a", make_pairs(30))
    other = make_source(tmp_path, "b", make_pairs(31))
    weighted = make_source(tmp_path, "a", make_pairs(30), weight=2.0)
    instructed = make_source(tmp_path, "a", make_pairs(30), instructions=["find"])
    plans = [
        BatchPlan([first], 8, 0),
        BatchPlan([first], 9, 0),
        BatchPlan([first], 8, 1),
        BatchPlan([other], 8, 0),
        BatchPlan([first, other], 8, 0),
        BatchPlan([weighted], 8, 0),
        BatchPlan([instructed], 8, 0),
    ]
    hashes = [plan.hash for plan in plans]
    assert len(set(hashes)) == len(hashes)
    renamed = make_source(tmp_path, "elsewhere", make_pairs(30), name="x")
    assert BatchPlan([renamed], 8, 0).hash == hashes[0]


def read_text_tokens(batch: Batch, shard: int, slot: int) -> np.ndarray:
    """Return the tokens of the text in a slot of a shard. The train step finds the text's vector in the same way."""
    texts = batch.texts
    rows = texts.tokens.shape[0] // texts.shards
    row, segment = shard * rows + slot // texts.segments, slot % texts.segments + 1
    return texts.tokens[row][texts.segment_ids[row] == segment]


def list_padded_texts(example: Example, negatives: int) -> list[tuple[str | None, str]]:
    """Return the query, the positive and `negatives` negatives (None: absent), each with its instruction."""
    documents = [example.positive, *example.negatives, *[None] * (negatives - len(example.negatives))]
    return [(example.query, example.instruction), *((text, example.document_instruction) for text in documents)]


@pytest.mark.parametrize("shards", [1, 8])
def test_slots_point_at_the_texts_of_the_examples(sources: list[Source], shards: int) -> None:
    build = make_builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, batch = build.sampler.sample(5, ids), build(5, ids).batch
    tokenizer = build.sampler.tokenizer
    assert {len(example.negatives) for example in examples} == {0, 1, 2}
    for i, example in enumerate(examples):
        slots = [batch.query_slot[i], *batch.doc_slot[i]]
        hashes = [batch.query_hash[i], *batch.doc_hash[i]]
        for slot, hashed, (text, instruction) in zip(slots, hashes, list_padded_texts(example, 2), strict=True):
            if text is None:
                assert slot == -1 and not hashed.any()
                continue
            prompt = SPEC.instruction_template.replace("{instruction}", instruction) if instruction else ""
            assert np.array_equal(read_text_tokens(batch, i // (24 // shards), slot), tokenizer([text], [prompt]).ids[0])
            assert np.array_equal(hashed, hash_text(text))


@pytest.mark.parametrize("shards", [1, 8])
def test_batch_describes_its_examples(sources: list[Source], shards: int) -> None:
    build = make_builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, host = build.sampler.sample(5, ids), build(5, ids)
    batch = host.batch
    assert batch.source.tolist() == [int(id_ >= 30) for id_ in ids]
    assert batch.in_batch.tolist() == [bool(id_ < 30) for id_ in ids]
    assert batch.label.tolist() == [example.label for example in examples]
    for i, example in enumerate(examples):
        known = {tuple(hashed) for hashed in batch.positive_hash[i] if hashed.any()}
        assert known == {tuple(hash_text(text)) for text in (*example.positives, example.query)}
    assert host.useful_tokens == (batch.texts.segment_ids > 0).sum()
    assert host.padded_tokens == batch.texts.tokens.size
    assert batch.texts.tokens.shape[0] % shards == 0
    assert {array.dtype.name for array in (batch.query_slot, batch.doc_slot, batch.label, batch.source)} == {"int32"}


def test_equal_texts_of_a_batch_are_never_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "first", "pos": ["same\n"]},  # equals the positive of the fourth row, except for its end
        {"query": "second", "pos": ["First\u00a0"]},  # the first row's query
        {"query": "FIRST ", "pos": ["other"]},  # the first row's query again
        {"query": "fourth", "pos": ["Same"], "neg": ["fourth ", "wrong"]},
    ]
    build = make_builder([make_source(tmp_path, "a", rows)])
    queries, documents = collect_text_info(jax.device_put(build(0, np.arange(4)).batch))
    queries, documents = queries.reshape(4, 1), jax.tree.map(lambda x: x[None, :, 0], documents)
    mask = in_batch_candidates(queries, documents) & ~is_known_positive(queries, documents)
    assert np.asarray(mask).astype(int).tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0]]
    assert build.sampler.sample(0, np.array([3]))[0].negatives == ("wrong",)


@pytest.mark.parametrize("shards", [1, 8])
def test_pooling_starts_after_the_instruction(sources: list[Source], shards: int) -> None:
    build = make_builder(sources, shards)
    ids = BatchPlan(sources, 24, seed=0)[5]
    examples, batch = build.sampler.sample(5, ids), build(5, ids).batch
    texts, rows = batch.texts, batch.texts.tokens.shape[0] // shards
    for i, example in enumerate(examples):
        for slot, instruction in (
            (batch.query_slot[i], example.instruction),
            (batch.doc_slot[i, 0], example.document_instruction),
        ):
            row = i // (24 // shards) * rows + slot // texts.segments
            members = texts.segment_ids[row] == slot % texts.segments + 1
            skipped = build.sampler.tokenizer.count_prompt_tokens([SPEC.build_prompt(instruction)])[0]
            assert (skipped > 0) == bool(instruction)
            assert np.array_equal(texts.pool_mask[row][members], np.arange(members.sum()) >= skipped)


def test_examples_do_not_depend_on_the_shards(sources: list[Source]) -> None:
    ids = BatchPlan(sources, 24, seed=0)[0]
    one, eight = make_builder(sources, 1)(0, ids).batch, make_builder(sources, 8)(0, ids).batch
    for name in ("query_hash", "doc_hash", "positive_hash", "in_batch", "label", "source"):
        assert np.array_equal(getattr(one, name), getattr(eight, name)), name


def test_batch_is_a_function_of_seed_step_and_ids(sources: list[Source]) -> None:
    ids = BatchPlan(sources, 24, seed=0)[0]
    build = make_builder(sources)
    first = build(3, ids)
    build(4, ids)
    assert are_equal(build(3, ids), first)
    assert are_equal(make_builder(sources)(3, ids), first)
    assert not are_equal(build(4, ids), first)
    assert not are_equal(make_builder(sources, seed=1)(3, ids), first)
    assert not are_equal(make_builder(sources, step_offset=1)(3, ids), first)


def test_zero_hard_negatives(sources: list[Source]) -> None:
    batch = make_builder(sources, hard_negatives=0)(0, np.arange(8)).batch
    assert batch.doc_slot.shape == (8, 1) and (batch.doc_slot >= 0).all()


def test_pipeline_resumes_at_any_step_with_the_same_batches(sources: list[Source]) -> None:
    def run(start: int, stop: int = 12) -> list[HostBatch]:
        return list(iter_batches(BatchPlan(sources, 8, seed=0), make_builder(sources, 2), start, stop))

    whole = run(0)
    assert len(whole) == 12
    assert not any(are_equal(a, b) for a, b in pairwise(whole))
    for start in (1, 5, 11, 12):
        rest = run(start)
        assert len(rest) == 12 - start
        assert all(are_equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_run_sees_every_positive_and_new_negatives(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "pos": ["x", "y"], "neg": [f"n{j}" for j in range(9)]} for i in range(8)]
    sampler = make_builder([make_source(tmp_path, "pairs", rows)]).sampler
    steps = [sampler.sample(step, np.arange(8)) for step in range(10)]
    negatives = Counter(chain.from_iterable(example.negatives for examples in steps for example in examples))
    assert len(negatives) == 9
    assert {example.positive for examples in steps[:3] for example in examples} == {"x", "y"}
