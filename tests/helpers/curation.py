"""Rows and steps of a curation, for its tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxembed.config.curation import AnyStep, CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.stages import make_all_rows_step, read_decisions, write_decisions
from jaxembed.curation.steps.curated_row import CuratedRow, StepOutcome


def pair(query: str, *positives: str, neg: Sequence[str] = (), source: int = 0, **fields: Any) -> CuratedRow:
    return CuratedRow(source, 1, "pairs", {"query": query, "pos": list(positives), "neg": list(neg), **fields})


def run_all_rows_step(config: AnyStep, folder: Path, rows: Sequence[CuratedRow], seed: int = 0) -> list[StepOutcome]:
    """Let a step see rows in batches of two, then apply what it decided."""
    folder.mkdir(exist_ok=True)
    sources = [{"path": f"source{i}.jsonl"} for i in range(3)]
    whole = CurateConfig(out="out", memory_mb=16, seed=seed, sources=sources, steps=[config])
    with closing(make_all_rows_step(config, folder, 100, whole, make_context(folder / "cache"))) as step:
        for start in range(0, len(rows), 2):
            step.collect(rows[start : start + 2])
        write_decisions(folder, step)
        return read_decisions(folder, config)(rows)


def queries_left(outcomes: Sequence[StepOutcome]) -> list[str]:
    return [outcome.row["query"] for outcome in outcomes if outcome.row is not None]
