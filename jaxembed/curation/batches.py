"""Batches of rows that go through steps, in this process or in others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, RowStepError, StepOutcome

ROWS_PER_BATCH = 512
RowBatch = Sequence[CuratedRow]
BatchOutcomes = list[list[StepOutcome]] | RowStepError
BatchResults = Iterator[tuple[RowBatch, BatchOutcomes]]
MapBatches = Callable[[Sequence[RowStep], Iterable[RowBatch]], BatchResults]


def run_steps(functions: Sequence[RowStep], rows: RowBatch) -> BatchOutcomes:
    """Return the outcomes of each step, for the rows that the previous steps kept; or the error of a step."""
    outcomes = []
    try:
        for function in functions:
            outcomes.append(function(rows))
            rows = keep_rows(rows, outcomes[-1])
    except RowStepError as error:
        return error
    return outcomes


def keep_rows(rows: RowBatch, outcomes: Sequence[StepOutcome]) -> RowBatch:
    """Return the rows that a step kept, with its changes."""
    return [
        row if outcome.row is row.fields else row._replace(fields=outcome.row)
        for row, outcome in zip(rows, outcomes, strict=True)
        if outcome.row is not None
    ]


def map_batches(functions: Sequence[RowStep], batches: Iterable[RowBatch]) -> BatchResults:
    """Yield each batch with the outcomes of its steps, computed in this process."""
    for batch in batches:
        yield batch, run_steps(functions, batch)


def batched(rows: Iterable[CuratedRow]) -> Iterator[RowBatch]:
    """Yield rows in lists of at most `ROWS_PER_BATCH`."""
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, ROWS_PER_BATCH)):
        yield batch
