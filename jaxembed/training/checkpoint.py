"""Checkpoints by Orbax: written in the background, restored onto any mesh. The last few and the best are kept.

A checkpoint has three items:

- `params`: the trained parameters of the model.
- `optimizer`: optax's state, the step, the random key, and the parameters of the objectives.
- `cursor` (JSON): the stage, the step, the hash of the batch plan, and the held-out score.

digests.json in the run directory has the SHA-256 of every file of every finished checkpoint. It tells a damaged checkpoint from
an intact one before anything is restored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import AsyncOptions

from jaxembed.config.field_lists import log_once
from jaxembed.config.fields import Fields
from jaxembed.devices import processes
from jaxembed.errors import UserError, summarize
from jaxembed.files import file_digest, read_json, write_json
from jaxembed.training.run_dir import read_run_file
from jaxembed.training.step import OBJECTIVE_PARAMS, TrainState

DIGESTS_FILE = "digests.json"
# Orbax writes these after the digests are recorded.
UNRECORDED_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}
NO_SCORE = -1e9  # the score under which Orbax ranks a checkpoint that was not scored


class Checkpoints:
    """The checkpoints of a run directory.

    Every method that reads a checkpoint raises `UserError` if it is damaged.
    """

    def __init__(self, run_dir: Path, keep: int | None = None):
        """Open the checkpoints.

        Args:
            run_dir: The run directory.
            keep: Number of latest checkpoints to keep. The run itself passes it, and removes what a killed run has left
                unfinished. Without it checkpoints are only read: the run may be active, and an unfinished checkpoint may be the
                one that it is writing.

        Raises:
            UserError: The folder cannot be opened.
        """
        self.run_dir = run_dir
        self._folder = _checkpoints_folder(run_dir)
        if keep is None:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)]
                ),
                best_fn=lambda metrics: metrics["score"],
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                async_options=AsyncOptions(post_finalization_callback=self._record_digests),
            )
        self._step_being_saved = 0
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be opened ({error.strerror}). Check its permissions.") from None

    def save(self, state: TrainState, cursor: dict[str, Any], score: float | None) -> None:
        """Start writing a state, under its step, unless that step has a checkpoint.

        Args:
            state: The training state.
            cursor: Where the run is: stage, step and hash of the batch plan.
            score: The held-out score that picks the best checkpoint; None if the state was not scored.

        Raises:
            UserError: This checkpoint, or the one before, cannot be written.
        """
        step = int(state.step)
        if step in self.steps():
            return
        params, optimizer = _split_items(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            cursor=ocp.args.JsonSave(cursor | {"score": score}),
        )
        try:
            self._manager.wait_until_finished()
            self._check_space(state)
            self._step_being_saved = step
            self._manager.save(step, args=items, metrics={"score": NO_SCORE if score is None else score})
        except Exception as error:  # file systems and Orbax raise many kinds, some of them about the checkpoint before
            if processes.is_connection_error(error):
                raise
            raise self._write_error(error) from error

    def close(self) -> None:
        """Wait until everything is on disk. Raises `UserError` if it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if processes.is_connection_error(error):
                raise
            raise self._write_error(error) from error
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps that have a finished checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the last step that has a checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the highest score, or the latest step if none was scored."""
        scores = {step: self.cursor(step)["score"] for step in self.steps()}
        # Earlier versions stored NaN as a score.
        ranked = [(score, step) for step, score in scores.items() if score is not None and math.isfinite(score)]
        return max(ranked)[1] if ranked else self.latest()

    def cursor(self, step: int) -> dict[str, Any]:
        """Return the cursor of a step: where the run was, and its score."""
        restored = self._restore(step, cursor=ocp.args.JsonRestore())
        return dict(restored["cursor"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a step, with the structure, shapes and shardings of `like`."""
        params, optimizer = _split_items(like)
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(_to_shapes(params)),
            optimizer=ocp.args.StandardRestore(_to_shapes(optimizer)),
        )
        optimizer = restored["optimizer"]
        objective_params = {OBJECTIVE_PARAMS: optimizer.pop(OBJECTIVE_PARAMS)} if OBJECTIVE_PARAMS in optimizer else {}
        return dataclasses.replace(like, params=restored["params"] | objective_params, **optimizer)

    def restore_params(self, step: int, shapes: Any) -> Any:
        """Return the trained parameters of a step. `shapes` are `ShapeDtypeStruct`s with shardings."""
        return self._restore(step, params=ocp.args.StandardRestore(shapes))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        """Restore items of a step, if their files are intact. Only process 0 checks the files."""
        damage = self._find_damage(step, set(items)) if processes.is_first() else ""
        if not damage:
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # a checkpoint that has no digests yet
                if processes.is_connection_error(error):
                    raise
                damage = f"it cannot be read: {summarize(error)}"
        intact = [earlier for earlier in self.steps() if earlier < step and not self._find_damage(earlier)]
        outcome = (
            f"resume from step {intact[-1]}, the last intact one" if intact else "start over: no earlier checkpoint is intact"
        )
        raise UserError(f"{self._folder / str(step)}: this checkpoint is damaged ({damage}). Remove it to {outcome}.")

    def _find_damage(self, step: int, items: set[str] | None = None) -> str:
        """Compare files with their digests, of some items or of all. Return what is wrong; empty if nothing is."""
        folder = self._folder / str(step)
        for name, digest in _read_digests(self.run_dir).get(str(step), {}).items():
            if items is not None and name.partition("/")[0] not in items:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_digest(folder / name) != digest:
                return f"{name} has changed"
        return ""

    def _record_digests(self) -> None:
        """Record the digests of the checkpoint that all processes have just written, and drop those of removed ones."""
        if not processes.is_first():
            return
        step = str(self._step_being_saved)
        folder = next(self._folder.glob(f"{step}.*"), self._folder / step)  # Orbax renames it after this
        others = {name: digests for name, digests in _read_digests(self.run_dir).items() if (self._folder / name).is_dir()}
        write_json(self.run_dir / DIGESTS_FILE, others | {step: _compute_digests(folder)})

    def _check_space(self, state: TrainState) -> None:
        """Raise OSError if the disk has no room for one more checkpoint."""
        needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(f"it takes {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")

    def _write_error(self, error: Exception) -> UserError:
        intact = [step for step in self.steps() if not self._find_damage(step)]
        last = f"The last intact one is of step {intact[-1]}" if intact else "There is no earlier one"
        problem = f"{self._folder}: a checkpoint could not be written ({summarize(error)})"
        return UserError(f"{problem}. {last}. Make room and run the same command.")


