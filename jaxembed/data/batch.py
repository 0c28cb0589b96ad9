"""The global batch: packed texts, and for every query where its vectors lie and what the losses must know of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch_plan import ExampleIndex
from jaxembed.data.packing import PackedTexts, fill, max_segments, pack_shards
from jaxembed.data.schema import Example, text_hash
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer, TokenizedTexts
from jaxembed.devices.mesh import Shards, all_shards
from jaxembed.devices.processes import Channel
from jaxembed.errors import UserError

ATTEMPTS = 100  # to find an example whose texts no other of its batch has; the loss knows those that remain as duplicates


class RawText(NamedTuple):
    """A text without any model's prompt: its side (query or document) and its instruction, '' for none, stand apart."""

    text: str
    side: str
    instruction: str


EncodeRaw = Callable[[Sequence[RawText]], np.ndarray]  # N texts -> unit vectors, float32 [N, G]


@flax.struct.dataclass
class OtherVectors:
    """Unit vectors of a batch's texts by another model, zero for absent documents."""

    queries: Any  # float32 [B, G]
    documents: Any  # float32 [B, 1+K, G]


@flax.struct.dataclass
class Batch:
    """B queries, 1 + K documents each (document 0 is the positive), P known positives each.

    Shard-major: a query and its documents lie in one shard. Slots count inside the shard, -1 for an absent document.
    Hashes are uint32 pairs of the texts, zero where absent.
    """

    texts: PackedTexts
    query_slot: Any  # int32 [B]
    doc_slot: Any  # int32 [B, 1+K]
    in_batch: Any  # bool [B]: whether the source uses and lends in-batch negatives
    query_hash: Any  # uint32 [B, 2]
    doc_hash: Any  # uint32 [B, 1+K, 2]
    positive_hash: Any  # uint32 [B, P, 2]
    label: Any  # int32 [B], -1 for none
    source: Any  # int32 [B]
    score: Any  # float32 [B], NaN for none
    teacher_scores: Any  # float32 [B, 1+K], NaN for none
    adapter: Any = None  # int32, the index of the adapter that the batch trains; None where there are not several
    guide: OtherVectors | None = None
    teacher: OtherVectors | None = None


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The part of a batch that this process's devices hold, in host memory; the numbers for the log are the whole batch's.

    `pairs`: of tokens in one text, each with each. `sources` are those that it has examples of.
    """

    batch: Batch
    useful_tokens: int
    padded_tokens: int
    pairs: int
    sources: Sequence[int]


class BatchBuilder:
    """Draws, tokenises and packs the examples of a step. Pure: the same (step, ids) give the same batch.

    Of several processes each builds its own shards; they agree on the shape of the rows, so all build the same steps in the
    same order.

    A step is that of a stage, which `steps_before` others precede. With `distinct` no query or positive stands twice in a
    batch, of those that may be negatives of each other: others of the same source are drawn in their place. `guide` and
    `teacher` are other models, whose vectors of its texts a batch is to carry.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: TextTokenizer,
        spec: EmbeddingSpec,
        *,
        row_length: int,
        hard_negatives: int,
        seed: int,
        shards: Shards | int,
        adapters: Sequence[str] = (),
        steps_before: int = 0,
        distinct: bool = False,
        guide: EncodeRaw | None = None,
        teacher: EncodeRaw | None = None,
    ):
        self._sources, self._tokenizer, self._spec = sources, tokenizer, spec
        self._index = ExampleIndex(sources)
        self._row_length, self._negatives = row_length, hard_negatives
        self._seed, self._adapters = seed, tuple(adapters)
        self._shards = all_shards(shards) if isinstance(shards, int) else shards
        self._before, self._distinct = steps_before, distinct
        self._guide, self._teacher = guide, teacher
        self._channel = Channel()
        self._positives = max(source.sampler.most_positives for source in sources)

    def with_sources(self, sources: Sequence[Source]) -> BatchBuilder:
        """The same with sources that have other negatives."""
        made = copy.copy(self)
        made._sources = sources
        return made

    def examples(self, step: int, ids: np.ndarray) -> list[Example]:
        """The examples of a step, each drawn from (seed, step, id)."""
        return self._with_room(self._drawn(step, ids))

    def _own_examples(self, step: int, ids: np.ndarray) -> list[Example]:
        """Those of this process's shards. Where no text may stand in a batch twice, it takes all to know which do."""
        own = np.arange(len(ids)).reshape(self._shards.count, -1)[list(self._shards.own)].ravel()
        if not self._distinct:
            return self.examples(step, ids[own])
        drawn = self._drawn(step, ids)
        return self._with_room([drawn[i] for i in own])

    def _drawn(self, step: int, ids: np.ndarray) -> list[Example]:
        drawn: list[Example] = []
        seen: set[str] = set()
        for s, index, id_ in zip(*self._index.locate(ids), ids, strict=True):
            source = self._sources[s]
            example = self._draw(source, int(index), step, int(id_))
            for attempt in range(ATTEMPTS if self._distinct and source.in_batch else 0):
                if seen.isdisjoint((example.query, example.positive)):
                    break
                example = self._draw(source, None, step, int(id_), attempt)
            if source.in_batch:
                seen |= {example.query, example.positive}
            drawn.append(example)
        return drawn

    def _draw(self, source: Source, index: int | None, step: int, *key: int) -> Example:
        """The example at `index`, at a random one for None."""
        random = np.random.default_rng((self._seed, self._before + step, *key))
        return source.draw(int(random.integers(len(source))) if index is None else index, random, self._negatives)

    def _with_room(self, examples: list[Example]) -> list[Example]:
        """The same without those in-context examples, the last first, that leave the text less than half of its tokens.

        They are counted one by one, so that each is tokenised once.
        """
        parts = [[self._spec.prompt(e.instruction), *map(self._spec.shown, e.shots)] if e.shots else [] for e in examples]
        lengths = iter(self._tokenizer.prompt_lengths([part for of_example in parts for part in of_example]))
        made = []
        for example, of_example in zip(examples, parts, strict=True):
            filled = np.cumsum(list(islice(lengths, len(of_example))))
            fitting = int((2 * filled <= self._tokenizer.max_length).sum()) - 1
            made.append(dataclasses.replace(example, shots=example.shots[: max(0, fitting)]) if of_example else example)
        return made

    def _prompt(self, example: Example) -> str:
        return self._spec.prompt(example.instruction, example.shots)

    def __call__(self, step: int, ids: np.ndarray) -> HostBatch:
        examples = self._own_examples(step, ids)
        texts, prompts = self._padded_texts(examples)
        present = np.array([text is not None for text in texts])
        tokenized = self._tokenizer(*_without_absent(texts, prompts))
        packed, slots, agreement = self._pack(tokenized, present)
        slots = slots.reshape(len(examples), -1)
        hashes = np.stack([_hash(text) for text in texts]).reshape(len(examples), -1, 2)
        of_all, _ = self._index.locate(ids)
        source = of_all.reshape(self._shards.count, -1)[list(self._shards.own)].ravel()
        batch = Batch(
            texts=packed,
            query_slot=slots[:, 0],
            doc_slot=slots[:, 1:],
            in_batch=np.array([self._sources[s].in_batch for s in source]),
            query_hash=hashes[:, 0],
            doc_hash=hashes[:, 1:],
            positive_hash=np.stack([self._positive_hashes(e) for e in examples]),
            label=np.array([e.label for e in examples], np.int32),
            source=source.astype(np.int32),
            score=np.array([e.score for e in examples], np.float32),
            teacher_scores=self._teacher_scores(examples),
            adapter=self._adapter(of_all) if self._adapters else None,
            guide=self._others(self._guide, examples, texts),
            teacher=self._others(self._teacher, examples, texts),
        )
        padded = packed.segment_ids.size // len(self._shards.own) * self._shards.count
        return HostBatch(batch, agreement.useful_tokens, padded, agreement.pairs, np.unique(of_all).tolist())

    def _adapter(self, source: np.ndarray) -> np.ndarray:
        """The index of the adapter that the sources of a batch train; `UserError` where they train several."""
        trained = {self._sources[s].config.adapter: self._sources[s].name for s in np.unique(source)}
        if len(trained) > 1:
            told = ", ".join(f"{adapter} (source {name})" for adapter, name in trained.items())
            raise UserError(f"a batch trains one adapter, this one holds examples of {told}; batch their sources apart")
        return np.array(self._adapters.index(*trained), np.int32)

    def texts(self, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
        """The texts of examples in the order query, positive, negatives, and the prompt of each."""
        return _without_absent(*self._padded_texts(examples))

    def _padded_texts(self, examples: Sequence[Example]) -> tuple[list[str | None], list[str]]:
        """Query, positive and K negatives of each example (None for an absent one), and their prompts."""
        texts: list[str | None] = []
        prompts: list[str] = []
        for e in examples:
            negatives = [*e.negatives, *[None] * (self._negatives - len(e.negatives))]
            texts += [e.query, e.positive, *negatives]
            documents = self._spec.prompt(e.document_instruction)
            prompts += [self._prompt(e), *[documents] * (1 + self._negatives)]
        return texts, prompts

    def _others(
        self, encode: EncodeRaw | None, examples: Sequence[Example], texts: Sequence[str | None]
    ) -> OtherVectors | None:
        """What another model makes of the texts, each under its own instruction; in-context examples are not shown to it."""
        if encode is None:
            return None
        documents = 1 + self._negatives
        under = [(("query", e.instruction), *[("document", e.document_instruction)] * documents) for e in examples]
        asked = zip(texts, chain.from_iterable(under), strict=True)
        encoded = encode([RawText(text, *side) for text, side in asked if text is not None])
        vectors = np.zeros((len(examples), 1 + documents, encoded.shape[1]), np.float32)
        vectors[np.array([text is not None for text in texts]).reshape(vectors.shape[:2])] = encoded
        return OtherVectors(vectors[:, 0], vectors[:, 1:])

    def _pack(self, tokenized: TokenizedTexts, present: np.ndarray) -> tuple[PackedTexts, np.ndarray, RowShapeSync]:
        """Packs each shard's texts into its own rows, and their slots; all shards get rows of one shape."""
        own = self._shards.own
        shard_of = np.repeat(own, len(present) // len(own))[present]
        members = [np.flatnonzero(shard_of == s) for s in own]
        lengths = np.array([len(ids) for ids in tokenized.ids])
        counted = lengths[np.isin(shard_of, self._shards.counted)]
        agreement = RowShapeSync(self._channel, int(counted.sum()), int(np.square(counted).sum()))
        packs, shape = pack_shards([lengths[m] for m in members], self._row_length, agreement.rows)
        segments = max_segments(shape[1])
        slots = np.full(len(present), -1, np.int32)
        where = np.flatnonzero(present)
        parts = []
        for m, (row, place) in zip(members, packs, strict=True):
            parts.append(fill([tokenized.ids[i] for i in m], tokenized.pool_from[m], row, place, shape))
            slots[where[m]] = row * segments + place
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return PackedTexts(**arrays, segments=segments, shards=self._shards.count), slots, agreement

    def _teacher_scores(self, examples: Sequence[Example]) -> np.ndarray:
        scores = np.full((len(examples), 1 + self._negatives), np.nan, np.float32)
        for row, example in zip(scores, examples, strict=True):
            row[: len(example.teacher_scores)] = example.teacher_scores
        return scores

    def _positive_hashes(self, example: Example) -> np.ndarray:
        hashes = np.zeros((self._positives, 2), np.uint32)
        for i, text in enumerate(example.positives):
            hashes[i] = text_hash(text)
        return hashes


@dataclasses.dataclass
class RowShapeSync:
    """What the processes must know of each other's texts of a batch: how many tokens they have, and how many rows they fill.

    `useful_tokens` and `pairs` of tokens are first those of this process's texts, then those of all.
    """

    channel: Channel
    useful_tokens: int
    pairs: int

    def rows(self, needed: Iterator[int]) -> Iterator[int]:
        """The rows that the fullest shard of any process needs, given those of this one's, at one row length after another."""
        if self.channel.alone:
            return needed
        of_all = self.channel.agree(np.array([self.useful_tokens, self.pairs, *needed]).tobytes(), merged)
        self.useful_tokens, self.pairs, *rows = np.frombuffer(of_all, np.int64).tolist()
        return iter(rows)


def merged(messages: Sequence[bytes]) -> bytes:
    """The sums of tokens and pairs, and the most rows at each length, as far as all processes tell them."""
    tokens, pairs, *rows = zip(*(np.frombuffer(message, np.int64).tolist() for message in messages), strict=False)
    return np.array([sum(tokens), sum(pairs), *map(max, rows)]).tobytes()


def roles(texts: Sequence[str]) -> list[str]:
    """What each text of one example is to it."""
    return ["query", "positive", *["negative"] * (len(texts) - 2)]


def _without_absent(texts: Sequence[str | None], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    kept = [(text, prompt) for text, prompt in zip(texts, prompts, strict=True) if text is not None]
    return [text for text, _ in kept], [prompt for _, prompt in kept]


def _hash(text: str | None) -> np.ndarray:
    return np.zeros(2, np.uint32) if text is None else text_hash(text)
