"""The engine of `jaxembed synthesize`: tasks send prompts to an LLM server and turn the answers into training files.

All random draws depend on the seed, and results are used in the order of the requests. So the same answers give the same rows,
whichever request finishes first and however often the run is interrupted. All answers are stored; rows are written at the end.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from jaxembed.config.sections import dump_changed_keys
from jaxembed.config.synthesis import SynthesisConfig
from jaxembed.curation.curation_page import PAGE_FILE, REPORT_FILE
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.files import write_json, write_text
from jaxembed.synthesis.acceptance import KnownQueries
from jaxembed.synthesis.client import AnswerSource, LlmClient
from jaxembed.synthesis.inputs import InputRows, hash_inputs, read_inputs
from jaxembed.synthesis.output import ANSWERS_FILE, RowFiles, make_identity, prepare_folder
from jaxembed.synthesis.report import render_page
from jaxembed.synthesis.steps import StepCounts
from jaxembed.synthesis.store import AnswerStore
from jaxembed.synthesis.tasks import DocumentIndexes, TaskInputs, TaskRun, compute_row_targets, interleave_tasks
from jaxembed.synthesis.workers import TokenBudget, Workers

PROGRESS_INTERVAL_S = 0.5
MAX_NAMED_REASONS = 3
log = logging.getLogger("jaxembed")


def synthesize(
    config: SynthesisConfig, recipe: Path, source: AnswerSource, out: Path, *, cache: Path, budget_tokens: int | None = None
) -> dict[str, Any]:
    """Ask the servers for rows until there are enough, the budget is spent, or the recipe ends; write the files and the report.

    Args:
        config: The whole config.
        recipe: File of the config.
        source: Answers the requests that are not stored.
        out: Output folder.
        cache: Folder for row indexes of existing training files.
        budget_tokens: Token limit of the output folder, earlier runs included; None for no limit.

    Returns:
        The output folder, its files, rows by task, requests, tokens, the share of invalid answers, and what ended the run.

    Raises:
        UserError: The input is bad, the server cannot be used, or no row was accepted. Finished answers are stored.
    """
    inputs = read_inputs(config, str(recipe))
    tasks = prepare_tasks(config, recipe, inputs, cache)
    with ExitStack() as stack:
        prepare_folder(out, make_identity(config, source.options.model, hash_inputs(inputs)))
        (out / ANSWERS_FILE).parent.mkdir(exist_ok=True)
        store = stack.enter_context(closing(AnswerStore(out / ANSWERS_FILE)))
        budget = TokenBudget(budget_tokens)
        client = LlmClient(source, store)
        workers = stack.enter_context(Workers(source.options.concurrency, budget))
        files = write_rows(config, tasks, client, workers, out)
        ended_by = "budget" if budget.is_spent else "rows" if all(task.is_full for task in tasks) else "recipe"
    report = make_report(config, tasks, client, files)
    write_json(out / REPORT_FILE, report)
    write_text(out / PAGE_FILE, render_page(report))
    check_rows(tasks, out)
    return {
        "out": str(out),
        "files": [str(out / name) for name in files.values() if name],
        "rows": {task.config.name: task.row_stats.num_rows for task in tasks},
        **report["tokens"],
        "invalid_share": report["invalid_share"],
        "ended_by": ended_by,
        "report": str(out / PAGE_FILE),
    }


def prepare_tasks(config: SynthesisConfig, recipe: Path, inputs: Mapping[str, InputRows], cache: Path) -> list[TaskRun]:
    """Return the tasks after all checks that need no server. Raise `UserError` for bad input."""
    task_inputs = TaskInputs(inputs, DocumentIndexes(inputs), KnownQueries(config, cache, str(recipe)), recipe)
    return [
        TaskRun(task, target_rows, config.seed, task_inputs)
        for task, target_rows in zip(config.tasks, compute_row_targets(config.tasks, config.max_rows), strict=True)
    ]


def write_rows(
    config: SynthesisConfig, tasks: Sequence[TaskRun], client: LlmClient, workers: Workers, out: Path
) -> dict[str, str]:
    """Write the rows of all tasks. Return the name of the file of each task, empty for one without rows."""
    with RowFiles(out, config) as files, ProgressDisplay(config.max_rows, tasks, client) as display:
        for task in tasks:
            task.build_steps(client, workers, display.update)
        for task, accepted_row in interleave_tasks(tasks):
            files.add(task.config, accepted_row)
            display.add_row()
        return {task.config.name: files.get_name(task.config) for task in tasks}


class ProgressDisplay:
    """A progress bar with rows, tokens, their rate, and the share of invalid answers. It is a context manager."""

    def __init__(self, max_rows: int | None, tasks: Sequence[TaskRun], client: LlmClient):
        """Show the bar."""
        self._bar = progress_bar(total=max_rows, unit="row", desc="synthesize")
        self._tasks, self._client = tasks, client
        self._start = self._shown_at = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add_row(self) -> None:
        """Count a row."""
        self._bar.update()

    def update(self) -> None:
        """Show the tokens and the share of invalid answers, at most twice a second."""
        now = time.monotonic()
        if now - self._shown_at >= PROGRESS_INTERVAL_S:
            self._shown_at = now
            counts = self._client.counts
            rate = counts.new_tokens / (now - self._start)
            self._bar.set_postfix_str(
                f"{counts.total_tokens:,} tokens, {rate:,.0f}/s, {compute_invalid_share(self._tasks):.0%} invalid"
            )


def compute_invalid_share(tasks: Sequence[TaskRun]) -> float:
    """Return the share of answers that were not valid."""
    counts = [step.counts for task in tasks for step in task.steps]
    return sum(c.invalid.total() for c in counts) / max(sum(c.answers for c in counts), 1)


def make_report(
    config: SynthesisConfig, tasks: Sequence[TaskRun], client: LlmClient, files: Mapping[str, str]
) -> dict[str, Any]:
    """Return the report of a synthesis."""
    counts = client.counts
    return {
        "recipe": config.name,
        "version": config.version,
        "model": client.model,
        "tokens": {
            "requests": counts.requests, "stored_answers": counts.stored_answers, "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens, "new_tokens": counts.new_tokens,
        },
        "invalid_share": round(compute_invalid_share(tasks), 4),
        "tasks": {task.config.name: describe_task(task, files[task.config.name]) for task in tasks},
        "config": dump_changed_keys(config),
    }  # fmt: skip


def describe_task(task: TaskRun, file: str) -> dict[str, Any]:
    """Return the part of the report about a task."""
    return {
        "file": file,
        "format": task.rules.format,
        **task.row_stats.to_json(),
        "steps": [{"name": step.name, **describe_step(step.counts)} for step in task.steps],
        "rejected": sort_counts(task.rules.rejected),
        "groups": {q.by: sort_counts(c) for q, c in zip(task.config.quotas, task.rules.quota_counts, strict=True)},
    }


def describe_step(counts: StepCounts) -> dict[str, Any]:
    """Return the counts of a step as plain values."""
    return dataclasses.asdict(counts) | {"invalid": sort_counts(counts.invalid), "dropped": sort_counts(counts.dropped)}


def sort_counts(counts: Counter[str]) -> dict[str, int]:
    """Return counts with the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def check_rows(tasks: Sequence[TaskRun], out: Path) -> None:
    """Log the tasks without rows, with the most frequent reasons. Raise `UserError` if no task has any."""
    for task in tasks:
        if task.row_stats.num_rows:
            continue
        reasons = Counter(task.rules.rejected)
        for step in task.steps:
            reasons.update(step.counts.dropped)
            reasons.update({f"{step.name}: {reason}": count for reason, count in step.counts.invalid.items()})
        main_reasons = (
            "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(MAX_NAMED_REASONS))
            or "no row was requested"
        )
        line = f"task {task.config.name}: no row was accepted ({main_reasons}). See {out / REPORT_FILE}."
        if not any(other.row_stats.num_rows for other in tasks):
            raise UserError(line)
        log.warning("%s", line)
