"""The data plan: which examples a step trains on, as a pure function of (seed, stage, step).

Grain's index arithmetic mixes, shuffles, repeats and batches global example ids. Nothing has state, so a cursor is a
stage and a step of it, the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import grain
import numpy as np

from jaxembed.data.sources import Source
from jaxembed.errors import UserError


def make_plan(sources: Sequence[Source], batch_size: int, seed: int, stage: int = 0) -> grain.MapDataset[np.ndarray]:
    """Element `step` holds the `batch_size` global ids of that step; it never ends. Sources mix by their weights.

    Global ids number the examples of all sources through; each source is shuffled anew every time it is used up. Where the
    sources train several adapters, those of each are mixed to batches of their own, and the batches by the weights' sums.
    """
    members: dict[str, list[grain.MapDataset[int]]] = {}
    start = 0
    for i, source in enumerate(sources):
        ids = grain.MapDataset.range(start, start + len(source)).seed(stage * 10**15 + seed * 1000 + i)
        members.setdefault(source.config.adapter, []).append(ids.shuffle().repeat())
        start += len(source)
    plans, shares = [], []
    for adapter, datasets in members.items():
        own = [source for source in sources if source.config.adapter == adapter]
        total, weights = sum(len(source) for source in own), [source.config.weight for source in own]
        if batch_size > total:
            of = f" of adapter {adapter}" if adapter else ""
            raise UserError(f"train.batch_size is {batch_size}, but the sources{of} hold {total} examples; use at most that")
        plans.append(grain.MapDataset.mix(datasets, weights=weights).batch(batch_size))
        shares.append(sum(weights))
    return plans[0] if len(plans) == 1 else grain.MapDataset.mix(plans, weights=shares)


def plan_hash(sources: Sequence[Source], batch_size: int, seed: int) -> str:
    """Identifies a plan and the data under it: two equal hashes see the same examples at every step."""
    content = [[s.digest, len(s), s.config.model_dump(mode="json", exclude={"path", "name"})] for s in sources]
    return hashlib.sha256(json.dumps([content, batch_size, seed]).encode()).hexdigest()[:16]


class ExampleIndex:
    """Which source a global id belongs to, and its index there."""

    def __init__(self, sources: Sequence[Source]):
        self._starts = np.cumsum([0, *(len(source) for source in sources)])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = np.searchsorted(self._starts, ids, side="right") - 1
        return source, ids - self._starts[source]
