"""Workers of a Ray cluster that apply steps to batches of rows.

Results come in the order of the batches, so the output equals that of a single process. Ray's actors are used directly: Ray
Data would store the rows in its own blocks, and the order of blocks that arrive depends on timing.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from jaxembed.curation.batches import BatchOutcomes, BatchResults, RowBatch, run_steps
from jaxembed.curation.steps.curated_row import RowStep
from jaxembed.errors import UserError, summarize

LOCAL_ADDRESS = "local"
MAX_RETRIES = 2  # of a batch whose worker ended
BATCHES_PER_WORKER = 2  # one that is processed, and one that waits


class RayWorkers:
    """A connection to a Ray cluster. It is a context manager."""

    def __init__(self, address: str, num_workers: int | None):
        """Connect to a cluster, or start one.

        Args:
            address: Address of a cluster; `local` starts one on this machine, which ends with the connection.
            num_workers: Number of workers. None: one for each processor of the cluster.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        self._ray = _import_ray()
        # Functions of the user are imported by the workers too.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}}
        options: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False} if address == LOCAL_ADDRESS else {}
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray {address}: cannot be reached ({summarize(error)}). Start a cluster with ray start --head, or leave the "
                "address out."
            ) from None
        self._num_workers = num_workers or max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()

    def map_batches(self, functions: Sequence[RowStep], batches: Iterable[RowBatch]) -> BatchResults:
        """Yield each batch with the outcomes of its steps (`batches.run_steps`), in the order of the batches.

        A batch whose worker ended is processed again by a new worker.

        Raises:
            UserError: The worker of a batch ended `MAX_RETRIES` + 1 times, or failed, for example because memory ran out.
        """
        actor = self._ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=MAX_RETRIES)(StepWorker)
        stored = self._ray.put(functions)
        workers = [actor.remote(stored) for _ in range(self._num_workers)]
        running: deque[tuple[RowBatch, Any]] = deque()
        for i, batch in enumerate(batches):
            running.append((batch, workers[i % len(workers)].run.remote(batch)))
            if len(running) >= BATCHES_PER_WORKER * len(workers):
                yield self._wait(*running.popleft())
        while running:
            yield self._wait(*running.popleft())

    def _wait(self, batch: RowBatch, result: Any) -> tuple[RowBatch, BatchOutcomes]:
        """Return a batch with its outcomes once a worker has them. `result` is Ray's reference to them."""
        try:
            return batch, self._ray.get(result)
        except self._ray.exceptions.RayActorError as error:
            if missing := re.search(r"No module named '[^']*'", str(error)):
                raise UserError(
                    f"--ray: a worker cannot load the steps ({missing[0]}). Install it on every machine of the cluster."
                ) from None
            raise self._make_error(batch, f"the workers ended {MAX_RETRIES + 1} times") from None
        except self._ray.exceptions.RayError as error:
            raise self._make_error(batch, f"a worker failed ({summarize(getattr(error, 'cause', None) or error)})") from None

    def _make_error(self, batch: RowBatch, problem: str) -> UserError:
        rows = f"rows {batch[0].number} to {batch[-1].number}"
        return UserError(f"--ray: {rows}: {problem}. Run the same command without --ray, which shows why.")


class StepWorker:
    """Applies steps to batches, in a process of the cluster."""

    def __init__(self, functions: Sequence[RowStep]):
        """Keep the functions of the steps."""
        self._functions = functions

    def run(self, batch: RowBatch) -> BatchOutcomes:
        """Return the outcomes of each step (`batches.run_steps`)."""
        return run_steps(self._functions, batch)


def _import_ray() -> Any:
    """Return Ray, with its usage reports and its log of ended workers turned off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs ray, which is not installed. Run pip install '.[ray]'.") from None
    return ray
