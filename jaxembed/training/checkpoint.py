"""Checkpoints of a run, written by Orbax in the background. The last few and the best one are kept."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import AsyncOptions

from jaxembed.devices import processes
from jaxembed.errors import UserError, summarize
from jaxembed.files import write_json
from jaxembed.formats.checkpoints import DIGESTS_FILE, CheckpointReader, compute_digests, read_digests
from jaxembed.model.lora import has_adapter_params
from jaxembed.training.step import OBJECTIVE_PARAMS, TrainState

NO_SCORE = -1e9  # the score under which Orbax ranks a checkpoint that was not scored


class Checkpoints(CheckpointReader):
    """The checkpoints of a run directory, for the run itself. It removes unfinished files of a killed run."""

    def __init__(self, run_dir: Path, keep: int):
        """Open the checkpoints.

        Args:
            run_dir: The run directory.
            keep: Number of latest checkpoints to keep.

        Raises:
            UserError: The folder cannot be opened.
        """
        self._step_being_saved = 0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)]
            ),
            best_fn=lambda metrics: metrics["score"],
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=AsyncOptions(post_finalization_callback=self._record_digests),
        )
        super().__init__(run_dir, options)

    def save(self, state: TrainState, cursor: dict[str, Any], score: float | None) -> None:
        """Start writing a state, under its step, unless that step has a checkpoint.

        Args:
            state: The training state.
            cursor: Position of the run: stage, step and hash of the batch plan.
            score: The held-out score that picks the best checkpoint; None if the state was not scored.

        Raises:
            UserError: This checkpoint, or the previous one, cannot be written.
        """
        step = int(state.step)
        if step in self.list_steps():
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
            raise self._make_write_error(error) from error

    def close(self) -> None:
        """Wait until everything is on disk. Raises `UserError` if it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if processes.is_connection_error(error):
                raise
            raise self._make_write_error(error) from error
        finally:
            self._manager.close()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a step, with the structure, shapes and shardings of `like`."""
        params, optimizer = _split_items(like)
        restored = self.restore_items(
            step,
            params=ocp.args.StandardRestore(_to_shapes(params)),
            optimizer=ocp.args.StandardRestore(_to_shapes(optimizer)),
        )
        optimizer = restored["optimizer"]
        objective_params = {OBJECTIVE_PARAMS: optimizer.pop(OBJECTIVE_PARAMS)} if OBJECTIVE_PARAMS in optimizer else {}
        flat = flatten_dict(restored["params"])
        frozen = {path: flat.pop(path, x) for path, x in flatten_dict(like.frozen).items()}  # a base under adapters is absent
        params = unflatten_dict(flat) | objective_params
        return dataclasses.replace(like, params=params, frozen=unflatten_dict(frozen), **optimizer)

    def _record_digests(self) -> None:
        """Record the digests of the checkpoint that all processes have just written, and drop those of removed ones."""
        if not processes.is_first():
            return
        step = str(self._step_being_saved)
        folder = next(self._folder.glob(f"{step}.*"), self._folder / step)  # Orbax renames it after this
        others = {name: digests for name, digests in read_digests(self.run_dir).items() if (self._folder / name).is_dir()}
        write_json(self.run_dir / DIGESTS_FILE, others | {step: compute_digests(folder)})

    def _check_space(self, state: TrainState) -> None:
        """Raise OSError if the disk has no room for one more checkpoint."""
        params, optimizer = _split_items(state)
        needed_bytes = sum(x.nbytes for x in jax.tree.leaves((params, optimizer["opt_state"])))
        free = shutil.disk_usage(self._folder).free
        if needed_bytes > free:
            raise OSError(f"it takes {needed_bytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")

    def _make_write_error(self, error: Exception) -> UserError:
        intact = [step for step in self.list_steps() if not self.find_damage(step)]
        last = f"The last intact one is of step {intact[-1]}" if intact else "There is no earlier one"
        problem = f"{self._folder}: a checkpoint could not be written ({summarize(error)})"
        return UserError(f"{problem}. {last}. Make room and run the same command.")


def _split_items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a state into the items `params` and `optimizer` of a checkpoint.

    `params` is the whole model with its frozen parameters, except for a base under adapters.
    """
    objective_params = {OBJECTIVE_PARAMS: state.params[OBJECTIVE_PARAMS]} if OBJECTIVE_PARAMS in state.params else {}
    trained = {name: part for name, part in state.params.items() if name not in objective_params}
    params = trained if has_adapter_params(trained) else state.weights
    return params, {"opt_state": state.opt_state, "step": state.step, "key": state.key, **objective_params}


def _to_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
