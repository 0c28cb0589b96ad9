"""Pack the texts of a batch: those of each shard into its own rows, which have one shape in all shards and processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxembed.data.packing import PackedTexts, Packing, compute_max_segments, fill_rows, pack_shards
from jaxembed.data.tokenize import TokenizedTexts
from jaxembed.devices.mesh import Shards
from jaxembed.devices.processes import Channel


def pack_batch(
    tokenized: TokenizedTexts, shard_of_text: np.ndarray, row_length: int, shards: Shards, channel: Channel
) -> tuple[PackedTexts, Packing, RowShapeSync]:
    """Pack the texts of each of this process's shards into its own rows.

    Args:
        tokenized: N texts.
        shard_of_text: Shard of each text, int [N].
        row_length: Maximum tokens of a row.
        shards: The shards of the batch, and which of them this process builds.
        channel: Connects the processes.

    Returns:
        The packed texts, the place of each text in its shard, and the token counts of the whole batch.
    """
    members = [np.flatnonzero(shard_of_text == shard) for shard in shards.local]
    # Pack all shards, of all processes, into rows of one shape.
    lengths = np.array([len(ids) for ids in tokenized.ids], np.int64)
    counted_lengths = lengths[np.isin(shard_of_text, shards.counted)]
    sync = RowShapeSync(channel, int(counted_lengths.sum()), int(np.square(counted_lengths).sum()))
    packings, shape = pack_shards([lengths[m] for m in members], row_length, sync.sync_rows)
    # Fill the rows, and note the place of each text.
    row, segment = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    parts = []
    for m, packing in zip(members, packings, strict=True):
        parts.append(fill_rows([tokenized.ids[i] for i in m], tokenized.pool_start[m], packing.row, packing.segment, shape))
        row[m], segment[m] = packing.row, packing.segment
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    packed = PackedTexts(**arrays, segments=compute_max_segments(shape[1]), shards=shards.count)
    return packed, Packing(row, segment, shape[0]), sync


@dataclasses.dataclass
class RowShapeSync:
    """Makes the processes that build one batch agree on its row shape, and sums their token counts.

    Every process must choose the same shape, but only knows the texts of its own shards. So each sends the rows that its
    fullest shard needs at each candidate row length, and all get the maximum at each length. They then choose the shape from
    the same row counts (`pack_shards`). The counts of tokens are in the same message.

    Attributes:
        channel: Connects the processes.
        useful_tokens: Tokens of this process's texts; after `sync_rows`, of all processes.
        token_pairs: Sum of the squared lengths of this process's texts; after `sync_rows`, of all processes.
    """

    channel: Channel
    useful_tokens: int
    token_pairs: int

    def sync_rows(self, needed: Iterator[int]) -> Iterator[int]:
        """Return the maximum over all processes of the rows needed at each candidate row length."""
        if self.channel.is_single_process:
            return needed
        message = np.array([self.useful_tokens, self.token_pairs, *needed]).tobytes()
        merged = self.channel.agree(message, merge_row_counts)
        self.useful_tokens, self.token_pairs, *rows = np.frombuffer(merged, np.int64).tolist()
        return iter(rows)


def merge_row_counts(messages: Sequence[bytes]) -> bytes:
    """Merge the messages of all processes: sum tokens and token pairs, and take the maximum of the rows at each row length.

    A process omits row lengths that its longest text exceeds, or that need too many rows. Row lengths that any
    process left out are dropped.
    """
    numbers = [np.frombuffer(message, np.int64).tolist() for message in messages]
    tokens, token_pairs, *rows_by_length = zip(*numbers, strict=False)
    return np.array([sum(tokens), sum(token_pairs), *map(max, rows_by_length)]).tobytes()
