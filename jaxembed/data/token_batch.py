"""Batches for token prediction: packed rows, and the hidden state that predicts each target token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from jaxembed.data.batch_plan import BatchPlan, ExampleIndex
from jaxembed.data.packing import PackedTexts, Packing, locate_tokens
from jaxembed.data.schema import Row
from jaxembed.data.shard_packing import pack_batch
from jaxembed.data.tokenize import TokenizedTexts
from jaxembed.devices.mesh import Shards
from jaxembed.devices.processes import Channel

NOT_PREDICTED = -1  # in `TokenText.targets`


class TokenText(NamedTuple):
    """The tokens of one text, and which of them are predicted.

    Attributes:
        tokens: Token ids as the model reads them, int32 [T].
        targets: Token that the hidden state at each position predicts, NOT_PREDICTED for none, int32 [T].
        context: Number of leading tokens that are context. Masks such as `prefix_lm` treat them like an instruction.
        weight: Weight of each predicted token.
        size: What the text adds to the size of its group. The losses of a group are summed, and divided by its size.
    """

    tokens: np.ndarray
    targets: np.ndarray
    context: int = 0
    weight: float = 1.0
    size: float = 0.0


# Rows of sources, and a generator for the draws of each -> their tokens.
ReadTokenTexts = Callable[[Sequence[Row], Sequence[np.random.Generator]], list[TokenText]]


@flax.struct.dataclass
class TokenBatch:
    """B texts of which some tokens are predicted, at most P in a shard.

    Arrays are shard-major: the first axis [n] of the predictions counts shards.

    Attributes:
        texts: The packed texts.
        position: Index of the predicting token in the concatenated rows of its shard, int32 [n, P].
        target: The token that it predicts, int32 [n, P].
        weight: Weight of the prediction, 0 for padding, float32 [n, P].
        text: Index of the text of the prediction in its shard, int32 [n, P].
        size: `TokenText.size` of each text, float32 [B].
    """

    texts: PackedTexts
    position: Any
    target: Any
    weight: Any
    text: Any
    size: Any


@dataclasses.dataclass(frozen=True)
class HostTokenBatch:
    """The part of a `TokenBatch` that belongs to this process's devices, in host memory, and counts of the whole batch.

    Attributes:
        batch: The shards of this process, one after the other.
        useful_tokens: Tokens of texts in the whole batch.
        padded_tokens: Tokens of all rows of the whole batch, padding included.
        token_pairs: Sum of the squared text lengths of the whole batch.
        examples: Texts of the whole batch.
    """

    batch: TokenBatch
    useful_tokens: int
    padded_tokens: int
    token_pairs: int
    examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBatchBuilder:
    """Builds the texts of one objective that predicts tokens. This is a pure function of the step.

    Attributes:
        plan: The texts of every step.
        read: Turns rows of the sources into tokens.
        row_length: Maximum tokens of a packed row.
        shards: The shards of a batch, and which of them this process builds.
        seed: Seed of the draws, together with step and id.
        step_offset: Steps of the stages before this one.
        channel: Connects the processes.
    """

    plan: BatchPlan
    read: ReadTokenTexts
    row_length: int
    shards: Shards
    seed: int
    step_offset: int = 0
    channel: Channel = dataclasses.field(default_factory=Channel)

    @cached_property
    def _index(self) -> ExampleIndex:
        return ExampleIndex(self.plan.sources)

    def __call__(self, step: int) -> HostTokenBatch:
        """Build the texts of a step of the stage."""
        # Read the texts of this process's shards.
        ids = self.plan[step]
        local_shards, texts_per_shard = list(self.shards.local), len(ids) // self.shards.count
        texts = self.read_texts(step, ids.reshape(self.shards.count, -1)[local_shards].ravel())
        # Pack them into rows.
        tokenized = TokenizedTexts([text.tokens for text in texts], np.array([text.context for text in texts], np.int64))
        shard_of_text = np.repeat(local_shards, texts_per_shard)
        packed, packing, sync = pack_batch(tokenized, shard_of_text, self.row_length, self.shards, self.channel)
        # List the predictions of each shard, padded to the same number on all shards of all processes.
        parts = [texts[start : start + texts_per_shard] for start in range(0, len(texts), texts_per_shard)]
        num_predictions = max(sum(int(np.sum(text.targets != NOT_PREDICTED)) for text in part) for part in parts)
        count = round_up_predictions(self._agree_on_maximum(num_predictions))
        predictions = [
            _list_predictions(
                part, _slice_packing(packing, i * texts_per_shard, texts_per_shard), packed.tokens.shape[1], count
            )
            for i, part in enumerate(parts)
        ]
        arrays = {name: np.stack([prediction[name] for prediction in predictions]) for name in predictions[0]}
        size = np.array([text.size for text in texts], np.float32)
        return HostTokenBatch(
            batch=TokenBatch(texts=packed, size=size, **arrays),
            useful_tokens=sync.useful_tokens,
            padded_tokens=packed.segment_ids.size // len(local_shards) * self.shards.count,
            token_pairs=sync.token_pairs,
            examples=len(ids),
        )

    def read_texts(self, step: int, ids: np.ndarray) -> list[TokenText]:
        """Return the texts with the given global ids, as a step reads them."""
        rows = [self.plan.sources[s].read_row(int(i)) for s, i in zip(*self._index.locate(ids), strict=True)]
        return self.read(rows, [np.random.default_rng((self.seed, self.step_offset + step, int(id_))) for id_ in ids])

    def _agree_on_maximum(self, number: int) -> int:
        """Return the maximum of a number over all processes."""
        if self.channel.is_single_process:
            return number
        merged = self.channel.agree(np.int64(number).tobytes(), take_largest_message)
        return int(np.frombuffer(merged, np.int64)[0])


def round_up_predictions(count: int) -> int:
    """Return the smallest allowed number of predictions that is at least `count`: 4, 5, 6 or 7 times a power of two.

    So above 4 predictions at most a fifth is padding. Few programs are compiled, because most steps round to the same number.
    """
    unit = 1
    while 7 * unit < count:
        unit *= 2
    return max(4, -(-count // unit)) * unit


def take_largest_message(messages: Sequence[bytes]) -> bytes:
    """Return the message with the largest int64."""
    return max(messages, key=lambda message: int(np.frombuffer(message, np.int64)[0]))


def _slice_packing(packing: Packing, start: int, count: int) -> Packing:
    return Packing(packing.row[start : start + count], packing.segment[start : start + count], packing.row_count)


def _list_predictions(texts: Sequence[TokenText], packing: Packing, row_length: int, count: int) -> Mapping[str, np.ndarray]:
    """Return the arrays of a shard's predictions by their names in `TokenBatch`, [P] each, padded to `count`."""
    lengths = np.array([len(text.tokens) for text in texts], np.int64)
    index, _ = locate_tokens(lengths, packing.row, packing.segment, row_length)
    targets = np.concatenate([text.targets for text in texts])
    text_of_token = np.repeat(np.arange(len(texts)), lengths)
    predicted_indices = np.flatnonzero(targets != NOT_PREDICTED)
    weights = np.array([text.weight for text in texts], np.float32)
    arrays = {
        "position": index[predicted_indices].astype(np.int32),
        "target": targets[predicted_indices].astype(np.int32),
        "weight": weights[text_of_token[predicted_indices]],
        "text": text_of_token[predicted_indices].astype(np.int32),
    }
    return {name: np.pad(array, (0, count - len(predicted_indices))) for name, array in arrays.items()}
