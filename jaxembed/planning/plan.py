"""What a run would need, told before its first step: each stage's step compiled from shapes, without weights and memory."""

from __future__ import annotations

import dataclasses
import logging
from itertools import islice
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.config import Config
from jaxembed.data.batch import HostBatch
from jaxembed.data.pipeline import batches
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import batch_shapes
from jaxembed.errors import UserError
from jaxembed.planning.program import NoRoom, Program, compile_step, numbers, size
from jaxembed.planning.topology import GIB, topology_devices
from jaxembed.runs.stages import Stage, state_shapes
from jaxembed.runs.train import open_stages
from jaxembed.training.step import TrainState, make_train_step

log = logging.getLogger("jaxembed")

LOOKED_AT = 8  # batches of a stage, of which the largest is compiled for


def plan(config: Config, topology: str | None, slices: int = 1) -> dict[str, Any]:
    """Compiles the largest known step of every stage and tells what it needs; nothing is written.

    `topology` names a slice that is not here, of which there are `slices`. `UserError` where a step does not fit the memory of
    its device.
    """
    devices, memory = (None, _memory_here()) if topology is None else topology_devices(topology, slices)
    mesh = make_mesh(**dict(config.mesh), devices=devices)
    model, stages = open_stages(config, mesh)
    told = [_of_stage(stage, model, mesh, memory) for stage in stages]
    for stage, row in zip(stages, told, strict=True):
        _show(stage, row, len(stages))
    return {"devices": mesh.size, "device": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape), "stages": told}


def _memory_here() -> int | None:
    """Bytes of a device that is here; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _of_stage(stage: Stage, model: Any, mesh: Mesh, memory: int | None) -> dict[str, Any]:
    own = jax.eval_shape(lambda: stage.objectives.new_params(model.width, stage.teacher_width, jax.random.key(0)))
    optimizer = stage.optimizer(bool(model.adapters))
    state = state_shapes(optimizer, model, mesh, own)
    host, looked_at = _largest(stage)
    config, placed = stage.config, jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        skip = config.train.on_nan == "skip"
        step = make_train_step(model, stage.objectives, optimizer, stage.schedule, skip, config.gradcache.rows, placed)
    try:
        program, _ = compile_step(step, state, batch_shapes(mesh, host.batch), mesh)
    except NoRoom as error:
        raise _no_room(config, stage, error.needed, error.there) from None
    if memory is not None and program.memory > memory:
        raise _no_room(config, stage, program.memory, memory)
    rows, tokens = host.batch.texts.tokens.shape
    return _row(state, program, memory, mesh) | {"rows": rows, "row_length": tokens, "batches_looked_at": looked_at}


def _largest(stage: Stage) -> tuple[HostBatch, int]:
    """The batch of most tokens among the first, and how many those are."""
    steps = min(LOOKED_AT, stage.config.train.steps)
    first = list(islice(batches(stage.plan, stage.build, 0, steps), steps))
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
        "gradcache.rows=8": config.gradcache.rows is None,
        "a smaller gradcache.rows": (config.gradcache.rows or 1) > 1,
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