def pick_step(checkpoints: Checkpoints, which: str, run_dir: Path) -> int:
    """Return the step that `which` names.

    Args:
        checkpoints: The checkpoints of a run.
        which: "best", "last", or a step.
        run_dir: The run directory, for the error.

    Raises:
        UserError: There is no such checkpoint.
    """
    step = checkpoints.best() if which == "best" else checkpoints.latest()
    if which == "best" and step is not None and checkpoints.cursor(step)["score"] is None:
        log_once(f"{run_dir}: no checkpoint was scored, so best is the last one, of step {step}", logging.INFO)
    if which not in ("best", "last"):
        step = int(which) if which.isdecimal() and int(which) in checkpoints.steps() else None
    if step is None:
        raise UserError(f"{run_dir}: no checkpoint {which!r}. Train the run first, or choose another with --checkpoint.")
    return step


def params_digest(run_dir: Path, step: int) -> str:
    """Return a SHA-256 that identifies the trained parameters of a step: that of the digests of their files.

    A single process may call it: it does not wait for the others.
    """
    digests = _read_digests(run_dir).get(str(step)) or _compute_digests(_checkpoints_folder(run_dir) / str(step))
    params_digests = {name: digest for name, digest in digests.items() if name.startswith("params/")}
    return hashlib.sha256(json.dumps(params_digests, sort_keys=True).encode()).hexdigest()


def _checkpoints_folder(run_dir: Path) -> Path:
    return run_dir.absolute() / "checkpoints"


def _read_digests(run_dir: Path) -> dict[str, dict[str, str]]:
    """Read the recorded digests of a run's checkpoints: step -> file -> SHA-256."""
    path = run_dir / DIGESTS_FILE
    values = read_run_file(read_json, path, "remove it to resume without this check") if path.is_file() else {}
    return {step: Fields(values, str(path)).strings(step) for step in values}


def _compute_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNRECORDED_FILES)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _split_items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a state into the items `params` and `optimizer` of a checkpoint."""
    objective_params = {OBJECTIVE_PARAMS: state.params[OBJECTIVE_PARAMS]} if OBJECTIVE_PARAMS in state.params else {}
    params = {name: part for name, part in state.params.items() if name not in objective_params}
    return params, {"opt_state": state.opt_state, "step": state.step, "key": state.key, **objective_params}


def _to_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
