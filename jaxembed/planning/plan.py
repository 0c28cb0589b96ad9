"""What a run would need, told before its first step: each stage's step compiled from shapes, without weights and memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.config import Config, MeshConfig
from jaxembed.data.batch import HostBatch
from jaxembed.data.pipeline import iter_batches
from jaxembed.devices.chips import GIB
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import batch_shapes
from jaxembed.errors import UserError
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.planning.program import NoRoom, Program, compile_step, numbers, size
from jaxembed.planning.topology import topology_devices
from jaxembed.training.stage import Stage
from jaxembed.training.state import state_shapes
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")

LOOKED_AT = 8  # batches of a stage, of which the largest is compiled for


def planning_mesh(config: MeshConfig, topology: str | None = None, slices: int = 1) -> tuple[Mesh, int | None]:
    """Return the mesh to plan for, and the memory of one of its devices in bytes if it is known.

    Args:
        config: Sizes of the mesh.
        topology: Name of a TPU slice that is not here, such as v5e:16x16. Default: the devices here.
        slices: Number of such slices.
    """
    devices, memory = (None, _memory_here()) if topology is None else topology_devices(topology, slices)
    return make_mesh(**dict(config), devices=devices), memory


def plan(config: Config, mesh: Mesh, memory: int | None, model: EmbeddingModel, stages: Sequence[Stage]) -> dict[str, Any]:
    """Compile the largest known step of every stage and report what it needs. Nothing is written.

    Args:
        config: Settings of the run.
        mesh: The devices.
        memory: Bytes of memory of a device, or None if unknown.
        model: The model of the run.
        stages: The stages of the run.

    Raises:
        UserError: A step does not fit the memory of its device.
    """
    rows = [_plan_stage(stage, config, model, mesh, memory) for stage in stages]
    for stage, row in zip(stages, rows, strict=True):
        _show(stage, row, len(stages))
    return {"devices": mesh.size, "device": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape), "stages": rows}


def _memory_here() -> int | None:
    """Bytes of a device that is here; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _plan_stage(stage: Stage, config: Config, model: EmbeddingModel, mesh: Mesh, memory: int | None) -> dict[str, Any]:
    """Compile the largest known step of a stage and return what it needs."""
    state = state_shapes(stage, model, mesh)
    host, examined = _largest(stage)
    with jax.set_mesh(mesh):
        step = stage.make_train_step(model, state)
    try:
        program, _ = compile_step(step, state, batch_shapes(mesh, host.batch), mesh)
    except NoRoom as error:
        raise _no_room(config, stage, error.needed, error.there) from None
    if memory is not None and program.memory > memory:
        raise _no_room(config, stage, program.memory, memory)
    rows, tokens = host.batch.texts.tokens.shape
    return _row(state, program, memory, mesh) | {"rows": rows, "row_length": tokens, "batches_looked_at": examined}


def _largest(stage: Stage) -> tuple[HostBatch, int]:
    """The batch of most tokens among the first, and how many those are."""
    steps = min(LOOKED_AT, stage.config.train.steps)
    first = list(islice(iter_batches(stage.plan, stage.build, 0, steps), steps))
    return max(first, key=lambda host: host.padded_tokens), len(first)


def _row(state: TrainState, program: Program, memory: int | None, mesh: Mesh) -> dict[str, Any]:
    parts = dataclasses.asdict(program)
    del parts["collectives"], parts["flops"]
    return {
        "parameters": numbers(state.weights),
        "trained": numbers(state.params),
        "optimizer_bytes": size(state.opt_state),
        "memory": {**parts, "all": program.memory, "device": memory, "estimate": mesh.devices.flat[0].platform == "cpu"},
        "flops": program.flops,
        "flops_a_device": program.flops // mesh.size,
        "collectives": program.collectives.table(),
        "loops_counted_once": program.collectives.unknown_loops,
    }


def _no_room(config: Config, stage: Stage, needed: int, there: int) -> UserError:
    """One line, with those settings that are not yet as they would help."""
    model = config.model
    helps = {
        "mesh.fsdp=-1": config.mesh.fsdp == 1,
        "gradcache.rows=8": stage.config.gradcache.rows is None,
        "a smaller gradcache.rows": (stage.config.gradcache.rows or 1) > 1,
        "model.remat=true": not model.remat,
        "model.unroll=false": model.unroll,
        "model.dtype=bfloat16": model.dtype == "float32",
        "model.lora": model.lora is None,
    }
    which = f"stages.{stage.index}: " if stage.index else ""
    told = f"{which}a step needs {_told(needed)} of a device that has {_told(there)}"
    return UserError(f"{told}; try {', '.join(name for name, open_ in helps.items() if open_) or 'more devices'}")


def _show(stage: Stage, row: dict[str, Any], count: int) -> None:
    """The same for a reader."""
    memory, name = row["memory"], f"stage {stage.index + 1} of {count}: " if count > 1 else ""
    counts = f"{row['parameters']:,} parameters, {row['trained']:,} trained"
    log.info("%s%s, optimizer %s in all", name, counts, _told(row["optimizer_bytes"]))
    log.info(
        "compiled for %d rows x %d tokens, the largest of the first %d batches",
        row["rows"], row["row_length"], row["batches_looked_at"],
    )  # fmt: skip
    parts = ", ".join(f"{part} {_told(memory[part])}" for part in ("arguments", "outputs", "aliased", "temporaries", "code"))
    there = f"of {_told(memory['device'])}" if memory["device"] else "(the device does not tell how much it has)"
    how = ", an estimate by the CPU's compiler" if memory["estimate"] else ""
    log.info("memory a device%s: %s %s: %s", how, _told(memory["all"]), there, parts)
    log.info("%.3g FLOPs in products a step, %.3g a device", row["flops"], row["flops_a_device"])
    for scope, kinds in row["collectives"].items():
        for kind, of_kind in kinds.items():
            results, sent = _told(of_kind["result_bytes"]), _told(of_kind["sent_bytes"])
            log.info("collectives of %s: %s %s, results %s, sent %s", scope, f"{of_kind['count']:,}", kind, results, sent)
    if row["loops_counted_once"]:
        log.info("the turns of %d loops are unknown: their collectives are counted once", row["loops_counted_once"])


def _told(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (GIB >> 10, "MiB"), (GIB >> 20, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:.0f} bytes"
