"""Tasks of MTEB, by name or benchmark."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError, summarize
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.mteb_encoder import MtebEncoder, get_task_instruction
from jaxembed.evaluation.mteb_items import score_task_items
from jaxembed.evaluation.mteb_results import summarize_task
from jaxembed.evaluation.mteb_texts import list_task_texts
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.files import exists


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that name tasks of MTEB."""
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names of MTEB tasks")
    parser.add_argument("--benchmark", metavar="NAME", help="MTEB benchmark whose tasks are scored")


def open_tasks(args: argparse.Namespace) -> list[MtebTask]:
    """Return the tasks that the options name.

    Raises:
        UserError: mteb does not have a task or the benchmark, or both options are given.
    """
    if args.tasks and args.benchmark:
        raise UserError("evaluate: both --tasks and --benchmark are given. Give one of the two.")
    if not args.tasks and not args.benchmark:
        return []
    cache_folder = Path(args.out) / "results" if args.out else None
    return [MtebTask(task, cache_folder) for task in find_tasks(args.tasks, args.benchmark)]


@dataclasses.dataclass(frozen=True)
class MtebTask:
    """A task of MTEB.

    Attributes:
        task: The task object of mteb.
        cache_folder: Folder for mteb's full results. Tasks that were scored there before are not run again.
        prediction_folder: Folder for mteb's predictions. Without those of this task there, the task is run again.
    """

    task: Any
    cache_folder: Path | None = None
    prediction_folder: Path | None = None

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.task.metadata.name)

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the main scores of a model, as mteb computes them.

        Raises:
            UserError: The data of the task cannot be downloaded.
        """
        mteb = import_mteb()
        from mteb.cache import ResultCache

        cache = ResultCache(self.cache_folder) if self.cache_folder else None
        mode = "only-missing" if cache and not self._lacks_predictions else "always"
        try:
            result = mteb.evaluate(
                MtebEncoder(encoder),
                self.task,
                cache=cache,
                overwrite_strategy=mode,
                prediction_folder=self.prediction_folder,
                show_progress_bar=False,
            )
        except ConnectionError as error:
            raise UserError(
                f"{self.name}: cannot download its data ({summarize(error)}). Connect to the network, or download it "
                "beforehand."
            ) from None
        metadata = self.task.metadata
        instruction = encoder.get_instruction(get_task_instruction(metadata))
        named = {"metric": metadata.main_score, "type": str(metadata.type)}
        return summarize_task(result.task_results[0], instruction) | named

    @property
    def _lacks_predictions(self) -> bool:
        folder = self.prediction_folder
        return folder is not None and not exists(folder / self.task.prediction_file_name)

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from, where mteb stores results by item."""
        return score_task_items(self, encoder)

    def list_texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        return list_task_texts(self.task)


def find_tasks(names: Sequence[str], benchmark: str | None) -> list[Any]:
    """Return the mteb tasks with these names, or those of a benchmark.

    Raises:
        UserError: If mteb does not have a task or the benchmark.
    """
    mteb = import_mteb()
    try:
        return list(mteb.get_benchmark(benchmark).tasks) if benchmark else list(mteb.get_tasks(tasks=list(names)))
    except (KeyError, ValueError) as error:
        reason = summarize(error.args[0]).removeprefix("KeyError: ")
        raise UserError(f"mteb: no such task or benchmark: {reason}") from None


def import_mteb() -> Any:
    """Import mteb, or raise a `UserError` that says how to install it."""
    try:
        import mteb
    except ModuleNotFoundError:
        raise UserError("mteb is not installed. Run pip install '.[eval]'.") from None
    except (OSError, RuntimeError) as error:  # it creates its cache; RuntimeError: there is no home directory
        reason = summarize(error)
        raise UserError(
            f"mteb: cannot be imported ({reason}). Set HOME or MTEB_CACHE to a folder that can be written."
        ) from None
    return mteb
