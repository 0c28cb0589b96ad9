"""The data plan: which examples a step trains on, as a pure function of (seed, stage, step).

Index arithmetic mixes, shuffles, repeats and batches global example ids, a batch at a time. Nothing has state, so a cursor is
a stage and a step of it, the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence

import numpy as np

from jaxembed.config import BatchingConfig, MixtureConfig
from jaxembed.data.shuffle import key_of, permuted
from jaxembed.data.sources import Source
from jaxembed.errors import UserError

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, fill the unit interval evenly
CHUNK = 256  # steps whose counts are added up at once


class BatchPlan:
    """Element `step` holds the `batch_size` global ids of that step; it never ends.

    Global ids number the examples of all sources through; each source is shuffled anew every time it is used up. `mixture`
    says what share of the examples a source has, `batching` how those of one batch go together: blended (NV-Embed), of one
    source (SFR-Embedding-Mistral), or a part of them of one source (KaLM-Embedding, arXiv:2501.01028, section 2.2). Where
    sources train several adapters, a batch has examples of one's. `UserError` where a batch is larger than its data.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        stage: int = 0,
        batching: BatchingConfig | None = None,
        mixture: MixtureConfig | None = None,
    ):
        self.sources, self._batch_size, self._seed, self._stage = sources, batch_size, seed, stage
        self._batching, self._mixture = batching or BatchingConfig(), mixture or MixtureConfig()
        self._sizes = [len(source) for source in sources]
        self._starts = ExampleIndex(sources).starts
        shares = _shares(sources, self._sizes, self._mixture)
        adapters = list(dict.fromkeys(source.config.adapter for source in sources))
        self._members = [[i for i, s in enumerate(sources) if s.config.adapter == adapter] for adapter in adapters]
        self._alike = round(self._batching.of_one_source * batch_size)
        for adapter, members in zip(adapters, self._members, strict=True):
            self._check(f" of adapter {adapter}" if adapter else "", members)
        self._spread = spread(batch_size)
        self._groups = QuotaSchedule([shares[members].sum() for members in self._members], 1, self._start("groups"))
        self._ones = [QuotaSchedule(shares[members], 1, self._start("one", *members)) for members in self._members]
        rest = batch_size - self._alike
        self._blends = [QuotaSchedule(shares[members], rest, self._start("blend", *members)) for members in self._members]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> np.ndarray:
        batches, is_next = self._groups.at(step)
        group = int(is_next.argmax())
        used, counts = self._of_group(group, int(batches[group]))
        members = self._members[group]
        parts = [self._ids(members[i], int(used[i]), int(counts[i])) for i in np.flatnonzero(counts)]
        ids = np.concatenate(parts)
        return ids if len(parts) == 1 else ids[self._spread]

    def epochs(self, steps: int) -> list[float]:
        """How often so many steps use each source up."""
        used = np.zeros(len(self.sources))
        for group, batches in enumerate(self._groups.at(steps)[0]):
            used[self._members[group]], _ = self._of_group(group, int(batches))
        return [float(n / size) for n, size in zip(used, self._sizes, strict=True)]

    def _of_group(self, group: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """How many examples of each of a group's sources its earlier batches took, and this one takes."""
        (used, counts), (batches, is_next) = self._blends[group].at(batch), self._ones[group].at(batch)
        return used + self._alike * batches, counts + self._alike * is_next

    @property
    def hash(self) -> str:
        """Identifies the plan and the data under it: two equal hashes see the same examples at every step."""
        content = [[s.digest, len(s), s.config.model_dump(mode="json", exclude={"path", "name"})] for s in self.sources]
        chosen = [self._batching.model_dump(mode="json"), self._mixture.model_dump(mode="json")]
        return hashlib.sha256(json.dumps([content, chosen, self._batch_size, self._seed]).encode()).hexdigest()[:16]

    def _ids(self, source: int, used: int, count: int) -> np.ndarray:
        """The ids of the next `count` examples of a source of which `used` were taken before."""
        size, end, rows = self._sizes[source], used + count, []
        for epoch in range(used // size, (end - 1) // size + 1):
            first, last = max(used - epoch * size, 0), min(end - epoch * size, size)
            rows.append(permuted(np.arange(first, last), size, self._key(self._stage, source, epoch)))
        return self._starts[source] + np.concatenate(rows)

    def _key(self, *parts: int | str) -> bytes:
        return key_of(self._seed, *parts)

    def _start(self, *parts: int | str) -> float:
        return int.from_bytes(self._key(self._stage, *parts)[:4], "little") / 2**32

    def _check(self, of: str, members: Sequence[int]) -> None:
        total = sum(self._sizes[i] for i in members)
        if self._batch_size > total:
            told = f"train.batch_size is {self._batch_size}, but the sources{of} hold {total} examples; use at most that"
            raise UserError(told)
        least = min(members, key=lambda i: self._sizes[i])
        if self._alike > self._sizes[least]:
            raise UserError(
                f"data.batching.kind={self._batching.kind} takes {self._alike} examples of one source into a batch, but "
                f"{self.sources[least].name} holds {self._sizes[least]}; lower train.batch_size (--batch-size), or blend them"
            )


class QuotaSchedule:
    """How many of a step's `unit` items each of several parts gets, in proportion to `shares`.

    Systematic sampling: a comb of `unit` teeth, moved by a step's own offset, over intervals as long as the shares. A step's
    count is the exact one, rounded up or down; over many steps the roundings cancel.
    """

    def __init__(self, shares: Sequence[float] | np.ndarray, unit: int, start: float):
        edges = np.cumsum([0.0, *shares])
        self._edges = edges / edges[-1] * unit
        self._start = start
        self._sums = [np.zeros(len(edges) - 1, np.int64)]  # before every CHUNK-th step

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What all earlier steps got together, and what this one gets, int64 [parts]."""
        while len(self._sums) * CHUNK <= step:
            done = len(self._sums) * CHUNK
            self._sums.append(self._sums[-1] + self._of(np.arange(done - CHUNK, done)).sum(axis=0))
        whole = step // CHUNK
        counts = self._of(np.arange(whole * CHUNK, step + 1))
        return self._sums[whole] + counts[:-1].sum(axis=0), counts[-1]

    def _of(self, steps: np.ndarray) -> np.ndarray:
        offsets = (self._start + steps * GOLDEN) % 1.0
        return np.diff(np.floor(self._edges + offsets[:, None]), axis=1).astype(np.int64)


def spread(count: int) -> np.ndarray:
    """An order whose neighbours come from all over: shards take a batch in order, and each is to have some of all sources."""
    step = next(n for n in range(max(round(count * GOLDEN), 1), count + 2) if math.gcd(n, count) == 1)
    return np.arange(count) * step % count


def _shares(sources: Sequence[Source], sizes: Sequence[int], mixture: MixtureConfig) -> np.ndarray:
    """What a source's share of the examples is proportional to."""
    weights = np.array([source.config.weight for source in sources])
    return (weights * sizes if mixture.by == "size" else weights) ** (1 / mixture.temperature)


class ExampleIndex:
    """Which source a global id belongs to, and its index there."""

    def __init__(self, sources: Sequence[Source]):
        self.starts = np.cumsum([0, *map(len, sources)])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = np.searchsorted(self.starts, ids, side="right") - 1
        return source, ids - self.starts[source]
