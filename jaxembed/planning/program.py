"""A training step compiled ahead of time, from shapes alone, and what the compiler tells of it."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.planning.collectives import Collectives, collectives
from jaxembed.planning.flops import product_flops
from jaxembed.training.step import SCOPES, TrainState

log = logging.getLogger("jaxembed")

NO_ROOM = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Program:
    """Counts of numbers, bytes and operations. Memory is that of a device; what is aliased stands in the arguments too.

    `flops` are those of all devices in products.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: int
    collectives: Collectives

    @property
    def memory(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class NoRoom(Exception):
    """A program does not fit the memory of its device: bytes needed and bytes there."""

    def __init__(self, needed: int, there: int):
        super().__init__(f"{needed} bytes of {there}")
        self.needed, self.there = needed, there


def compile_step(step: Any, state: TrainState, batch: Any, mesh: Mesh) -> tuple[Program, Any]:
    """What is known of a jitted step on shapes with shardings, and the compiled step. `NoRoom` where a TPU cannot hold it."""
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            found = NO_ROOM.search(str(error))
            if found is None:
                raise
            used, unit, there, unit_there = found.groups()
            raise NoRoom(round(float(used) * UNITS[unit]), round(float(there) * UNITS[unit_there])) from None
    memory = compiled.memory_analysis()
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=product_flops(traced.jaxpr),
        collectives=collectives(_text(compiled), SCOPES),
    ), compiled


def _text(compiled: Any) -> str:
    """The program's text; none where XLA cannot write it, as of some programs whose messages overlap (libtpu 0.0.51)."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        log.warning("collectives are not counted: XLA cannot print the program (%s)", str(error).splitlines()[0][:160])
        return ""


def numbers(tree: Any) -> int:
    """How many numbers a tree of arrays or shapes has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Its bytes, over all devices, what stands on several of them once."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
