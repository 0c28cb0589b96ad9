"""A running task: its steps as one stream of drafts, and the rows that are accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxembed.config.synthesis import TaskConfig
from jaxembed.config.synthesis_steps import (
    AnySynthesisStep,
    AskStepConfig,
    FilterStepConfig,
    RetrieveStepConfig,
    RoundTripStepConfig,
)
from jaxembed.synthesis.acceptance import AcceptedRow, KnownQueries, RowRules
from jaxembed.synthesis.answers import AnswerReader
from jaxembed.synthesis.client import LlmClient
from jaxembed.synthesis.drafts import Draft, make_rng
from jaxembed.synthesis.inputs import InputRows, read_values
from jaxembed.synthesis.novelty import find_language_code, find_language_problem, open_language_identifier
from jaxembed.synthesis.ranking import RankStep
from jaxembed.synthesis.report import RowSamples
from jaxembed.synthesis.retrieval import DocumentIndex, RetrieveStep, RoundTripStep
from jaxembed.synthesis.steps import AskStep, FilterStep, Step, TaskContext
from jaxembed.synthesis.workers import Workers


class Indexes:
    """The indexes of all inputs. Steps that search the same documents in the same way share an index."""

    def __init__(self, inputs: Mapping[str, InputRows]):
        """Start without an index."""
        self._inputs = inputs
        self._indexes: dict[tuple[str, str], DocumentIndex] = {}

    def get(self, name: str, by: str) -> DocumentIndex:
        """Return the index of an input. Raise `UserError` if a row has no text."""
        if (name, by) not in self._indexes:
            self._indexes[name, by] = DocumentIndex(name, self._inputs[name], by)
        return self._indexes[name, by]


class TaskInputs(NamedTuple):
    """Inputs that the tasks of a recipe share.

    Attributes:
        rows: Rows of the inputs.
        indexes: Their searchable documents.
        known: Queries of earlier rows.
        recipe: File of the recipe. Relative paths are also looked up next to it.
    """

    rows: Mapping[str, InputRows]
    indexes: Indexes
    known: KnownQueries
    recipe: Path


class TaskRun:
    """A running task.

    Attributes:
        config: The section of the task.
        target: Rows to write; None for all.
        rules: Decides which rows are accepted.
        steps: The steps.
        samples: Counts and samples of the accepted rows.
    """

    def __init__(self, config: TaskConfig, target: int | None, seed: int, inputs: TaskInputs):
        """Prepare the rules. `connect` builds the steps.

        Args:
            config: The section of the task.
            target: Rows to write; None for all.
            seed: Seed of all draws.
            inputs: Inputs that all tasks share.
        """
        self.config, self.target = config, target
        self.rules = RowRules(config, inputs.known, target)
        self.samples = RowSamples(seed)
        self.steps: list[Step] = []
        self._seed, self._inputs, self._indexes = seed, inputs.rows, inputs.indexes
        ask_steps = [step for step in config.steps if isinstance(step, AskStepConfig)]
        self.values = {step.name: read_values(step, inputs.recipe) for step in ask_steps}
        if any(rule.language for step in ask_steps for rule in (*step.answer.fields.values(), step.answer.items)):
            open_language_identifier()  # fails early if a library is missing
            find_language_code("")

    @property
    def is_full(self) -> bool:
        """Whether the task has all its rows."""
        return self.target is not None and self.samples.num_rows >= self.target

    @property
    def progress(self) -> float:
        """(Accepted rows + 1) / weight. The task with the smallest value goes next."""
        return (self.samples.num_rows + 1) / self.config.weight

    def connect(self, client: LlmClient, workers: Workers, show_progress: Callable[[], None]) -> None:
        """Build the steps and chain them into one stream of rows."""
        context = TaskContext(self._seed, client, workers, lambda: self._window(workers.threads), show_progress)
        self.steps = [self._make_step(step, context) for step in self.config.steps]
        self._rows = self._iter_rows()

    def take_row(self) -> AcceptedRow | None:
        """Return the next row, or None if there are no more."""
        return None if self.is_full else next(self._rows, None)

    def _window(self, threads: int) -> int:
        """Return the maximum number of drafts in progress in a step: no more than the missing rows."""
        missing = threads if self.target is None else self.target - self.samples.num_rows
        return max(min(threads, missing), 1)

    def _iter_rows(self) -> Iterator[AcceptedRow]:
        drafts = self.start_drafts()
        for step in self.steps:
            drafts = step.run(drafts)
        for draft in drafts:
            if accepted_row := self.rules.check(draft):
                self.samples.add(accepted_row.row)
                yield accepted_row
        for step in self.steps:
            if isinstance(step, AskStep):
                step.raise_if_all_too_long()

    def start_drafts(self) -> Iterator[Draft]:
        """Yield the drafts of the first step: a number for each request, or the rows of an input in random order."""
        first = self.config.first
        if not first.per:
            yield from (Draft((self.config.name, i), {}) for i in range(first.requests or 0))
            return
        rows = self._inputs[first.per]
        for i in make_rng(self._seed, (self.config.name, first.per)).permutation(len(rows)).tolist():
            yield Draft((self.config.name, i), {first.per: rows[i]})

    def _make_step(self, config: AnySynthesisStep, context: TaskContext) -> Step:
        if isinstance(config, AskStepConfig):
            return AskStep(config, context, AnswerReader(config.answer, find_language_problem), self.values[config.name])
        if isinstance(config, FilterStepConfig):
            return FilterStep(config)
        if isinstance(config, RetrieveStepConfig):
            return RetrieveStep(config, context, self._indexes.get(config.input, config.by))
        if isinstance(config, RoundTripStepConfig):
            return RoundTripStep(config, context, self._indexes.get(config.input, config.by))
        source = self.config.find_candidates_of(config)
        return RankStep(config, context, self._indexes.get(source.input, source.by))


def compute_row_targets(tasks: Sequence[TaskConfig], rows: int | None) -> list[int | None]:
    """Divide `rows` among the tasks by weight (largest remainder). None: no limit."""
    if rows is None:
        return [None] * len(tasks)
    weights = np.array([task.weight for task in tasks])
    shares = rows * weights / weights.sum()
    targets = np.floor(shares).astype(int)
    targets[np.argsort(targets - shares, kind="stable")[: rows - int(targets.sum())]] += 1
    return targets.tolist()


def interleave_tasks(tasks: Sequence[TaskRun]) -> Iterator[tuple[TaskRun, AcceptedRow]]:
    """Yield the rows of all tasks. The next row comes from the task with the fewest rows relative to its weight."""
    active = list(tasks)
    while active:
        task = min(active, key=lambda task: task.progress)
        if (row := task.take_row()) is None:
            active.remove(task)
        else:
            yield task, row
