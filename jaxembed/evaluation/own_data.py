"""Tasks on a user's own files: BEIR folders, scored pairs, and labeled texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxembed.config import EvalSetConfig
from jaxembed.errors import UserError
from jaxembed.evaluation.comparison import ItemScores, finite_or_none
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, SetScores, open_held_out_sets
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.files import cache_dir
from jaxembed.search.bm25 import check_bm25_installed

# Instructions of MTEB's task types, for models that take instructions. Retrieval gets the stored prompt of queries.
DEFAULT_INSTRUCTIONS = {
    "STS": "Retrieve semantically similar text.",
    "Classification": "Classify user passages.",
    "Clustering": "Identify categories in user passages.",
}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that name files of a user."""
    parser.add_argument("--beir", nargs="+", default=[], metavar="DIR", help="BEIR folders; BM25 is scored beside the model")
    parser.add_argument("--sts", nargs="+", default=[], metavar="FILE", help="files of scored pairs")
    parser.add_argument(
        "--labels", nargs="+", default=[], metavar="FILE", help="files of labeled texts, for classification and clustering"
    )
    parser.add_argument(
        "--train-labels", nargs="+", default=[], metavar="FILE",
        help="files of labeled texts that train the classifiers of --labels, in the same order (default: cross-validation)",
    )  # fmt: skip


def open_tasks(args: argparse.Namespace) -> list[OwnTask]:
    """Return the tasks that the options name. Each has the name of its file or folder.

    Raises:
        UserError: A file does not exist or is malformed, or there are other numbers of files in --labels and --train-labels.
    """
    if args.train_labels and len(args.train_labels) != len(args.labels):
        raise UserError(
            f"--train-labels: {len(args.train_labels)} files (expected {len(args.labels)}, one for each file of --labels)"
        )
    if args.beir:
        check_bm25_installed()
    configs = [EvalSetConfig(name=name_task(path), kind="retrieval", path=path) for path in args.beir]
    configs += [EvalSetConfig(name=name_task(path), kind="sts", path=path) for path in args.sts]
    for path, train_path in zip_longest(args.labels, args.train_labels, fillvalue=""):
        name = name_task(path)
        configs.append(EvalSetConfig(name=f"{name}-classification", kind="classification", path=path, train_path=train_path))
        configs.append(EvalSetConfig(name=f"{name}-clustering", kind="clustering", path=path))
    return [OwnTask(held_out) for held_out in open_held_out_sets(configs, cache_dir(), "evaluate")]


def name_task(path: str) -> str:
    """Return the name of the task of a file or folder: its last part without an ending."""
    return Path(path.rstrip("/")).stem or path


@dataclasses.dataclass(frozen=True)
class OwnTask:
    """A task on a user's own file.

    Attributes:
        held_out: The data, and how it is scored.
    """

    held_out: HeldOutSet

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.held_out.config.name

    @property
    def type(self) -> str:
        """Type of such tasks in MTEB."""
        return self.held_out.task_type

    @property
    def expected_texts(self) -> int:
        """Number of texts that are encoded."""
        return sum(len(text_input.texts) for text_input in self.held_out.inputs)

    def list_texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        return ((i.role, i.texts) for i in self.held_out.inputs if i.role != "training texts")

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model, with all metrics, and those of BM25 for retrieval."""
        return self.score_items(encoder).summary

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from."""
        instruction, query_prompt = choose_query_prompt(encoder, self.type)
        prompts = {"documents": encoder.document_prompt}
        inputs = [(i.texts, prompts.get(i.role, query_prompt)) for i in self.held_out.inputs]
        result = self.held_out.score([encoder.encode_with_prompt(texts, prompt) for texts, prompt in inputs])
        metric = self.held_out.metric
        score = finite_or_none(result.scores[metric])
        summary: dict[str, Any] = {
            "score": score,
            "metric": metric,
            "type": self.type,
            "instruction": instruction,
            "subsets": {"default": score},
            "splits": {self.held_out.config.split or "default": score},
            "metrics": {name: finite_or_none(value) for name, value in result.scores.items()},
        }
        if self._bm25:
            summary["bm25"] = self._bm25.scores
        return ItemScores(summary, [result.items])

    @cached_property
    def _bm25(self) -> SetScores | None:
        return self.held_out.score_bm25() if isinstance(self.held_out, RetrievalSet) else None


def choose_query_prompt(encoder: TaskEncoder, task_type: str) -> tuple[str, str]:
    """Return the instruction and the complete prompt of a task's queries, or of all its texts if it has no documents.

    Retrieval has the stored prompt of queries. Other tasks have the instruction of their type.
    """
    spec = encoder.spec
    if task_type == RetrievalSet.task_type and "query" in spec.prompts:
        return spec.extract_instruction(spec.prompts["query"]), spec.prompts["query"]
    instruction = encoder.get_instruction(DEFAULT_INSTRUCTIONS.get(task_type, ""))
    return instruction, spec.prompt(instruction)
