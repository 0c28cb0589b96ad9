"""The global batch: packed texts, and for every query the slots of its vectors and the metadata for the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from jaxembed.data.batch_sampler import BatchSampler, drop_absent
from jaxembed.data.equality import hash_text
from jaxembed.data.packing import PackedTexts
from jaxembed.data.schema import Example
from jaxembed.data.shard_packing import RowShapeSync, pack_batch
from jaxembed.data.sources import Source
from jaxembed.data.token_batch import TokenBatch, TokenBatchBuilder
from jaxembed.data.tokenize import TokenizedTexts
from jaxembed.devices.mesh import Shards
from jaxembed.devices.processes import Channel
from jaxembed.errors import UserError


class EncoderInput(NamedTuple):
    """A text for any model, before the prompt of that model is applied.

    Attributes:
        text: The text itself.
        side: query or document.
        instruction: Instruction of the text, '' for none.
    """

    text: str
    side: str
    instruction: str


EncodeInputs = Callable[[Sequence[EncoderInput]], np.ndarray]  # N inputs -> unit vectors, float32 [N, G]


@flax.struct.dataclass
class FrozenVectors:
    """Unit vectors of the texts of a batch by a frozen model, zero for absent documents.

    Attributes:
        queries: float32 [B, G].
        documents: float32 [B, 1+K, G].
    """

    queries: Any
    documents: Any


@flax.struct.dataclass
class Batch:
    """Queries with their documents, and texts whose tokens are predicted.

    There are B queries with 1 + K documents each (document 0 is the positive) and P known positives each. A stage whose
    objectives all predict tokens has no queries: then every field but `token_batches` is None. Arrays are shard-major: a query
    and its documents are in one shard. Hashes are uint32 pairs, zero where a text is absent.

    Attributes:
        texts: The packed texts.
        query_slot: Slot of each query inside its shard, int32 [B].
        doc_slot: Slot of each document inside its shard, -1 for an absent one, int32 [B, 1+K].
        in_batch: True if the source uses in-batch negatives and its texts may be such negatives, bool [B].
        query_hash: uint32 [B, 2].
        doc_hash: uint32 [B, 1+K, 2].
        positive_hash: Hashes of all known positives of a query, and of the query itself, so that a document that equals it is
            never its negative, uint32 [B, P, 2].
        label: Label in its source, -1 for none, int32 [B].
        source: Index of the source, int32 [B].
        teacher_scores: Scores of the documents by a teacher, NaN for none, float32 [B, 1+K].
        score: Similarity of query and document 0 on the scale of cosines, NaN for none, float32 [B].
        is_positive: False for graded pairs whose document 0 does not answer the query, bool [B].
        adapter: Index of the adapter that the batch trains, int32 scalar. None without named adapters.
        guide: Vectors by the guide model, if there is one.
        teacher: Vectors by the teacher model, if there is one.
        token_batches: The texts of each objective that predicts tokens, by its label.
    """

    texts: PackedTexts | None = None
    query_slot: Any = None
    doc_slot: Any = None
    in_batch: Any = None
    query_hash: Any = None
    doc_hash: Any = None
    positive_hash: Any = None
    label: Any = None
    source: Any = None
    teacher_scores: Any = None
    score: Any = None
    is_positive: Any = None
    adapter: Any = None
    guide: FrozenVectors | None = None
    teacher: FrozenVectors | None = None
    token_batches: Mapping[str, TokenBatch] = flax.struct.field(default_factory=dict)

    @property
    def row_shapes(self) -> list[tuple[int, int]]:
        """Rows and tokens per row of the queries and documents, then of the texts of each objective that predicts tokens."""
        packed_texts = [self.texts, *(token_batch.texts for token_batch in self.token_batches.values())]
        return [texts.tokens.shape for texts in packed_texts if texts is not None]


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The part of a batch that belongs to this process's devices, in host memory, and counts of the whole batch for logs.

    Attributes:
        batch: The shards of this process, one after the other.
        useful_tokens: Tokens of texts in the whole batch.
        padded_tokens: Tokens of all rows of the whole batch, padding included.
        token_pairs: Sum of the squared text lengths of the whole batch, to which the FLOPs of attention are proportional.
        examples: Queries of the whole batch, and texts whose tokens are predicted.
        sources: Indices of the sources that the batch has queries of.
    """

    batch: Batch
    useful_tokens: int = 0
    padded_tokens: int = 0
    token_pairs: int = 0
    examples: int = 0
    sources: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder:
    """Builds the batch of a step: draws its examples, tokenizes and packs their texts.

    This is a pure function: the same (step, ids) give the same batch. Each of several processes builds its own shards. They
    agree on the shape of the rows, so all of them must build the same steps in the same order.

    Attributes:
        sampler: Draws the examples.
        row_length: Maximum tokens of a packed row.
        shards: The shards of a batch, and which of them this process builds.
        adapters: Names of the adapters, in the order of their indices.
        guide: Encodes texts for `Batch.guide`.
        teacher: Encodes texts for `Batch.teacher`.
        token_builders: Builds the texts of each objective that predicts tokens, by its label.
        channel: Connects the processes.
    """

    sampler: BatchSampler
    row_length: int
    shards: Shards
    adapters: Sequence[str] = ()
    guide: EncodeInputs | None = None
    teacher: EncodeInputs | None = None
    token_builders: Mapping[str, TokenBatchBuilder] = dataclasses.field(default_factory=dict)
    channel: Channel = dataclasses.field(default_factory=Channel)

    @cached_property
    def _max_positives(self) -> int:
        return max(source.sampler.max_positives for source in self.sampler.sources)

    def with_sources(self, sources: Sequence[Source]) -> BatchBuilder:
        """Return a copy that draws from other sources, such as those with mined negatives."""
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, sources=sources))

    def __call__(self, step: int, ids: np.ndarray) -> HostBatch:
        """Build the batch of a step.

        Args:
            step: Step of the stage.
            ids: Global ids of the examples of the whole batch (`BatchPlan`), int64 [B]. Empty for a batch without queries.
        """
        host_batch = self._build_queries(step, ids) if len(ids) else HostBatch(Batch())
        host_tokens = {label: build_tokens(step) for label, build_tokens in self.token_builders.items()}
        token_batches = {label: tokens.batch for label, tokens in host_tokens.items()}
        return dataclasses.replace(
            host_batch,
            batch=dataclasses.replace(host_batch.batch, token_batches=token_batches),
            useful_tokens=host_batch.useful_tokens + sum(tokens.useful_tokens for tokens in host_tokens.values()),
            padded_tokens=host_batch.padded_tokens + sum(tokens.padded_tokens for tokens in host_tokens.values()),
            token_pairs=host_batch.token_pairs + sum(tokens.token_pairs for tokens in host_tokens.values()),
            examples=host_batch.examples + sum(tokens.examples for tokens in host_tokens.values()),
        )

    def _build_queries(self, step: int, ids: np.ndarray) -> HostBatch:
        """Build the queries and documents of a batch."""
        # Draw the examples of this process's shards.
        members = np.arange(len(ids)).reshape(self.shards.count, -1)[list(self.shards.local)].ravel()
        examples = self.sampler.sample(step, ids, members)
        # Tokenize and pack the texts.
        texts, prompts = self.sampler.list_padded_texts(examples)
        is_present = np.array([text is not None for text in texts])
        tokenized = self.sampler.tokenizer(*drop_absent(texts, prompts))
        packed, slots, sync = self._pack(tokenized, is_present)
        # Collect the metadata of each query for the losses.
        slots = slots.reshape(len(examples), -1)
        hashes = np.stack([_hash_or_zero(text) for text in texts]).reshape(len(examples), -1, 2)
        batch_sources, _ = self.sampler.index.locate(ids)
        source = batch_sources[members]
        batch = Batch(
            texts=packed,
            query_slot=slots[:, 0],
            doc_slot=slots[:, 1:],
            in_batch=np.array([self.sampler.sources[s].in_batch for s in source]),
            query_hash=hashes[:, 0],
            doc_hash=hashes[:, 1:],
            positive_hash=np.stack([self._hash_positives(example) for example in examples]),
            label=np.array([example.label for example in examples], np.int32),
            source=source.astype(np.int32),
            teacher_scores=self._stack_teacher_scores(examples),
            score=np.array([example.score for example in examples], np.float32),
            is_positive=np.array([example.is_positive for example in examples]),
            adapter=self._find_adapter(batch_sources) if self.adapters else None,
            guide=self._encode_frozen(self.guide, examples, texts),
            teacher=self._encode_frozen(self.teacher, examples, texts),
        )
        return HostBatch(
            batch=batch,
            useful_tokens=sync.useful_tokens,
            padded_tokens=packed.segment_ids.size // len(self.shards.local) * self.shards.count,
            token_pairs=sync.token_pairs,
            examples=len(ids),
            sources=np.unique(batch_sources).tolist(),
        )

    def _find_adapter(self, batch_sources: np.ndarray) -> np.ndarray:
        """Return the index of the adapter that the sources of a batch train.

        Raises:
            UserError: They train several adapters.
        """
        sources = [self.sampler.sources[s] for s in np.unique(batch_sources)]
        source_by_adapter = {source.config.adapter: source.name for source in sources}
        if len(source_by_adapter) > 1:
            names = ", ".join(f"{adapter} (source {name})" for adapter, name in source_by_adapter.items())
            raise UserError(f"batch: trains several adapters: {names} (expected one). Batch their sources separately.")
        return np.array(self.adapters.index(*source_by_adapter), np.int32)

    def _encode_frozen(
        self, encode: EncodeInputs | None, examples: Sequence[Example], texts: Sequence[str | None]
    ) -> FrozenVectors | None:
        """Encode the texts by a frozen model, each under its own instruction, without in-context examples."""
        if encode is None:
            return None
        documents = 1 + self.sampler.hard_negatives
        contexts = [
            [("query", example.instruction), *[("document", example.document_instruction)] * documents] for example in examples
        ]
        pairs = zip(texts, chain.from_iterable(contexts), strict=True)
        text_vectors = encode([EncoderInput(text, *context) for text, context in pairs if text is not None])
        vectors = np.zeros((len(examples), 1 + documents, text_vectors.shape[1]), np.float32)
        vectors[np.array([text is not None for text in texts]).reshape(vectors.shape[:2])] = text_vectors
        return FrozenVectors(vectors[:, 0], vectors[:, 1:])

    def _pack(self, tokenized: TokenizedTexts, is_present: np.ndarray) -> tuple[PackedTexts, np.ndarray, RowShapeSync]:
        """Pack the texts of each shard into its own rows, all of one shape.

        Args:
            tokenized: The texts that are present.
            is_present: Which texts of the batch these are, bool [B * (2+K)].

        Returns:
            The packed texts, the slot of each text of the batch (-1 if absent), and the counts of the whole batch.
        """
        local_shards = self.shards.local
        shard_of_text = np.repeat(local_shards, len(is_present) // len(local_shards))[is_present]
        packed, packing, sync = pack_batch(tokenized, shard_of_text, self.row_length, self.shards, self.channel)
        slots = np.full(len(is_present), -1, np.int32)
        slots[is_present] = packing.row * packed.segments + packing.segment
        return packed, slots, sync

    def _stack_teacher_scores(self, examples: Sequence[Example]) -> np.ndarray:
        scores = np.full((len(examples), 1 + self.sampler.hard_negatives), np.nan, np.float32)
        for row, example in zip(scores, examples, strict=True):
            row[: len(example.teacher_scores)] = example.teacher_scores
        return scores

    def _hash_positives(self, example: Example) -> np.ndarray:
        hashes = np.zeros((self._max_positives + 1, 2), np.uint32)
        for i, text in enumerate((*example.positives, example.query)):
            hashes[i] = hash_text(text)
        return hashes


def _hash_or_zero(text: str | None) -> np.ndarray:
    return np.zeros(2, np.uint32) if text is None else hash_text(text)
