"""Tasks on a user's own files: BEIR folders, scored pairs, and labeled texts."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxembed.config import EvalSetConfig
from jaxembed.errors import UserError
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, SetScores, open_held_out_sets
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import GroupMember
from jaxembed.files import cache_dir, finite_or_none
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


def open_tasks(args: argparse.Namespace) -> list[UserTask]:
    """Return the tasks that the options name. Each has the name of its file or folder (`name_tasks`).

    Raises:
        UserError: A file does not exist or is malformed, or --labels and --train-labels have different numbers of files.
    """
    if args.train_labels and len(args.train_labels) != len(args.labels):
        raise UserError(
            f"--train-labels: {len(args.train_labels)} files (expected {len(args.labels)}, one for each file of --labels)"
        )
    if args.beir:
        check_bm25_installed()
    names = name_tasks([*args.beir, *args.sts, *args.labels])
    configs = [EvalSetConfig(name=names[path], kind="retrieval", path=path) for path in args.beir]
    configs += [EvalSetConfig(name=names[path], kind="sts", path=path) for path in args.sts]
    for path, train_path in zip_longest(args.labels, args.train_labels, fillvalue=""):
        name = names[path]
        configs.append(EvalSetConfig(name=f"{name}-classification", kind="classification", path=path, train_path=train_path))
        configs.append(EvalSetConfig(name=f"{name}-clustering", kind="clustering", path=path))
    return [UserTask(held_out) for held_out in open_held_out_sets(configs, cache_dir(), "evaluate")]


def name_tasks(paths: Sequence[str]) -> dict[str, str]:
    """Return a task name for each file or folder: its stem, after its parent folder if several have the same stem."""
    stems = {path: Path(path.rstrip("/")).stem or path for path in paths}
    counts = Counter(stems.values())
    return {
        path: stem if counts[stem] == 1 else "/".join(filter(None, (Path(path.rstrip("/")).parent.name, stem)))
        for path, stem in stems.items()
    }


@dataclasses.dataclass(frozen=True)
class UserTask:
    """A task on a user's own file.

    Attributes:
        held_out: The data and its scores.
        groups: Tables of results that the task belongs to. Empty: the table of all tasks.
    """

    held_out: HeldOutSet
    groups: tuple[GroupMember, ...] = ()

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

    @property
    def data_digest(self) -> str:
        """SHA-256 of the data, and of the settings of the set."""
        identity = self.held_out.digest + self.held_out.config.model_dump_json(exclude={"path", "train_path"})
        return hashlib.sha256(identity.encode()).hexdigest()

    def list_texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        return ((i.role, i.texts) for i in self.held_out.inputs if i.role != "training texts")

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model, with all metrics, and those of BM25 for retrieval."""
        return self.score_items(encoder).summary

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from."""
        stored_name = "query" if self.type == RetrievalSet.task_type else ""
        prompts = encoder.prompts.choose(self.name, self.type, DEFAULT_INSTRUCTIONS.get(self.type, ""), stored_name)
        inputs = [(i.texts, prompts.document if i.role == "documents" else prompts.query) for i in self.held_out.inputs]
        vectors = [encoder.encode(texts, prompt) for texts, prompt in inputs]
        metric = self.held_out.metric
        results = [self.held_out.score([encoder.convert(v, version) for v in vectors]) for version in encoder.versions]
        scores = [finite_or_none(result.scores[metric]) for result in results]
        summary: dict[str, Any] = {
            "score": scores[0],
            "metric": metric,
            "type": self.type,
            "instruction": prompts.instruction,
            "subsets": {"default": scores[0]},
            "splits": {self.held_out.config.split or "default": scores[0]},
            "metrics": {name: finite_or_none(value) for name, value in results[0].scores.items()},
        } | encoder.summarize_versions(scores)
        if self._bm25:
            summary["bm25"] = self._bm25.scores
        return ItemScores(summary, [results[0].items])

    @cached_property
    def _bm25(self) -> SetScores | None:
        return self.held_out.score_bm25() if isinstance(self.held_out, RetrievalSet) else None
