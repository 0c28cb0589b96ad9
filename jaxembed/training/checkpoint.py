"""Checkpoints by Orbax: written in the background, the last few and the best kept, restored onto any mesh.

A checkpoint has three items: `params` (the model's trained ones), `optimizer` (optax's state, step, key, the objectives' own
parameters) and `cursor` (JSON: the next step of the plan, the plan's hash and the held-out score). The SHA-256 of every file
of a finished one is kept beside them, so that a damaged checkpoint is told from a whole one before anything is restored from
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import AsyncOptions

from jaxembed.config.fields import Fields
from jaxembed.devices import processes
from jaxembed.errors import UserError, brief
from jaxembed.files import file_digest, read_json, write_json
from jaxembed.training.run_dir import read_run_file
from jaxembed.training.step import OBJECTIVES, TrainState

DIGESTS = "digests.json"
BOOKKEEPING = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax still writes these after the digests are taken


class Checkpoints:
    """The checkpoints of a run directory. Everything that reads one raises `UserError` where it is damaged.

    The run itself opens them with `keep`, how many it keeps, and removes what a killed one left half-written. Without it
    they are only read: the run may be at work, and what looks half-written may be what it is writing.
    """

    def __init__(self, run_dir: Path, keep: int | None = None):
        self.run_dir = run_dir
        self._folder = _folder(run_dir)
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
        self._saving = 0
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be opened ({error.strerror})") from None

    def save(self, state: TrainState, cursor: dict[str, Any], score: float | None) -> None:
        """Starts writing the state under its step; `score` is the held-out score it was given, if it was scored."""
        step = int(state.step)
        if step in self.steps():
            return
        params, rest = _items(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(rest),
            cursor=ocp.args.JsonSave(cursor | {"score": score}),
        )
        try:
            self._manager.wait_until_finished()
            self._check_space(state)
            self._saving = step
            self._manager.save(step, args=items, metrics={"score": -1e9 if score is None else score})
        except Exception as error:  # file systems and Orbax raise many kinds, some of them about the checkpoint before
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits until everything is on disk; `UserError` where it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest score; the latest where none was scored."""
        scored = [(s, self.cursor(s)["score"]) for s in self.steps()]
        known = [(score, step) for step, score in scored if score is not None]
        return max(known)[1] if known else self.latest()

    def cursor(self, step: int) -> dict[str, Any]:
        restored = self._restore(step, cursor=ocp.args.JsonRestore())
        return dict(restored["cursor"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, placed as `like` is."""
        params, rest = _items(like)
        restored = self._restore(
            step, params=ocp.args.StandardRestore(_abstract(params)), optimizer=ocp.args.StandardRestore(_abstract(rest))
        )
        rest = restored["optimizer"]
        own = {OBJECTIVES: rest.pop(OBJECTIVES)} if OBJECTIVES in rest else {}
        return dataclasses.replace(like, params=restored["params"] | own, **rest)

    def restore_params(self, step: int, shapes: Any) -> Any:
        """The parameters of a step; `shapes` are ShapeDtypeStructs with shardings."""
        return self._restore(step, params=ocp.args.StandardRestore(shapes))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        """Restores items of a step whose files are as they were written; of several processes the first one looks at them."""
        damage = self._damage(step, set(items)) if processes.is_first() else ""
        if not damage:
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # a checkpoint that has no digests yet
                damage = f"it cannot be read: {brief(error)}"
        older = [s for s in self.steps() if s < step and not self._damage(s)]
        way_on = f"go on from step {older[-1]}, the last whole one" if older else "begin anew: no older one is whole"
        raise UserError(f"{self._folder / str(step)}: this checkpoint is damaged ({damage}); remove it to {way_on}")

    def _damage(self, step: int, items: set[str] | None = None) -> str:
        """What differs from the files that were written, of some items or of all; empty if nothing does."""
        folder = self._folder / str(step)
        for name, digest in _digests(self.run_dir).get(str(step), {}).items():
            if items is not None and name.partition("/")[0] not in items:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_digest(folder / name) != digest:
                return f"{name} has changed"
        return ""

    def _record_digests(self) -> None:
        """Notes the digests of the checkpoint that all processes just wrote, and forgets those of removed ones."""
        if not processes.is_first():
            return
        step = str(self._saving)
        written = next(self._folder.glob(f"{step}.*"), self._folder / step)  # it gets its name after this
        others = {name: digests for name, digests in _digests(self.run_dir).items() if (self._folder / name).is_dir()}
        write_json(self.run_dir / DIGESTS, others | {step: _digests_below(written)})

    def _check_space(self, state: TrainState) -> None:
        """OSError where the disk has no room for one more checkpoint."""
        needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(f"it takes {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")

    def _unwritten(self, error: Exception) -> UserError:
        steps = [step for step in self.steps() if not self._damage(step)]
        whole = f"the last whole one is of step {steps[-1]}" if steps else "none was written before"
        return UserError(
            f"{self._folder}: a checkpoint could not be written ({brief(error)}); {whole}; make room and run the same command"
        )


def pick_step(checkpoints: Checkpoints, which: str, run_dir: Path) -> int:
    """The step that `which` names: best, last, or a number."""
    step = checkpoints.best() if which == "best" else checkpoints.latest()
    if which not in ("best", "last"):
        step = int(which) if which.isdecimal() and int(which) in checkpoints.steps() else None
    if step is None:
        raise UserError(f"{run_dir}: holds no checkpoint {which!r}; train it first, or name another with --checkpoint")
    return step


def params_digest(run_dir: Path, step: int) -> str:
    """SHA-256 that identifies the trained parameters of a step: of the digests of their files. Any process may ask alone."""
    files = _digests(run_dir).get(str(step)) or _digests_below(_folder(run_dir) / str(step))
    of_params = {name: digest for name, digest in files.items() if name.startswith("params/")}
    return hashlib.sha256(json.dumps(of_params, sort_keys=True).encode()).hexdigest()


def _folder(run_dir: Path) -> Path:
    return run_dir.absolute() / "checkpoints"


def _digests(run_dir: Path) -> dict[str, dict[str, str]]:
    """Those that were noted of a run's checkpoints: step -> file -> SHA-256."""
    path = run_dir / DIGESTS
    found = read_run_file(read_json, path, "remove it to go on unchecked") if path.is_file() else {}
    return {step: Fields(found, str(path)).texts(step) for step in found}


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's trained parameters, and all else that a checkpoint holds of a state."""
    own = {OBJECTIVES: state.params[OBJECTIVES]} if OBJECTIVES in state.params else {}
    params = {name: part for name, part in state.params.items() if name not in own}
    return params, {"opt_state": state.opt_state, "step": state.step, "key": state.key, **own}


def _digests_below(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in BOOKKEEPING)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
