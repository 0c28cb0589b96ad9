"""Checkpoints by Orbax: written in the background, the last few and the best kept, restored onto any mesh.

A checkpoint has three items: `params`, `optimizer` (optax's state, step, key) and `cursor` (JSON: the next step of the
plan, the plan's hash and the held-out score).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxembed.errors import UserError
from jaxembed.training.step import TrainState


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_dir: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)]
            ),
            best_fn=lambda metrics: metrics["score"],
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)

    def save(self, state: TrainState, cursor: dict[str, Any], score: float | None) -> None:
        """Starts writing the state under its step; `score` is the held-out score it was given, if it was scored."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        rest = {"opt_state": state.opt_state, "step": state.step, "key": state.key}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(rest),
            cursor=ocp.args.JsonSave(cursor | {"score": score}),
        )
        self._manager.save(step, args=items, metrics={"score": -1e9 if score is None else score})

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score; the latest where none was scored."""
        scored = [(s, self.cursor(s)["score"]) for s in self._manager.all_steps()]
        known = [(score, step) for step, score in scored if score is not None]
        return max(known)[1] if known else self.latest()

    def cursor(self, step: int) -> dict[str, Any]:
        restored = self._manager.restore(step, args=ocp.args.Composite(cursor=ocp.args.JsonRestore()))
        return dict(restored["cursor"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, placed as `like` is."""
        rest = {"opt_state": like.opt_state, "step": like.step, "key": like.key}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            optimizer=ocp.args.StandardRestore(_abstract(rest)),
        )
        restored = self._manager.restore(step, args=items)
        return TrainState(params=restored["params"], **restored["optimizer"])

    def restore_params(self, step: int, shapes: Any) -> Any:
        """The parameters of a step; `shapes` are ShapeDtypeStructs with shardings."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        return self._manager.restore(step, args=items)["params"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def pick_step(checkpoints: Checkpoints, which: str, run_dir: Path) -> int:
    """The step that `which` names: best, last, or a number."""
    step = checkpoints.best() if which == "best" else checkpoints.latest()
    if which not in ("best", "last"):
        step = int(which) if which.isdigit() and int(which) in checkpoints._manager.all_steps() else None
    if step is None:
        raise UserError(f"{run_dir}: holds no checkpoint {which!r}; train it first, or name another with --checkpoint")
    return step


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
