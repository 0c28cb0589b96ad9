"""Tasks of MTEB, by name or benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.mteb_catalog import find_tasks, import_mteb
from jaxembed.evaluation.mteb_encoder import MtebEncoder, choose_prompts
from jaxembed.evaluation.mteb_items import explain_failed_download, reset_random_state, score_task_items
from jaxembed.evaluation.mteb_results import summarize_task
from jaxembed.evaluation.mteb_texts import list_task_texts
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import GroupMember
from jaxembed.files import exists, read_bytes

log = logging.getLogger("jaxembed")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that name tasks of MTEB."""
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of MTEB tasks")
    parser.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        metavar="NAME",
        help="MTEB benchmarks whose tasks are scored, such as 'MTEB(eng, v2)'",
    )
    parser.add_argument(
        "--languages", nargs="+", default=[], metavar="CODE", help="languages of MTEB tasks to keep, such as eng or deu-Latn"
    )


def open_tasks(args: argparse.Namespace) -> list[MtebTask]:
    """Return the tasks that the options name.

    Raises:
        UserError: mteb does not have a task, a benchmark or a language, or no task has the languages.
    """
    if not args.tasks and not args.benchmark:
        if args.languages:
            raise UserError("--languages: applies to tasks of MTEB. Add --tasks or --benchmark.")
        return []
    cache_folder = Path(args.out) / "results" if args.out else None
    tasks = find_tasks(args.tasks, args.benchmark, args.languages)
    return [MtebTask(task, cache_folder, groups) for task, groups in tasks]


@dataclasses.dataclass(frozen=True)
class MtebTask:
    """A task of MTEB.

    Attributes:
        task: The task object of mteb.
        cache_folder: Folder for mteb's full results. Tasks that were scored there before are not run again.
        groups: Tables of results that the task belongs to.
        prediction_folder: Folder for mteb's predictions at the largest width. A task without predictions there is run again.
    """

    task: Any
    cache_folder: Path | None = None
    groups: tuple[GroupMember, ...] = ()
    prediction_folder: Path | None = None

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.task.metadata.name)

    @property
    def type(self) -> str:
        """Type of the task in MTEB."""
        return str(self.task.metadata.type)

    @property
    def expected_texts(self) -> int | None:
        """Number of samples in mteb's statistics of the splits that are scored."""
        counts = self.task.metadata.n_samples or {}
        return sum(counts.get(split, 0) for split in self.task.eval_splits) or None

    @property
    def data_digest(self) -> str:
        """Empty: mteb keeps the results."""
        return ""

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the main scores of a model, as mteb computes them.

        Raises:
            UserError: The data of the task cannot be downloaded.
        """
        encoders = [MtebEncoder(encoder, version) for version in encoder.versions]
        for mteb_encoder in encoders:
            remove_damaged_files(self._list_files(mteb_encoder))
        try:
            results = [self._load_result(mteb_encoder) for mteb_encoder in encoders]
            if None in results:
                results = self._evaluate(encoders)
        except ConnectionError as error:
            raise explain_failed_download(self.task, error) from None
        metadata = self.task.metadata
        metric_and_type = {"metric": str(metadata.main_score), "type": self.type}
        summaries = [
            summarize_task(result, choose_prompts(encoder, metadata).instruction) | metric_and_type for result in results
        ]
        return summaries[0] | encoder.summarize_versions([summary["score"] for summary in summaries])

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from, where mteb stores results by item."""
        return score_task_items(self, encoder)

    def list_texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        return list_task_texts(self.task)

    @property
    def _lacks_predictions(self) -> bool:
        """Whether predictions are wanted, but not there yet."""
        folder = self.prediction_folder
        return folder is not None and not exists(folder / self.task.prediction_file_name)

    def _load_result(self, encoder: MtebEncoder) -> Any:
        """Return the complete result of an earlier run, or None."""
        if self.cache_folder is None or self._lacks_predictions:
            return None
        try:
            return self._call_mteb(encoder, "only-cache")
        except ValueError:  # mteb raises it if the result is absent, or lacks splits or subsets
            return None

    def _evaluate(self, encoders: Sequence[MtebEncoder]) -> list[Any]:
        """Return mteb's result for each encoder. The data of the task are loaded once."""
        loads_data = len(encoders) > 1 and not self.task.data_loaded and not hasattr(self.task, "taskname_to_task")
        if loads_data:
            self.task.load_data()
        mode = "only-missing" if self.cache_folder and not self._lacks_predictions else "always"
        try:
            first_result = self._call_mteb(encoders[0], mode, self.prediction_folder)
            return [first_result, *(self._call_mteb(encoder, mode) for encoder in encoders[1:])]
        finally:
            if loads_data:
                self.task.unload_data()

    def _list_files(self, encoder: MtebEncoder) -> Iterator[Path]:
        """Yield the files that mteb reads and writes for this task, and for the tasks that it aggregates."""
        cache = self._open_cache()
        for member in (self.task, *getattr(self.task, "taskname_to_task", {}).values()):
            if cache is not None:
                path = cache.get_task_result_path(member.metadata.name, encoder.mteb_model_meta)
                yield from (path, path.with_name("run_settings.jsonl"))
            if self.prediction_folder is not None:
                yield self.prediction_folder / member.prediction_file_name

    def _open_cache(self) -> Any:
        """Return mteb's store of results; None if results are not stored."""
        from mteb.cache import ResultCache

        return ResultCache(self.cache_folder) if self.cache_folder else None

    def _call_mteb(self, encoder: MtebEncoder, mode: str, prediction_folder: Path | None = None) -> Any:
        """Return mteb's result of the task.

        Args:
            encoder: The model at one width and precision.
            mode: mteb's `overwrite_strategy`.
            prediction_folder: Folder for the predictions. None: they are not stored.

        Raises:
            UserError: The data are not public.
        """
        mteb = import_mteb()
        reset_random_state(self.task)  # every model and every width is scored on the same samples
        results = mteb.evaluate(
            encoder,
            self.task,
            cache=self._open_cache(),
            overwrite_strategy=mode,
            prediction_folder=prediction_folder,
            show_progress_bar=False,
        )
        if not results.task_results:
            raise UserError(
                f"{self.name}: its data are not public. Leave the task out, or log in to the hub with access to them."
            )
        return results.task_results[0]


def remove_damaged_files(paths: Iterable[Path]) -> None:
    """Remove JSON files that a killed process or a full disk left incomplete. mteb writes in place, and fails to read them."""
    for path in filter(exists, paths):
        content = read_bytes(path)
        try:
            for value in content.splitlines() if path.suffix == ".jsonl" else [content]:
                json.loads(value)
        except ValueError:
            log.warning("%s: removed, because it is incomplete, as after a kill", path)
            path.unlink()
