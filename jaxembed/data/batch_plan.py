"""The data plan: the examples of every step, as a pure function of (seed, stage, step).

Index arithmetic mixes, shuffles, repeats and batches global example ids, one batch at a time. Nothing has state, so a
cursor is a stage and a step in it, the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from jaxembed.config import BatchingConfig, MixtureConfig
from jaxembed.data.shuffle import make_key, permute_indices
from jaxembed.data.sources import Source
from jaxembed.errors import UserError

GOLDEN_RATIO_CONJUGATE = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, fill the unit interval evenly
KEYS_NEWER_THAN_HASH = frozenset(
    {"graded", "score_range", "label_scores"}
)  # keys of sources that are newer than the hash of a plan
STEPS_PER_CHUNK = 256  # steps whose counts are summed at once


class BatchPlan:
    """An endless sequence: element `step` holds the global ids of that step, int64 [batch_size]; none without sources.

    Global ids number the examples of all sources consecutively. Each source is shuffled again in every epoch, which ends when
    all its examples are used.

    How a batch is composed:

    1. Sources are grouped by the adapter that they train. A batch has examples of one group. Without adapters there is one.
    2. A fixed number of its examples comes from one source of the group: none (blended, as NV-Embed), all (homogeneous, as
       SFR-Embedding-Mistral), or a part (semi-homogeneous: KaLM-Embedding, arXiv:2501.01028, section 2.2).
    3. The remaining examples are blended from all sources of the group in proportion to their shares.

    `QuotaSchedule`s choose the group of a step, its single source, and its number of blended examples of each source. They also
    give the totals of all earlier steps, and so the position at which each source continues.
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
        """Plan the batches of a stage.

        Args:
            sources: Sources of the stage.
            batch_size: Examples of a batch.
            seed: Seed of the run.
            stage: Index of the stage.
            batching: How a batch is composed. Default: blended.
            mixture: How to compute the shares of the sources from weights and sizes. Default: the weights are the shares.

        Raises:
            UserError: A batch needs more examples than its sources have.
        """
        self.sources, self._batch_size, self._seed, self._stage = sources, batch_size, seed, stage
        self._batching, self._mixture = batching or BatchingConfig(), mixture or MixtureConfig()
        self._sizes = [len(source) for source in sources]
        self._first_ids = ExampleIndex(sources).first_ids
        # Group the sources by adapter.
        adapters = list(dict.fromkeys(source.config.adapter for source in sources))
        self._groups = [[i for i, s in enumerate(sources) if s.config.adapter == adapter] for adapter in adapters]
        # Split each batch into examples of a single source and blended ones.
        self._single_source_size = round(self._batching.single_source_share * batch_size)
        blended_size = batch_size - self._single_source_size
        for adapter, group in zip(adapters, self._groups, strict=True):
            self._check_sizes(f" of adapter {adapter}" if adapter else "", group)
        # Schedule the group of each step, and for each group its single sources and its blends.
        shares = _compute_shares(sources, self._sizes, self._mixture)
        self._group_schedule = QuotaSchedule([shares[g].sum() for g in self._groups], 1, self._draw_start("groups"))
        self._single_schedules = [QuotaSchedule(shares[g], 1, self._draw_start("one", *g)) for g in self._groups]
        self._blend_schedules = [QuotaSchedule(shares[g], blended_size, self._draw_start("blend", *g)) for g in self._groups]
        self._interleaving = make_interleaving(batch_size)
        self._hash = self._compute_hash()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> np.ndarray:
        if not self.sources:
            return np.zeros(0, np.int64)
        # Find the group of this step, and the number of earlier batches of that group.
        group_batches, is_chosen = self._group_schedule.at(step)
        group = int(is_chosen.argmax())
        # Take the next ids of each source in this batch.
        num_used, counts = self._count_examples(group, int(group_batches[group]))
        members = self._groups[group]
        parts = [self._take_ids(members[i], int(num_used[i]), int(counts[i])) for i in np.flatnonzero(counts)]
        ids = np.concatenate(parts)
        # Interleave the sources, so that each shard gets a similar mix.
        return ids if len(parts) == 1 else ids[self._interleaving]

    def count_epochs(self, steps: int) -> list[float]:
        """Return the number of epochs of each source in the first `steps` steps."""
        num_used = np.zeros(len(self.sources))
        for group, batches in enumerate(self._group_schedule.at(steps)[0]):
            num_used[self._groups[group]], _ = self._count_examples(group, int(batches))
        return [float(n / size) for n, size in zip(num_used, self._sizes, strict=True)]

    def _count_examples(self, group: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Count the examples of each source of a group in its batches before number `batch`, and in that batch."""
        num_used, counts = self._blend_schedules[group].at(batch)
        single_batches, is_chosen = self._single_schedules[group].at(batch)
        return num_used + self._single_source_size * single_batches, counts + self._single_source_size * is_chosen

    @property
    def hash(self) -> str:
        """Hash of the plan and its data. Plans with equal hashes have the same examples at every step (`_compute_hash`)."""
        return self._hash

    def with_sources(self, sources: Sequence[Source]) -> BatchPlan:
        """Return the plan for mined versions of its sources, which may have fewer examples.

        It keeps the hash of this plan, because a resumed run compares the hash before it reads the mined rows.

        Raises:
            UserError: A batch needs more examples than the sources have.
        """
        plan = BatchPlan(sources, self._batch_size, self._seed, self._stage, self._batching, self._mixture)
        plan._hash = self._hash
        return plan

    def _compute_hash(self) -> str:
        """Return the hash of all that determines the plan: the sources, batching, mixture, batch size and seed.

        A source counts by its digest, its number of examples and its keys. Three kinds of keys are left out:

        - Keys that do not change the examples.
        - Keys that the digest (split) or the number of examples (equality) covers. A change of `equality` that keeps this
          number is not noticed.
        - Keys of `KEYS_NEWER_THAN_HASH` with their default: the hash of a run of an earlier version does not have them.
        """
        ignored = {"catalog", "path", "name", "split", "equality"}
        content = []
        for source in self.sources:
            keys = source.config.model_dump(mode="json", exclude=ignored)
            keys = {key: value for key, value in keys.items() if value or key not in KEYS_NEWER_THAN_HASH}
            content.append([source.digest, len(source), keys])
        configs = [self._batching.model_dump(mode="json"), self._mixture.model_dump(mode="json")]
        return hashlib.sha256(json.dumps([content, configs, self._batch_size, self._seed]).encode()).hexdigest()[:16]

    def _take_ids(self, source: int, num_used: int, count: int) -> np.ndarray:
        """Return the ids of the next `count` examples of a source after the first `num_used` ones."""
        size, end, indices = self._sizes[source], num_used + count, []
        # The range may span several epochs, each with its own permutation.
        for epoch in range(num_used // size, (end - 1) // size + 1):
            first, last = max(num_used - epoch * size, 0), min(end - epoch * size, size)
            indices.append(permute_indices(np.arange(first, last), size, self._make_key(self._stage, source, epoch)))
        return self._first_ids[source] + np.concatenate(indices)

    def _make_key(self, *parts: int | str) -> bytes:
        return make_key(self._seed, *parts)

    def _draw_start(self, *parts: int | str) -> float:
        """Draw the start of a schedule from [0, 1)."""
        return int.from_bytes(self._make_key(self._stage, *parts)[:4], "little") / 2**32

    def _check_sizes(self, owner: str, group: Sequence[int]) -> None:
        """Raise `UserError` if a group, or one of its sources, has fewer examples than a batch takes from it."""
        total = sum(self._sizes[i] for i in group)
        if self._batch_size > total:
            raise UserError(
                f"train.batch_size: {self._batch_size} is more than the examples of the sources{owner} ({total}). "
                f"Use at most {total}."
            )
        smallest = min(group, key=lambda i: self._sizes[i])
        if self._single_source_size > self._sizes[smallest]:
            raise UserError(
                f"data.batching.kind: {self._batching.kind} takes {self._single_source_size} examples of one source into a "
                f"batch, but {self.sources[smallest].name} has {self._sizes[smallest]}. Lower train.batch_size (--batch-size), "
                "or set data.batching.kind=blended."
            )


class QuotaSchedule:
    """Divides the items of every step among parts, in proportion to `shares`.

    This is systematic sampling. The parts are adjacent intervals of [0, items_per_step], with lengths in proportion to their
    shares. In
    each step a grid of points, one apart, is shifted by the offset of that step, and a part gets the points in its interval.
    So the count of a step is the exact quota, rounded up or down. The offsets are multiples of the golden ratio's conjugate,
    modulo 1. They are spread evenly, so that the roundings cancel over many steps.
    """

    def __init__(self, shares: Sequence[float] | np.ndarray, items_per_step: int, start: float):
        """Create a schedule.

        Args:
            shares: Share of each part, up to a common factor.
            items_per_step: Items of a step.
            start: Offset of step 0, in [0, 1).
        """
        edges = np.cumsum([0.0, *shares])
        self._edges = edges / (edges[-1] or 1) * items_per_step
        self._start = start
        self._chunk_totals = [np.zeros(len(edges) - 1, np.int64)]  # totals before every chunk of steps

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the total of each part before `step`, and its count at `step`, both int64 [parts]."""
        # Extend the cached totals up to the chunk of this step.
        while len(self._chunk_totals) * STEPS_PER_CHUNK <= step:
            end = len(self._chunk_totals) * STEPS_PER_CHUNK
            counts = self._count(np.arange(end - STEPS_PER_CHUNK, end))
            self._chunk_totals.append(self._chunk_totals[-1] + counts.sum(axis=0))
        # Add the earlier steps of the chunk.
        chunk = step // STEPS_PER_CHUNK
        counts = self._count(np.arange(chunk * STEPS_PER_CHUNK, step + 1))
        return self._chunk_totals[chunk] + counts[:-1].sum(axis=0), counts[-1]

    def _count(self, steps: np.ndarray) -> np.ndarray:
        """Return the count of each part at each step, int64 [steps, parts]."""
        offsets = (self._start + steps * GOLDEN_RATIO_CONJUGATE) % 1.0
        # The grid points inside an interval are the integers between its shifted edges.
        return np.diff(np.floor(self._edges + offsets[:, None]), axis=1).astype(np.int64)


def list_sources(plans: Iterable[BatchPlan]) -> list[Source]:
    """Return the sources of plans, each once."""
    return list({source.name: source for plan in plans for source in plan.sources}.values())


def make_interleaving(count: int) -> np.ndarray:
    """Return a permutation of `count` positions that spreads neighbors evenly, int64 [count].

    Shards take the examples of a batch in order, and each should get some of every source. The permutation visits every n-th
    position modulo `count`, where n is about `count` times the golden ratio's conjugate, and coprime with `count`.
    """
    first = max(round(count * GOLDEN_RATIO_CONJUGATE), 1)
    step = next(n for n in range(first, count + 2) if math.gcd(n, count) == 1)
    return np.arange(count) * step % count


def _compute_shares(sources: Sequence[Source], sizes: Sequence[int], mixture: MixtureConfig) -> np.ndarray:
    """Return the share of each source in the examples, up to a common factor, float64 [sources]."""
    weights = np.array([source.config.weight for source in sources])
    return (weights * sizes if mixture.by == "size" else weights) ** (1 / mixture.temperature)


class ExampleIndex:
    """Maps global ids to sources.

    Attributes:
        first_ids: First id of each source, and the number of all ids, int64 [sources + 1].
    """

    def __init__(self, sources: Sequence[Source]):
        self.first_ids = np.cumsum([0, *map(len, sources)])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each id, and the index of its example there."""
        source = np.searchsorted(self.first_ids, ids, side="right") - 1
        return source, ids - self.first_ids[source]
