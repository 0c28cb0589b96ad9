"""Run jobs in threads within a token budget. Results come in the order of the jobs, whichever finishes first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Job(NamedTuple, Generic[T]):
    """What a thread runs, and the most tokens that it may cost. It returns a result, and the tokens that it cost."""

    run: Callable[[], tuple[T, int]]
    max_tokens: int


class Budget:
    """A token budget for jobs. A job starts only if the budget covers it and all running jobs at their maximum cost.

    So the first job that does not start depends only on the cost of earlier jobs, not on their timing.
    """

    def __init__(self, tokens: int | None):
        """Start with this many tokens. None: no limit."""
        self.is_spent = False
        self._left = tokens
        self._reserved = 0
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> bool:
        """Wait until the tokens fit into the budget, and reserve them. Return False if they never will."""
        with self._changed:
            if self._left is None:
                return True
            while not self.is_spent and self._reserved + tokens > self._left:
                if not self._reserved:
                    self.is_spent = True
                else:
                    self._changed.wait()
            self._reserved += 0 if self.is_spent else tokens
            return not self.is_spent

    def settle(self, reserved: int, used_tokens: int) -> None:
        """Replace the reservation of a job by what it used."""
        with self._changed:
            if self._left is not None:
                self._reserved -= reserved
                self._left -= used_tokens
                self._changed.notify_all()


class Workers:
    """Context manager of threads that run jobs within a budget.

    At its end, it waits for all submitted jobs, so that the requests of a run do not depend on timing. After an error, jobs
    that have not started are dropped.
    """

    def __init__(self, threads: int, budget: Budget):
        """Start `threads` threads."""
        self.threads, self.budget = threads, budget
        self._pool = ThreadPoolExecutor(threads, "synthesize")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=error_type is None, cancel_futures=error_type is not None)

    def run_in_order(self, jobs: Iterable[Job[T]], window: Callable[[int], int]) -> Iterator[T]:
        """Yield the results of jobs, in their order. Stop early when the budget is spent.

        Args:
            jobs: The jobs. They are consumed only as far as needed.
            window: Returns the maximum number of jobs in progress, at least 1, given the number of results so far.
        """
        source: Iterator[Job[T]] | None = iter(jobs)
        running: deque[Future[T]] = deque()
        num_results = 0
        while True:
            # Fill the window, as far as the budget allows.
            while source is not None and len(running) < window(num_results):
                job = next(source, None)
                if job is None or not self.budget.reserve(job.max_tokens):
                    source = None
                else:
                    running.append(self._pool.submit(self._run, job))
            # Wait for the oldest job, so that results keep the order of the jobs.
            if not running:
                return
            num_results += 1
            yield running.popleft().result()

    def _run(self, job: Job[T]) -> T:
        used_tokens = 0
        try:
            result, used_tokens = job.run()
            return result
        finally:
            self.budget.settle(job.max_tokens, used_tokens)
