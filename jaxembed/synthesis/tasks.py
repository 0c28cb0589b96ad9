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
from jaxembed.synthesis.inputs import InputRows, read_choices
from jaxembed.synthesis.novelty import find_language_code, find_language_problem, open_language_identifier
from jaxembed.synthesis.ranking import RankStep
from jaxembed.synthesis.report import AcceptedRowStats
from jaxembed.synthesis.retrieval import DocumentIndex, RetrieveStep, RoundTripStep
from jaxembed.synthesis.steps import AskStep, FilterStep, Step, TaskContext
from jaxembed.synthesis.workers import Workers


class DocumentIndexes:
    """The indexes of all inputs. Steps that search the same documents in the same way share an index."""

    def __init__(self, inputs: Mapping[str, InputRows]):
        """Start without an index."""
        self._inputs = inputs
        self._indexes: dict[tuple[str, str], DocumentIndex] = {}

    def get(self, input_name: str, retriever: str) -> DocumentIndex:
        """Return the index of an input for bm25 or a MODEL. Raise `UserError` if a row has no text."""
        key = input_name, retriever
        if key not in self._indexes:
            self._indexes[key] = DocumentIndex(input_name, self._inputs[input_name], retriever)
        return self._indexes[key]


class TaskInputs(NamedTuple):
    """Inputs that the tasks of a recipe share.

    Attributes:
        rows: Rows of each input.
        indexes: Their searchable documents.
        known_queries: Queries of earlier rows and of existing training files.
        recipe: File of the recipe. Relative paths are also looked up next to it.
    """

    rows: Mapping[str, InputRows]
    indexes: DocumentIndexes
    known_queries: KnownQueries
    recipe: Path


class TaskRun:
    """A running task.

    Attributes:
        config: The section of the task.
        target_rows: Number of rows to write; None for no limit.
        rules: Decides which rows are accepted.
        steps: The steps.
        row_stats: Counts and samples of the accepted rows.
        choices: Possible values of the placeholders of each ask step, by its name.
    """

    def __init__(self, config: TaskConfig, target_rows: int | None, seed: int, inputs: TaskInputs):
        """Prepare the rules. `build_steps` builds the steps.

        Args:
            config: The section of the task.
            target_rows: Number of rows to write; None for no limit.
            seed: Seed of all draws.
            inputs: Inputs that all tasks share.
        """
        self.config, self.target_rows = config, target_rows
        self.rules = RowRules(config, inputs.known_queries, target_rows)
        self.row_stats = AcceptedRowStats(seed)
        self.steps: list[Step] = []
        self._seed, self._inputs, self._indexes = seed, inputs.rows, inputs.indexes
        ask_steps = [step for step in config.steps if isinstance(step, AskStepConfig)]
        self.choices = {step.name: read_choices(step, inputs.recipe) for step in ask_steps}
        if any(rule.language for step in ask_steps for rule in (*step.answer.fields.values(), step.answer.items)):
            open_language_identifier()  # fails early if a library is missing
            find_language_code("")

    @property
    def is_full(self) -> bool:
        """Whether the task has all its rows."""
        return self.target_rows is not None and self.row_stats.num_rows >= self.target_rows

    @property
    def rows_per_weight(self) -> float:
        """(Accepted rows + 1) / weight. The task with the smallest value yields the next row."""
        return (self.row_stats.num_rows + 1) / self.config.weight

    def build_steps(self, client: LlmClient, workers: Workers, update_progress: Callable[[], None]) -> None:
        """Build the steps, and chain them into one stream of rows."""
        context = TaskContext(self._seed, client, workers, lambda: self._get_max_in_progress(workers.threads), update_progress)
        self.steps = [self._make_step(step, context) for step in self.config.steps]
        self._rows = self._iter_rows()

    def take_row(self) -> AcceptedRow | None:
        """Return the next row, or None if there are no more."""
        return None if self.is_full else next(self._rows, None)

    def _get_max_in_progress(self, threads: int) -> int:
        """Return how many drafts of a step may be in progress at once: no more than rows are missing."""
        missing = threads if self.target_rows is None else self.target_rows - self.row_stats.num_rows
        return max(min(threads, missing), 1)

    def _iter_rows(self) -> Iterator[AcceptedRow]:
        drafts = self.start_drafts()
        for step in self.steps:
            drafts = step.run(drafts)
        for draft in drafts:
            if accepted_row := self.rules.accept(draft):
                self.row_stats.add(accepted_row.row)
                yield accepted_row
        for step in self.steps:
            if isinstance(step, AskStep):
                step.raise_if_all_overflow()

    def start_drafts(self) -> Iterator[Draft]:
        """Yield the drafts that start the task: `requests` empty ones, or the rows of an input in random order."""
        first = self.config.first
        if not first.per:
            yield from (Draft((self.config.name, i), {}) for i in range(first.requests or 0))
            return
        rows = self._inputs[first.per]
        for i in make_rng(self._seed, (self.config.name, first.per)).permutation(len(rows)).tolist():
            yield Draft((self.config.name, i), {first.per: rows[i]})

    def _make_step(self, config: AnySynthesisStep, context: TaskContext) -> Step:
        if isinstance(config, AskStepConfig):
            return AskStep(config, context, AnswerReader(config.answer, find_language_problem), self.choices[config.name])
        if isinstance(config, FilterStepConfig):
            return FilterStep(config)
        if isinstance(config, RetrieveStepConfig):
            return RetrieveStep(config, context, self._indexes.get(config.input, config.by))
        if isinstance(config, RoundTripStepConfig):
            return RoundTripStep(config, context, self._indexes.get(config.input, config.by))
        retrieve_step = self.config.find_retrieve_step(config)
        return RankStep(config, context, self._indexes.get(retrieve_step.input, retrieve_step.by))


def compute_row_targets(tasks: Sequence[TaskConfig], max_rows: int | None) -> list[int | None]:
    """Divide `max_rows` among the tasks by weight (largest remainder method). None: no limit."""
    if max_rows is None:
        return [None] * len(tasks)
    weights = np.array([task.weight for task in tasks])
    shares = max_rows * weights / weights.sum()
    targets = np.floor(shares).astype(int)
    targets[np.argsort(targets - shares, kind="stable")[: max_rows - int(targets.sum())]] += 1
    return targets.tolist()


def interleave_tasks(tasks: Sequence[TaskRun]) -> Iterator[tuple[TaskRun, AcceptedRow]]:
    """Yield the rows of all tasks. The next row comes from the task with the fewest rows relative to its weight."""
    active = list(tasks)
    while active:
        task = min(active, key=lambda task: task.rows_per_weight)
        if (row := task.take_row()) is None:
            active.remove(task)
        else:
            yield task, row
