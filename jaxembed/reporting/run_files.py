"""Read the files of a run directory, without its model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxembed.config import Config, read_run_config
from jaxembed.config.local_paths import shorten_path, shorten_paths_in_yaml
from jaxembed.errors import UserError
from jaxembed.evaluation.tasks import SCORES_FILE
from jaxembed.files import exists, expand_home, read_json, read_json_value, read_text
from jaxembed.formats.run_files import BASE_RECORD_FILE, DATA_REPORT_FILE, STARTS_FILE, read_run_file
from jaxembed.hub.folders import is_hub_id
from jaxembed.reporting.score_files import ScoreFile, merge_score_files, read_score_file
from jaxembed.training.metrics import read_metrics

log = logging.getLogger("jaxembed")

LoggedRow = Mapping[str, Any]
HASH_FILES = ("data_hashes", "eval_hashes", "guide", "teacher")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run.

    Attributes:
        folder: The run directory.
        name: Name of the run directory: several runs may share the name of a config.
        config: Its config.
        config_text: Its config as YAML, with absolute paths shortened.
        rows: The rows of its metrics.
        base: Name and hash of its base.
        versions: Versions of the libraries by name.
        hashes: Hashes of data, held-out sets, guide and teacher: rows of kind, name and hash.
        data: Contents of data.json: the sources of each stage; empty for runs of earlier versions.
        starts: Contents of starts.jsonl: one entry per start; empty for runs of earlier versions.
        benchmark: Scores in its folder, from `evaluate --out RUN/FOLDER`.
    """

    folder: Path
    name: str
    config: Config
    config_text: str
    rows: Sequence[LoggedRow]
    base: Mapping[str, str]
    versions: Mapping[str, str]
    hashes: Sequence[tuple[str, str, str]]
    data: Sequence[Sequence[Mapping[str, Any]]]
    starts: Sequence[Mapping[str, Any]]
    benchmark: ScoreFile | None

    @property
    def losses(self) -> list[LoggedRow]:
        """The rows of training steps."""
        return [row for row in self.rows if "loss" in row]

    def list_scores(self, prefix: str = "eval") -> list[tuple[int, str, float]]:
        """Return every score under a prefix (eval, untrained, bm25): the step, SET/METRIC, and the value."""
        start = f"{prefix}/"
        return [
            (row["step"], key.removeprefix(start), value)
            for row in self.rows
            for key, value in row.items()
            if key.startswith(start) and value is not None
        ]

    def get_last_scores(self, prefix: str = "eval") -> dict[str, float]:
        """Return the last value of every score under a prefix."""
        return {name: value for _, name, value in self.list_scores(prefix)}


def is_run(path: Path) -> bool:
    """Return whether a path is a run directory."""
    return exists(path / BASE_RECORD_FILE)


def read_run_files(folder: Path) -> RunFiles:
    """Read the files of a run directory.

    Raises:
        UserError: The run has no metrics yet, or a file of it is damaged.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return read_run_file(read_json, path, "train again") if exists(path) else {}

    config_path = folder / "config.yaml"
    config = read_run_file(read_run_config, config_path, "train again")
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: has no metrics yet. Train it until it logs a step (train.log_every).")
    hashes = {name: read(f"{name}.json") for name in HASH_FILES}
    return RunFiles(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        config_text=shorten_paths_in_yaml(read_text(config_path)),
        rows=rows,
        base={key: shorten_path(str(read(BASE_RECORD_FILE).get(key, ""))) for key in ("name", "hash")},
        versions={name: str(version) for name, version in read("versions.json").items()},
        hashes=[
            (kind.removesuffix("_hashes"), shorten_path(str(name)), str(value))
            for kind, entries in hashes.items()
            for name, value in entries.items()
        ],
        data=_read_data(folder / DATA_REPORT_FILE),
        starts=_read_starts(folder / STARTS_FILE),
        benchmark=_find_benchmark(folder),
    )


def _read_data(path: Path) -> list[list[dict[str, Any]]]:
    """Read the sources of each stage from data.json. Runs of earlier versions have no such file, and the list is empty."""
    if not exists(path):
        return []
    stages = read_run_file(read_json_value, path, "train again")
    if not isinstance(stages, list) or not all(isinstance(s, list) and all(isinstance(x, dict) for x in s) for s in stages):
        raise UserError(f"{path}: expected a list of sources for each stage. This file of the run is damaged: train again.")
    return stages


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of starts.jsonl."""
    if not exists(path):
        return []
    starts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            start = json.loads(line)
        except ValueError:
            start = None
        if not isinstance(start, dict):
            raise UserError(f"{path}:{number}: not a JSON object. This file of the run is damaged: remove the line.")
        starts.append(start)
    return starts


def _find_benchmark(folder: Path) -> ScoreFile | None:
    """Return the scores in the run directory or one of its folders. Later files replace tasks of earlier ones."""
    files = []
    for path in (*sorted(folder.glob(f"*/{SCORES_FILE}")), folder / SCORES_FILE):
        if exists(path):
            scores = read_score_file(path)
            if _is_other_model(scores.model, folder):
                log.info("%s: left out, because it has the scores of another model (%s)", path, scores.model)
            else:
                files.append(scores)
    return merge_score_files(files) if files else None


def _is_other_model(model: str, run_dir: Path) -> bool:
    """Return whether a model is not that of a run: a path outside of it, or a hub id. A path may be missing in a moved run."""
    if not model:
        return False
    path = expand_home(model)
    return not path.resolve().is_relative_to(run_dir.resolve()) if exists(path) else is_hub_id(model)
