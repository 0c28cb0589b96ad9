"""Report the memory and FLOPs of a run before its first step: each stage's step is compiled from shapes only."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxembed.config import Config, MeshConfig
from jaxembed.data.batch import Batch, HostBatch
from jaxembed.data.pipeline import iter_batches
from jaxembed.devices.chips import GIB
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import compute_batch_shapes
from jaxembed.errors import UserError
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.planning.program import OutOfMemoryError, Program, compile_loss, compile_step, count_bytes, count_elements
from jaxembed.planning.proposal import Proposal, make_step_sizes, propose
from jaxembed.planning.stand_in_negatives import add_stand_in_negatives
from jaxembed.planning.topology import list_topology_devices
from jaxembed.training.stage import Stage
from jaxembed.training.state import compute_state_shapes
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")

MAX_EXAMINED_BATCHES = 8  # per stage; the step is compiled for the largest one


class PlanningTarget(NamedTuple):
    """What to plan for.

    Attributes:
        mesh: The devices, which need not exist here.
        memory: Bytes of memory of a device, or None if that is unknown.
        assignments: Folder that `write_assignments` set, to stop before code generation. None: generate the code.
    """

    mesh: Mesh
    memory: int | None
    assignments: Path | None = None


def make_planning_target(config: MeshConfig, topology: str | None = None, slices: int = 1) -> PlanningTarget:
    """Return the devices to plan for, with their memory.

    Args:
        config: Sizes of the mesh.
        topology: Name of a TPU slice, such as v5e:16x16, which need not exist here. Default: the local devices.
        slices: Number of such slices.
    """
    devices, memory = (None, _get_device_memory()) if topology is None else list_topology_devices(topology, slices)
    return PlanningTarget(make_mesh(**dict(config), devices=devices), memory)


def plan(
    config: Config, target: PlanningTarget, model: EmbeddingModel, stages: Sequence[Stage], *, with_loss: bool = True
) -> dict[str, Any]:
    """Compile the step of every stage for the largest of its first batches, and report memory and FLOPs. No file is written.

    Negatives that a stage will mine are replaced by other texts of the source.

    Args:
        config: Settings of the run.
        target: The devices to plan for (`make_planning_target`).
        model: The model of the run.
        stages: The stages of the run, or some of them.
        with_loss: Whether to report on the loss alone too.

    Returns:
        Number and kind of devices, shape of the mesh, and a report for each stage: parameters, memory, FLOPs, and collectives.

    Raises:
        UserError: A step does not fit the memory of its device.
    """
    reports = []
    for stage in stages:
        host_batch, num_examined = _find_largest_batch(add_stand_in_negatives(stage))
        # The loss comes first: it is smaller, and its compilation may continue in a thread after its memory is known.
        loss = _plan_loss(stage, model, host_batch.batch, target) if with_loss else None
        report = _plan_step(stage, host_batch.batch, config, model, target)
        reports.append(report | {"batches_looked_at": num_examined, "loss": loss})
        _show_report(stage, reports[-1], len(config.stages))
    mesh = target.mesh
    return {"devices": mesh.size, "device": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape), "stages": reports}


def _get_device_memory() -> int | None:
    """Return the bytes of memory of a device here, or None if it does not report that."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _plan_step(stage: Stage, batch: Batch, config: Config, model: EmbeddingModel, target: PlanningTarget) -> dict[str, Any]:
    """Compile the step of a stage for a batch, and return the report of its resources."""
    mesh, memory, assignments = target
    # Find the shapes of the state.
    objective_params = jax.eval_shape(partial(stage.init_objective_params, model), jax.random.key(0))
    state = compute_state_shapes(model, stage.make_optimizer(model), mesh, objective_params, config.model.frozen)
    # Compile, and compare with the memory of a device.
    with jax.set_mesh(mesh):
        step = stage.make_train_step(model, state)
    rows, row_length = batch.row_shapes[0]
    prefix = config.get_key_prefix(stage.index)
    proposal = _propose(model, state, (rows, row_length), mesh, memory)
    try:
        program, _ = compile_step(step, state, compute_batch_shapes(mesh, batch), mesh, assignments)
    except OutOfMemoryError as error:
        raise _make_out_of_memory_error(config, stage, error.needed, error.available, proposal) from None
    if memory is not None and program.memory > memory:
        raise _make_out_of_memory_error(config, stage, program.memory, memory, proposal)
    return _make_report(state, program, memory, mesh) | {
        "rows": rows,
        "row_length": row_length,
        "proposal": proposal and {**dataclasses.asdict(proposal), "settings": proposal.describe(prefix)},
    }


def _propose(
    model: EmbeddingModel, state: TrainState, batch_shape: tuple[int, int], mesh: Mesh, memory: int | None
) -> Proposal | None:
    """Return the proposed settings of a step; None if the memory of a device is unknown, or no settings fit.

    Args:
        model: The model.
        state: Shapes of the state.
        batch_shape: Rows of the batch, and tokens of a row.
        mesh: The devices.
        memory: Bytes of memory of a device. None: unknown.
    """
    if memory is None:
        return None
    parameters, frozen_parameters = count_elements(state.weights), count_elements(state.frozen)
    sizes = make_step_sizes(model.transformer, parameters, model.lora, model.compute.dtype, batch_shape, frozen_parameters)
    return propose(sizes, mesh, memory)


