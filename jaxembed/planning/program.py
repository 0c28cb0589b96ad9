"""Compile a train step ahead of time from shapes, and read the compiler's report about it."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxembed.devices.mesh import count_shards
from jaxembed.devices.placement import compute_batch_shapes
from jaxembed.losses.objectives import Objectives
from jaxembed.planning.assignment import compile_until_assigned
from jaxembed.planning.collectives import Collectives, find_collectives
from jaxembed.planning.flops import count_matmul_flops
from jaxembed.training.step import SCOPES, TrainState

log = logging.getLogger("jaxembed")

# XLA's error for a program that is too large for a TPU.
OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Program:
    """The resources that a compiled program needs.

    Attributes:
        arguments: Bytes of the arguments on a device.
        outputs: Bytes of the outputs on a device.
        aliased: Bytes of outputs that reuse the memory of arguments. They are counted in `arguments` and in `outputs`.
        temporaries: Bytes of temporary buffers on a device.
        code: Bytes of the program itself; None if its code was not generated.
        flops: FLOPs of all matmuls, over all devices.
        collectives: The collectives of the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int | None
    flops: int
    collectives: Collectives

    @property
    def memory(self) -> int:
        """Bytes that the program needs on a device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + (self.code or 0)


class OutOfMemoryError(Exception):
    """A program does not fit the memory of its device.

    Attributes:
        needed: Bytes that it needs.
        available: Bytes that the device has.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} bytes of {available}")
        self.needed, self.available = needed, available


def compile_step(step: Any, state: TrainState, batch: Any, mesh: Mesh, assignments: Path | None = None) -> tuple[Program, Any]:
    """Compile a jitted train step for shapes with shardings.

    Args:
        step: The jitted step.
        state: Shapes of the state.
        batch: Shapes of the batch.
        mesh: The device mesh.
        assignments: Folder that `write_assignments` set, to stop before code generation. None: generate the code.

    Returns:
        The resources of the program, and the compiled step, or None if its code is not generated.

    Raises:
        OutOfMemoryError: The program is too large for a TPU. Other compilers do not check this.
    """
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch)
        try:
            return _compile(traced, assignments)
        except jax.errors.JaxRuntimeError as error:
            match = OUT_OF_MEMORY.search(str(error))
            if match is None:
                raise
            needed, needed_unit, available, available_unit = match.groups()
            raise OutOfMemoryError(
                round(float(needed) * UNIT_BYTES[needed_unit]), round(float(available) * UNIT_BYTES[available_unit])
            ) from None


def compile_loss(
    objectives: Objectives, params: Any, width: int, batch: Any, mesh: Mesh, assignments: Path | None = None
) -> Program:
    """Compile the loss and its gradient with respect to the vectors, without a model, for the shapes of a batch.

    Args:
        objectives: The objectives.
        params: Shapes of the parameters of the objectives.
        width: Width of the vectors.
        batch: A batch, or its shapes.
        mesh: The device mesh.
        assignments: As in `compile_step`.
    """
    documents = jax.ShapeDtypeStruct((*batch.doc_slot.shape, width), jnp.float32)
    queries = jax.ShapeDtypeStruct((documents.shape[0], width), jnp.float32)

    def loss(queries: jax.Array, documents: jax.Array, batch: Any, params: Any) -> jax.Array:
        return objectives(queries, documents, batch, jax.random.key(0), params, count_shards(mesh))[0]

    shapes = compute_batch_shapes(mesh, (queries, documents, dataclasses.replace(batch, texts=None, token_batches={})))
    with jax.set_mesh(mesh):
        return _compile(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes, params), assignments)[0]


def _compile(traced: jax.stages.Traced, assignments: Path | None) -> tuple[Program, Any]:
    """Compile a traced function. Return its resources, and itself if its code is generated."""
    lowered, flops = traced.lower(), count_matmul_flops(traced.jaxpr)
    if assignments is not None:
        assignment = compile_until_assigned(lowered, traced.fun_name, assignments)
        sizes, text = {name: size for name, size in vars(assignment).items() if name != "hlo"}, assignment.hlo
        return Program(**sizes, code=None, flops=flops, collectives=find_collectives(text, SCOPES)), None
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    program = Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops,
        collectives=find_collectives(_read_program_text(compiled), SCOPES),
    )
    return program, compiled


def _read_program_text(compiled: Any) -> str:
    """Return the HLO text of a program; empty if XLA cannot print it.

    libtpu 0.0.51 cannot print some programs whose collectives overlap with computation.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        log.warning("collectives are not counted: XLA cannot print the program (%s)", str(error).splitlines()[0][:160])
        return ""


def count_elements(tree: Any) -> int:
    """Count the elements of a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """Count the bytes of a tree of arrays or shapes. Replicated arrays count once."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
