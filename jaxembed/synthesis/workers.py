"""Jobs that run in threads. Their results come in the order of the jobs, whatever finishes first, within a budget of tokens."""

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
    """Tokens that jobs may cost. A job starts only if everything that runs at its maximum leaves room for it.

    Which job is the first that does not start depends on what earlier ones have cost, not on when they finish.
    """

    def __init__(self, tokens: int | None):
        """Start with this many tokens. None: no limit."""
        self.is_spent = False
        self._left = tokens
        self._reserved = 0
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> bool:
        """Reserve tokens for a job, once running jobs leave room for it. Return False if they do not when all have finished."""
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

    def settle(self, reserved: int, used: int) -> None:
        """Replace the reservation of a job by what it used."""
        with self._changed:
            if self._left is not None:
                self._reserved -= reserved
                self._left -= used
                self._changed.notify_all()


class Workers:
    """Threads that run jobs within a budget. It is a context manager; at its end, jobs that have not started are dropped."""

    def __init__(self, threads: int, budget: Budget):
        """Start `threads` threads."""
        self.threads, self.budget = threads, budget
        self._pool = ThreadPoolExecutor(threads, "synthesize")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run_in_order(self, jobs: Iterable[Job[T]], window: Callable[[int], int]) -> Iterator[T]:
        """Yield the results of jobs, in their order. It ends early when the budget is spent.

        Args:
            jobs: The jobs. They are taken only as far as needed.
            window: Returns the most jobs to have at once, at least 1, given how many results were taken.
        """
        source: Iterator[Job[T]] | None = iter(jobs)
        running: deque[tuple[Job[T], Future[T]]] = deque()
        taken = 0
        try:
            while True:
                while source is not None and len(running) < window(taken):
                    job = next(source, None)
                    if job is None or not self.budget.reserve(job.max_tokens):
                        source = None
                    else:
                        running.append((job, self._pool.submit(self._run, job)))
                if not running:
                    return
                taken += 1
                yield running.popleft()[1].result()
        finally:
            for job, future in running:
                if future.cancel():
                    self.budget.settle(job.max_tokens, 0)

    def _run(self, job: Job[T]) -> T:
        used = 0
        try:
            result, used = job.run()
            return result
        finally:
            self.budget.settle(job.max_tokens, used)
