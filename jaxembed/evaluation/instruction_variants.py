"""Sensitivity to instructions: scores of a task under paraphrased, wrong, and missing instructions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.instructions import InstructionTable
from jaxembed.config.sections import read_tree
from jaxembed.errors import UserError, suggest
from jaxembed.evaluation.air_bench import lacks_judgments
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import EvaluationTask, GroupMember

log = logging.getLogger("jaxembed")

# Kinds of instructions: the one that evaluation chooses, an empty one, and those that a file lists without a kind.
CHOSEN_KIND, MISSING_KIND, UNSPECIFIED_KIND = "chosen", "missing", "paraphrased"

Variants = Mapping[str, Sequence[str]]  # kind -> instructions


def read_variants(path: str) -> dict[str, Variants]:
    """Read the other instructions under which tasks are scored.

    The file maps the name of a task to a list of instructions, or to lists by kind, such as `paraphrased` and `wrong`.

    Raises:
        UserError: The file cannot be read, or does not have this form.
    """
    tree = read_tree(Path(path))
    return {str(task): _parse_variants(entry, f"{path}: {task}") for task, entry in tree.items()}


def _parse_variants(entry: Any, where: str) -> Variants:
    variants = entry if isinstance(entry, dict) else {UNSPECIFIED_KIND: entry}
    for kind, instructions in variants.items():
        if kind in (CHOSEN_KIND, MISSING_KIND):
            raise UserError(f"{where}: the kind {kind!r} is always scored. Remove it.")
        if not isinstance(instructions, list) or not instructions or not all(isinstance(i, str) and i for i in instructions):
            raise UserError(
                f"{where}: expected a list of instructions, or such lists by kind (paraphrased: [...], wrong: [...])"
            )
    return variants


def add_variants(tasks: Sequence[EvaluationTask], path: str) -> list[EvaluationTask]:
    """Return the tasks. Those that the file at `path` names are scored under its instructions too.

    Raises:
        UserError: The file is malformed, or names a task that is not scored.
    """
    task_variants = read_variants(path)
    names = [task.name for task in tasks]
    if unknown := next((name for name in task_variants if name not in names), None):
        raise UserError(
            f"{path}: {unknown} is not a task of this command (tasks: {', '.join(names)}).{suggest(unknown, names)}"
        )
    return [
        _add_variants_to_task(task, task_variants[task.name], path) if task.name in task_variants else task for task in tasks
    ]


def _add_variants_to_task(task: EvaluationTask, variants: Variants, path: str) -> EvaluationTask:
    """Return a task with its variants, or the task itself if it has no judgments, because it writes one file of results."""
    if lacks_judgments(task):
        log.warning("%s: %s has no judgments, so it is scored under no other instructions", path, task.name)
        return task
    return VariantTask(task, variants)


@dataclasses.dataclass(frozen=True)
class VariantTask:
    """A task that is scored under several instructions.

    Attributes:
        task: The task.
        variants: The instructions, by kind.
    """

    task: EvaluationTask
    variants: Variants

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name

    @property
    def type(self) -> str:
        """Type of the task."""
        return self.task.type

    @property
    def groups(self) -> Sequence[GroupMember]:
        """Tables of results that the task belongs to."""
        return self.task.groups

    @property
    def expected_texts(self) -> int | None:
        """Number of texts under all instructions."""
        count = self.task.expected_texts
        return count and count * (1 + len(list(self._list_instructions())))

    @property
    def data_digest(self) -> str:
        """SHA-256 of the data of the task and of the instructions; empty if the task keeps its results."""
        digest = self.task.data_digest
        return digest and hashlib.sha256(json.dumps([digest, self.variants]).encode()).hexdigest()

    def list_texts(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        return self.task.list_texts()

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model, with those under other instructions as "instruction_variants"."""
        return self._add_variant_scores(self.task.score(encoder), encoder)

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from."""
        scores = self.task.score_items(encoder)
        return dataclasses.replace(scores, summary=self._add_variant_scores(scores.summary, encoder))

    def _add_variant_scores(self, summary: dict[str, Any], encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores under the chosen instruction, with those under the other ones."""
        chosen_score, chosen_prompts = summary["score"], encoder.prompts
        entries = [{"kind": CHOSEN_KIND, "instruction": summary["instruction"], "score": chosen_score, "difference": 0.0}]
        for kind, instruction in self._list_instructions():
            # The documents of a symmetric task have the instruction of its queries, also the other ones.
            symmetric = (self.name,) if chosen_prompts.is_symmetric(self.name, self.type) else ()
            table = InstructionTable(by_task={self.name: instruction}, symmetric=symmetric)
            encoder.use_instructions(table, "the instruction variants")
            try:
                score = self.task.score(encoder)["score"]
            finally:
                encoder.prompts = chosen_prompts
            difference = None if None in (score, chosen_score) else score - chosen_score
            entries.append({"kind": kind, "instruction": instruction, "score": score, "difference": difference})
        spread = measure_spread(entries)
        log.info("%s", describe_spread(self.name, spread))
        return {**summary, "instruction_variants": {"variants": entries, "spread": spread}}

    def _list_instructions(self) -> Iterator[tuple[str, str]]:
        for kind, instructions in self.variants.items():
            yield from ((kind, instruction) for instruction in instructions)
        yield MISSING_KIND, ""


def measure_spread(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the spread of scores over instructions: {"all", "by_kind"}.

    The spread is the highest minus the lowest score. `by_kind` has the spread of each kind together with the chosen
    instruction, and the mean score of the kind.
    """
    scores = {
        kind: [e["score"] for e in entries if e["kind"] == kind and e["score"] is not None] for kind in _list_kinds(entries)
    }
    chosen_scores = scores.pop(CHOSEN_KIND)
    spreads = {
        kind: {"mean": float(np.mean(values)), "spread": max(chosen_scores + values) - min(chosen_scores + values)}
        for kind, values in scores.items()
        if values
    }
    all_scores = chosen_scores + [score for values in scores.values() for score in values]
    return {"all": max(all_scores) - min(all_scores) if all_scores else None, "by_kind": spreads}


def describe_spread(task: str, spread: Mapping[str, Any]) -> str:
    """Return one line about the spread of a task's scores."""
    kinds = ", ".join(f"{kind} {values['mean']:.4f}" for kind, values in spread["by_kind"].items())
    total = "none" if spread["all"] is None else f"{spread['all']:.4f}"
    return f"{task}: mean score by kind of instruction: {kinds}; highest minus lowest of all: {total}"


def _list_kinds(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["kind"] for entry in entries))
