"""From the plan to batches that wait in memory before the step needs them."""

from __future__ import annotations

from collections.abc import Iterator

import grain

from jaxembed.data.batch import BatchBuilder, HostBatch
from jaxembed.data.batch_plan import BatchPlan

PREFETCHED = 4  # batches built ahead, on a thread: tokenising releases the GIL


def batches(plan: BatchPlan, build: BatchBuilder, start: int, stop: int) -> Iterator[HostBatch]:
    """The batches of steps start to stop - 1, in order, built ahead of use."""
    built = grain.MapDataset.source(plan).map_with_index(build).slice(slice(start, stop))
    return iter(built.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)))