def _plan_loss(stage: Stage, model: EmbeddingModel, batch: Batch, target: PlanningTarget) -> dict[str, Any]:
    """Compile only the loss of vectors with its gradient, and return its memory and communication on a device.

    They are 0 where a stage only predicts tokens.
    """
    if batch.texts is None:
        return {"temporaries": 0, "sent_bytes": 0}
    params = jax.eval_shape(partial(stage.init_objective_params, model), jax.random.key(0))
    program = compile_loss(stage.objectives, params, model.width, batch, target.mesh, target.assignments)
    sent_bytes = sum(c.count * c.sent_bytes for c in program.collectives.collectives)
    return {"temporaries": program.temporaries, "sent_bytes": sent_bytes}


def _find_largest_batch(stage: Stage) -> tuple[HostBatch, int]:
    """Return the batch with the most tokens among the first ones, and the number of batches examined."""
    steps = min(MAX_EXAMINED_BATCHES, stage.config.train.steps)
    first_batches = list(islice(iter_batches(stage.plan, stage.batch_builder, 0, steps), steps))
    return max(first_batches, key=lambda host_batch: host_batch.padded_tokens), len(first_batches)


def _make_report(state: TrainState, program: Program, memory: int | None, mesh: Mesh) -> dict[str, Any]:
    """Return the report of a stage, an object for JSON."""
    memory_parts = dataclasses.asdict(program)
    del memory_parts["collectives"], memory_parts["flops"]
    is_estimate = mesh.devices.flat[0].platform == "cpu"
    return {
        "parameters": count_elements(state.weights),
        "trained": count_elements(state.params),
        "optimizer_bytes": count_bytes(state.opt_state),
        "memory": {**memory_parts, "all": program.memory, "device": memory, "estimate": is_estimate},
        "flops": program.flops,
        "flops_a_device": program.flops // mesh.size,
        "collectives": program.collectives.to_table(),
        "loops_counted_once": program.collectives.unknown_loops,
    }


def _make_out_of_memory_error(
    config: Config, stage: Stage, needed_bytes: int, available_bytes: int, proposal: Proposal | None = None
) -> UserError:
    """Return the error of a step that does not fit. It names settings that fit, or lists those that would lower the memory."""
    model, chunk_rows, prefix = config.model, stage.config.gradcache.rows, config.get_key_prefix(stage.index)
    is_applicable = {
        "mesh.data=1 mesh.fsdp=-1": config.mesh.fsdp == 1 and config.mesh.tensor != -1,
        f"{prefix}gradcache.rows=8": chunk_rows is None,
        f"a smaller {prefix}gradcache.rows": (chunk_rows or 1) > 1,
        "model.remat=true": not model.remat,
        "model.unroll=false": model.unroll,
        "model.dtype=bfloat16": model.dtype == "float32",
        "model.lora": model.lora is None,
    }
    remedies = ", ".join(remedy for remedy, applies in is_applicable.items() if applies) or "more devices"
    where = f"{prefix.removesuffix('.')}: " if prefix else ""
    problem = f"a step needs {_format_bytes(needed_bytes)}, but a device has {_format_bytes(available_bytes)}"
    if proposal is not None:
        return UserError(f"{where}{problem}. By estimates, these settings fit: {proposal.describe(prefix)}.")
    return UserError(f"{where}{problem}. Try {remedies}.")


def _show_report(stage: Stage, report: dict[str, Any], num_stages: int) -> None:
    """Log the report of a stage for a human reader."""
    name = f"stage {stage.index + 1} of {num_stages}: " if num_stages > 1 else ""
    counts = f"{report['parameters']:,} parameters, {report['trained']:,} trained"
    log.info("%s%s, optimizer %s in total", name, counts, _format_bytes(report["optimizer_bytes"]))
    log.info(
        "compiled for %d rows x %d tokens, the largest of the first %d batches",
        report["rows"], report["row_length"], report["batches_looked_at"],
    )  # fmt: skip
    memory = report["memory"]
    names = ("arguments", "outputs", "aliased", "temporaries", "code")
    parts = ", ".join(f"{name} {_format_bytes(memory[name])}" for name in names if memory[name] is not None)
    limit = f"of {_format_bytes(memory['device'])}" if memory["device"] else "(the device does not report how much it has)"
    source = ", estimated by the CPU compiler" if memory["estimate"] else ""
    log.info("memory per device%s: %s %s: %s", source, _format_bytes(memory["all"]), limit, parts)
    log.info("%.3g FLOPs in matmuls per step, %.3g per device", report["flops"], report["flops_a_device"])
    for scope, kinds in report["collectives"].items():
        for kind, totals in kinds.items():
            results, sent = _format_bytes(totals["result_bytes"]), _format_bytes(totals["sent_bytes"])
            log.info("collectives of %s: %s %s, results %s, sent %s", scope, f"{totals['count']:,}", kind, results, sent)
    if loss := report["loss"]:
        log.info(
            "loss alone: %s of temporaries per device, sent %s",
            _format_bytes(loss["temporaries"]), _format_bytes(loss["sent_bytes"]),
        )  # fmt: skip
    if proposal := report["proposal"]:
        size = _format_bytes(proposal["memory"])
        log.info("proposal, estimated and not compiled: %s (%s, %.3g s)", proposal["settings"], size, proposal["seconds"])
    if report["loops_counted_once"]:
        log.info("%d loops have unknown iterations: their collectives are counted once", report["loops_counted_once"])


def _format_bytes(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (GIB >> 10, "MiB"), (GIB >> 20, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:.0f} bytes"
