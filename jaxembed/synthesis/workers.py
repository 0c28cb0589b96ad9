"""Run jobs in threads within a token budget. Results come in the order of the jobs, whichever finishes first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Job(NamedTuple, Generic[T]):
    """Work for a thread.

    Attributes:
        run: The work. It returns a result, and the number of tokens that it used.
        reserved_tokens: Tokens to reserve from the budget while the job runs: the most that it may use.
    """

    run: Callable[[], tuple[T, int]]
    reserved_tokens: int


class TokenBudget:
    """A token budget for jobs. A job starts only if the budget covers it and all running jobs at their maximum cost.

    So the first job that does not start depends only on the cost of earlier jobs, not on their timing.
    """

    def __init__(self, tokens: int | None):
        """Start with this many tokens. None: no limit."""
        self.is_spent = False
        self._remaining_tokens = tokens
        self._reserved_tokens = 0
        self._condition = threading.Condition()

    def reserve(self, tokens: int) -> bool:
        """Wait until the tokens fit into the budget, and reserve them. Return False if they never will."""
        with self._condition:
            if self._remaining_tokens is None:
                return True
            while not self.is_spent and self._reserved_tokens + tokens > self._remaining_tokens:
                if not self._reserved_tokens:
                    self.is_spent = True
                else:
                    self._condition.wait()
            self._reserved_tokens += 0 if self.is_spent else tokens
            return not self.is_spent

    def settle(self, reserved_tokens: int, used_tokens: int) -> None:
        """Replace the reservation of a job by the tokens that it used."""
        with self._condition:
            if self._remaining_tokens is not None:
                self._reserved_tokens -= reserved_tokens
                self._remaining_tokens -= used_tokens
                self._condition.notify_all()


class Workers:
    """Context manager of threads that run jobs within a budget.

    At its end, it waits for all submitted jobs, so that the requests of a run do not depend on timing. After an error, jobs
    that have not started are dropped.
    """

    def __init__(self, threads: int, budget: TokenBudget):
        """Start `threads` threads."""
        self.threads, self.budget = threads, budget
        self._pool = ThreadPoolExecutor(threads, "synthesize")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=error_type is None, cancel_futures=error_type is not None)

    def run_in_order(self, jobs: Iterable[Job[T]], get_max_in_progress: Callable[[int], int]) -> Iterator[T]:
        """Yield the results of jobs, in their order. Stop early when the budget is spent.

        Args:
            jobs: The jobs. They are consumed only as far as needed.
            get_max_in_progress: Returns how many jobs may be in progress at once, at least 1, given the number of results
                so far.
        """
        remaining_jobs: Iterator[Job[T]] | None = iter(jobs)
        in_progress: deque[Future[T]] = deque()
        num_results = 0
        while True:
            # Start as many jobs as may be in progress, as far as the budget allows.
            while remaining_jobs is not None and len(in_progress) < get_max_in_progress(num_results):
                job = next(remaining_jobs, None)
                if job is None or not self.budget.reserve(job.reserved_tokens):
                    remaining_jobs = None
                else:
                    in_progress.append(self._pool.submit(self._run, job))
            # Wait for the oldest job, so that results keep the order of the jobs.
            if not in_progress:
                return
            num_results += 1
            yield in_progress.popleft().result()

    def _run(self, job: Job[T]) -> T:
        used_tokens = 0
        try:
            result, used_tokens = job.run()
            return result
        finally:
            self.budget.settle(job.reserved_tokens, used_tokens)
