"""Leaks: texts of evaluation tasks that occur in the training files of a run."""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxembed.config import Config, load_config, read_run_config
from jaxembed.curation.overlap import Overlap, OverlapIndex
from jaxembed.data.schema import Row
from jaxembed.data.sources import open_sources
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.evaluation.tasks import EvaluationTask
from jaxembed.files import cache_dir, exists, expand_home, write_json
from jaxembed.formats.run_files import BASE_RECORD_FILE

log = logging.getLogger("jaxembed")

LEAKS_FILE = "leaks.json"
MAX_EXAMPLES_PER_INPUT = 3  # shown matches of one input of a task, such as its queries
MAX_EXAMPLE_CHARS = 300  # characters of a text in an example

TaskTexts = Iterable[tuple[str, Sequence[str]]]  # role and texts of each input


def read_training_config(name: str) -> Config:
    """Read the config of a run directory, or a config file.

    Raises:
        UserError: It is neither.
    """
    path = expand_home(name)
    if exists(path / BASE_RECORD_FILE):
        return read_run_config(path / "config.yaml")
    if path.is_dir():
        raise UserError(f"--check-leaks: {name} is not a run directory (expected a run or a config, which name training files)")
    return load_config(path)


@dataclasses.dataclass
class InputLeaks:
    """Which texts of one input of a task occur in training files.

    Attributes:
        task: Name of the task.
        role: Role of the texts in the task, such as queries.
        texts: The texts.
        first_index: Index of the first text in the `OverlapIndex`.
        rules: The matching rule (`exact` or `ngram`) of each text that was found, by index. `exact` takes precedence.
        rules_by_source: The same, by training source.
        examples: Matches to show.
    """

    task: str
    role: str
    texts: Sequence[str]
    first_index: int
    rules: dict[int, str] = dataclasses.field(default_factory=dict)
    rules_by_source: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    examples: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, match: Overlap, source: str, training_text: str) -> None:
        """Record that a text of the input matches a training text of a source."""
        for rules in (self.rules, self.rules_by_source.setdefault(source, {})):
            if rules.get(match.index) != "exact":
                rules[match.index] = match.rule
        if len(self.examples) < MAX_EXAMPLES_PER_INPUT:
            words = {"words": match.words} if match.words else {}
            self.examples.append(
                {
                    "rule": match.rule,
                    "role": self.role,
                    "text": self.texts[match.index - self.first_index][:MAX_EXAMPLE_CHARS],
                    "source": source,
                    "training_text": training_text[:MAX_EXAMPLE_CHARS],
                    **words,
                }
            )


def find_leaks(
    tasks: Mapping[str, TaskTexts], sources: Iterable[tuple[str, Iterable[Row]]], ngram_words: int
) -> dict[str, Any]:
    """Find the texts of tasks that occur in training rows.

    Rows are streamed, so memory depends on the texts of the tasks only.

    Args:
        tasks: The texts of each task.
        sources: The name of each training source, and its examples as rows of pairs.
        ngram_words: Number of words of an n-gram.

    Returns:
        {task: {"texts", "exact", "ngram", "roles", "sources", "examples"}}: the numbers of texts, of exact
        matches, and of texts that only share an n-gram with a training text.
    """
    index, inputs = OverlapIndex(ngram_words), list[InputLeaks]()
    for task, task_texts in tasks.items():
        for role, texts in task_texts:
            inputs.append(InputLeaks(task, role, texts, index.num_texts))
            index.add(texts)
    first_indices = [leaks.first_index for leaks in inputs]
    for source, rows in sources:
        for row in rows:
            for text in iter_texts(row):
                for match in index.find(text):
                    inputs[bisect_right(first_indices, match.index) - 1].add(match, source, text)
    return {task: _summarize_leaks([leaks for leaks in inputs if leaks.task == task]) for task in tasks}


def iter_texts(row: Row) -> Iterator[str]:
    """Yield the query, positives and negatives of a row of pairs, without duplicates."""
    return iter(dict.fromkeys((row["query"], *row["pos"], *row.get("neg", ()))))


def iter_training_rows(config: Config) -> Iterator[tuple[str, Iterable[Row]]]:
    """Yield the name of every source of a config, with all its examples as rows of pairs.

    Raises:
        UserError: A source does not exist or has a bad row.
    """
    for stage in config.stages:
        for source in open_sources(stage.data, cache_dir()):
            rows = source.iter_pairs(max_texts=1)
            yield source.name, progress_bar(rows, desc=f"matching {source.name}", unit="row", delay=2, leave=False)


def check_leaks(tasks: Sequence[EvaluationTask], training: str, ngram_words: int, out: Path | None) -> dict[str, Any]:
    """Find the texts of tasks in the training files of a run, and print a line about each task.

    Args:
        tasks: The tasks.
        training: A run directory or a config file.
        ngram_words: Number of words of an n-gram.
        out: Folder for `leaks.json`.

    Returns:
        The leaks by task, as in `find_leaks`.
    """
    sources = iter_training_rows(read_training_config(training))
    leaks = find_leaks({task.name: task.list_texts() for task in tasks}, sources, ngram_words)
    for task, task_leaks in leaks.items():
        log.info("%s", describe_leaks(task, task_leaks, ngram_words))
    if out:
        write_json(out / LEAKS_FILE, leaks)
    return leaks


def _summarize_leaks(inputs: Sequence[InputLeaks]) -> dict[str, Any]:
    """Return the leak counts of a task, by role and by source, with examples."""
    sources: dict[str, Counter[str]] = {}
    for leaks in inputs:
        for source, rules in leaks.rules_by_source.items():
            sources.setdefault(source, Counter()).update(rules.values())
    inputs_by_role = {
        role: [leaks for leaks in inputs if leaks.role == role] for role in dict.fromkeys(leaks.role for leaks in inputs)
    }
    return {
        **_count_inputs(inputs),
        "roles": [{"role": role, **_count_inputs(role_inputs)} for role, role_inputs in inputs_by_role.items()],
        "sources": {source: _count_rules(counts.elements()) for source, counts in sources.items()},
        "examples": [example for leaks in inputs for example in leaks.examples],
    }


def _count_inputs(inputs: Sequence[InputLeaks]) -> dict[str, int]:
    counts = _count_rules(rule for leaks in inputs for rule in leaks.rules.values())
    return {"texts": sum(len(leaks.texts) for leaks in inputs), **counts}


def _count_rules(rules: Iterable[str]) -> dict[str, int]:
    counts = Counter(rules)
    return {"exact": counts["exact"], "ngram": counts["ngram"]}


def describe_leaks(task: str, leaks: Mapping[str, Any], ngram_words: int) -> str:
    """Return one line about the leaks of a task."""
    roles = "; ".join(
        f"{role['exact']:,} of {role['texts']:,} {role['role']} equal a training text, {role['ngram']:,} more share "
        f"{ngram_words} words"
        for role in leaks["roles"]
    )
    return f"leaks: {task}: {roles}"
