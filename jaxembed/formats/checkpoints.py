"""Checkpoints of a run, written by Orbax and read onto any mesh.

A checkpoint has three items:

- `params`: the trained parameters of the model.
- `optimizer`: optax's state, the step, the random key, and the parameters of the objectives.
- `cursor` (JSON): the stage, the step, the hash of the batch plan, and the held-out score.

digests.json in the run directory has the SHA-256 of every file of every finished checkpoint. Damaged
checkpoints are detected with it before anything is restored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxembed.config.field_lists import log_once
from jaxembed.config.fields import Fields
from jaxembed.devices import processes
from jaxembed.errors import UserError, summarize
from jaxembed.files import compute_file_digest, read_json
from jaxembed.formats.run_files import read_run_file

DIGESTS_FILE = "digests.json"
# Orbax writes these after the digests are recorded.
UNRECORDED_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}


class CheckpointReader:
    """The checkpoints of a run directory, for reading. The run may be active, and may be writing one of them.

    Every method that reads a checkpoint raises `UserError` if it is damaged.
    """

    def __init__(self, run_dir: Path, options: ocp.CheckpointManagerOptions | None = None):
        """Open the checkpoints.

        Args:
            run_dir: The run directory.
            options: Options of Orbax. Default: checkpoints are only read, and unfinished ones are left alone.

        Raises:
            UserError: The folder cannot be opened.
        """
        self.run_dir = run_dir
        self._folder = get_checkpoints_folder(run_dir)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options or ocp.CheckpointManagerOptions(create=False))
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be opened ({error.strerror}). Check its permissions.") from None

    def close(self) -> None:
        """Release the resources of Orbax."""
        self._manager.close()

    def list_steps(self) -> list[int]:
        """Return the steps that have a finished checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def find_latest(self) -> int | None:
        """Return the last step that has a checkpoint."""
        return max(self.list_steps(), default=None)

    def find_best(self) -> int | None:
        """Return the step with the highest score, or the latest step if none was scored."""
        scores = {step: self.read_cursor(step)["score"] for step in self.list_steps()}
        # Earlier versions stored NaN as a score.
        ranked_steps = [(score, step) for step, score in scores.items() if score is not None and math.isfinite(score)]
        return max(ranked_steps)[1] if ranked_steps else self.find_latest()

    def read_cursor(self, step: int) -> dict[str, Any]:
        """Return the cursor of a step: the position of the run, and its score."""
        restored = self.restore_items(step, cursor=ocp.args.JsonRestore())
        return dict(restored["cursor"])

    def restore_params(self, step: int, shapes: Any) -> Any:
        """Return the trained parameters of a step. `shapes` are `ShapeDtypeStruct`s with shardings."""
        return self.restore_items(step, params=ocp.args.StandardRestore(shapes))["params"]

    def restore_items(self, step: int, **items: Any) -> Any:
        """Restore items of a step, if their files are intact. Only process 0 checks the files."""
        damage = self.find_damage(step, set(items)) if processes.is_first() else ""
        if not damage:
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # a checkpoint that has no digests yet
                if processes.is_connection_error(error):
                    raise
                damage = f"it cannot be read: {summarize(error)}"
        intact = [earlier for earlier in self.list_steps() if earlier < step and not self.find_damage(earlier)]
        outcome = (
            f"resume from step {intact[-1]}, the last intact one" if intact else "start over: no earlier checkpoint is intact"
        )
        raise UserError(f"{self._folder / str(step)}: this checkpoint is damaged ({damage}). Remove it to {outcome}.")

    def find_damage(self, step: int, items: set[str] | None = None) -> str:
        """Compare the files of some or all items with their digests. Return what is wrong, or an empty string."""
        folder = self._folder / str(step)
        for name, digest in read_digests(self.run_dir).get(str(step), {}).items():
            if items is not None and name.partition("/")[0] not in items:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if compute_file_digest(folder / name) != digest:
                return f"{name} has changed"
        return ""


def pick_step(checkpoints: CheckpointReader, which: str, run_dir: Path) -> int:
    """Return the step that `which` names.

    Args:
        checkpoints: The checkpoints of a run.
        which: "best", "last", or a step.
        run_dir: The run directory, for the error.

    Raises:
        UserError: There is no such checkpoint.
    """
    step = checkpoints.find_best() if which == "best" else checkpoints.find_latest()
    if which == "best" and step is not None and checkpoints.read_cursor(step)["score"] is None:
        log_once(f"{run_dir}: no checkpoint was scored, so best is the last one, of step {step}", logging.INFO)
    if which not in ("best", "last"):
        step = int(which) if which.isdecimal() and int(which) in checkpoints.list_steps() else None
    if step is None:
        raise UserError(f"{run_dir}: no checkpoint {which!r}. Train the run first, or choose another with --checkpoint.")
    return step


def compute_params_digest(run_dir: Path, step: int) -> str:
    """Return a SHA-256 that identifies the trained parameters of a step: that of the digests of their files.

    A single process may call it: it does not wait for the others.
    """
    digests = read_digests(run_dir).get(str(step)) or compute_digests(get_checkpoints_folder(run_dir) / str(step))
    params_digests = {name: digest for name, digest in digests.items() if name.startswith("params/")}
    return hashlib.sha256(json.dumps(params_digests, sort_keys=True).encode()).hexdigest()


def get_checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of the checkpoints in a run directory."""
    return run_dir.absolute() / "checkpoints"


def read_digests(run_dir: Path) -> dict[str, dict[str, str]]:
    """Read the recorded digests of a run's checkpoints: step -> file -> SHA-256."""
    path = run_dir / DIGESTS_FILE
    values = read_run_file(read_json, path, "remove it to resume without this check") if path.is_file() else {}
    return {step: Fields(values, str(path)).strings(step) for step in values}


def compute_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each recorded file of a checkpoint, by its path in the checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNRECORDED_FILES)
    return {path.relative_to(folder).as_posix(): compute_file_digest(path) for path in files}
