"""Read the models of a report from run directories and files of scores."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxembed.errors import UserError
from jaxembed.evaluation.tasks import SCORES_FILE
from jaxembed.files import exists
from jaxembed.reporting.run_files import RunFiles, is_run, read_run_files
from jaxembed.reporting.score_files import ScoreFile, TaskScore, find_score_file, merge_score_files, read_score_file


@dataclasses.dataclass(frozen=True)
class ReportedModel:
    """A model of a report.

    Attributes:
        name: Its unique name in the report.
        path: Its run directory, folder, or hub id; empty if its scores do not name it.
        run: Its run, if a run directory was given.
        benchmark: Its benchmark scores.
    """

    name: str
    path: str
    run: RunFiles | None
    benchmark: ScoreFile

    @property
    def tasks(self) -> Mapping[str, TaskScore]:
        """Its benchmark scores by task."""
        return self.benchmark.tasks

    @property
    def held_out(self) -> dict[str, float]:
        """The last held-out scores by SET/METRIC."""
        return self.run.get_last_scores() if self.run else {}


def read_inputs(paths: Sequence[str]) -> list[ReportedModel]:
    """Read run directories and files of scores.

    Scores of a run that is among the paths are added to that run. All paths are checked before any file is read.

    Raises:
        UserError: A path is neither a run nor scores, a file is damaged, or a run has no metrics yet.
    """
    score_files = {path: _find_score_file_or_run(path) for path in paths}
    runs = {Path(path).resolve(): read_run_files(Path(path)) for path in paths if not score_files[path]}
    scores_by_run = {folder: [run.benchmark] if run.benchmark else [] for folder, run in runs.items()}
    scores_without_run: list[tuple[str, ScoreFile]] = []
    for path in paths:
        if score_file := score_files[path]:
            scores = _fill_in_model(read_score_file(score_file), score_file)
            owner = Path(scores.model).resolve() if scores.model else None
            if owner in scores_by_run:
                scores_by_run[owner].append(scores)
            else:
                scores_without_run.append((path, scores))
    models = [
        ReportedModel(run.name, str(folder), run, merge_score_files([ScoreFile("", {}), *scores_by_run[folder]]))
        for folder, run in runs.items()
    ]
    models += [ReportedModel(_name_scores(path, scores), scores.model, None, scores) for path, scores in scores_without_run]
    return _make_names_unique(models)


def _find_score_file_or_run(path: str) -> Path | None:
    """Return the file of scores that a path names, or None if it is a run directory."""
    folder = Path(path)
    if not exists(folder):
        siblings = [sibling.name for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
        nearest = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f"Did you mean {folder.parent / nearest[0]}?" if nearest else "Check the name."
        raise UserError(f"{path}: no such file or folder. {hint}")
    if is_run(folder):
        return None
    if score_file := find_score_file(folder):
        return score_file
    has_not_started = exists(folder / "config.yaml")
    problem = "a run that has not started yet" if has_not_started else "neither a run directory nor scores"
    advice = "Train it first" if has_not_started else "Give a run directory, or the folder of evaluate --out"
    raise UserError(f"{path}: {problem} (expected base.json, or scores.json). {advice}.")


def _fill_in_model(scores: ScoreFile, path: Path) -> ScoreFile:
    """Return scores with their model filled in: the run directory that contains them, if no file names the model."""
    run_dir = path.resolve().parent.parent
    return dataclasses.replace(scores, model=str(run_dir)) if not scores.model and is_run(run_dir) else scores


def _name_scores(path: str, scores: ScoreFile) -> str:
    """Return the name in the report of a model without a run: that of the model, otherwise that of the file or folder."""
    if scores.model:
        return Path(scores.model).name
    source_path = Path(path)
    if source_path.suffix == ".json" and source_path.name != SCORES_FILE:
        return source_path.stem
    return _get_folder(source_path).resolve().name


def _get_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _make_names_unique(models: Sequence[ReportedModel]) -> list[ReportedModel]:
    """Return the models with unique names: repeated names get a number."""
    seen: dict[str, int] = {}
    unique = []
    for model in models:
        seen[model.name] = seen.get(model.name, 0) + 1
        name = model.name if seen[model.name] == 1 else f"{model.name} ({seen[model.name]})"
        run = model.run and dataclasses.replace(model.run, name=name)
        unique.append(dataclasses.replace(model, name=name, run=run))
    return unique
