"""Steps that a Ray cluster applies to batches of rows.

Results come in the order of the batches, so the output equals that of a single process. Ray's actors are used directly: Ray
Data would store the rows in its own blocks, and the order of blocks that arrive depends on timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from jaxembed.curation.batches import BatchOutcomes, BatchResults, RowBatch, run_steps
from jaxembed.curation.steps.curated_row import RowStep
from jaxembed.devices.ray_cluster import RayCluster

BATCHES_PER_WORKER = 2  # one that is processed, and one that waits


class StepWorker:
    """Applies steps to batches, in a process of the cluster."""

    def __init__(self, functions: Sequence[RowStep]):
        """Keep the functions of the steps."""
        self._functions = functions

    def run(self, batch: RowBatch) -> BatchOutcomes:
        """Return the outcomes of each step (`batches.run_steps`)."""
        return run_steps(self._functions, batch)


def map_batches_with_ray(cluster: RayCluster, functions: Sequence[RowStep], batches: Iterable[RowBatch]) -> BatchResults:
    """Yield each batch with the outcomes of its steps (`batches.run_steps`), in the order of the batches.

    Raises:
        UserError: The worker of a batch ended too often, or failed, for example because memory ran out.
    """
    workers = cluster.start_workers(StepWorker, cluster.ray.put(functions))
    running: deque[tuple[RowBatch, Any]] = deque()

    def wait() -> tuple[RowBatch, BatchOutcomes]:
        batch, result = running.popleft()
        return batch, cluster.wait(result, f"rows {batch[0].number} to {batch[-1].number}")

    for i, batch in enumerate(batches):
        running.append((batch, workers[i % len(workers)].run.remote(batch)))
        if len(running) >= BATCHES_PER_WORKER * len(workers):
            yield wait()
    while running:
        yield wait()
