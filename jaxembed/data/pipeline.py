"""Build batches ahead of the steps that need them."""

from __future__ import annotations

from collections.abc import Iterator

import grain

from jaxembed.data.batch import BatchBuilder, HostBatch
from jaxembed.data.batch_plan import BatchPlan

PREFETCH_BATCHES = 4  # built ahead in one thread, which is enough because tokenization releases the GIL


def iter_batches(plan: BatchPlan, batch_builder: BatchBuilder, start: int, stop: int) -> Iterator[HostBatch]:
    """Iterate over the batches of steps `start` to `stop - 1`, in order, built ahead of use."""
    batches = grain.MapDataset.source(plan).map_with_index(batch_builder).slice(slice(start, stop))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)))
