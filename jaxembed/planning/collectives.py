"""Read the collectives of a compiled program from its HLO text: how often each one runs, its bytes, and its purpose."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVE_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
DTYPE_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # the names of other dtypes contain their bits, as f32
BETWEEN_SLICES = " between slices"

# A line that opens a computation, and an instruction in it: name, result type, operation.
COMPUTATION_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
HLO_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
ARRAY_TYPE = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
# The computations that an instruction calls.
CALLED_COMPUTATION = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCH_COMPUTATIONS = re.compile(r"branch_computations=\{([^}]*)\}")
# The number of iterations of a loop.
LOOP_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
INTEGER_CONSTANT = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")
# The groups of devices of a collective, its id, and the JAX operation that it belongs to.
REPLICA_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
CHANNEL_ID = re.compile(r"channel_id=(\d+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')
# A collective between slices. On TPUs the hosts run it, so the program of a device contains only the transfer to its host.
HOST_SEND = re.compile(r' send\(.*_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, between the devices of a slice, or between slices (as its kind says).

    Attributes:
        kind: Name of the operation, such as all-gather or "all-gather between slices".
        count: How often it runs in a step.
        result_bytes: Size of its result on a device, each time it runs.
        devices: Number of devices (or slices) in a group.
        scope: Part of the step that it belongs to, by the names in its metadata. The TPU compiler omits these names if there
            are several slices.
    """

    kind: str
    count: int
    result_bytes: int
    devices: int
    scope: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends each time it runs, if the devices (or slices) of a group form a ring."""
        share = (self.devices - 1) / self.devices
        factors = {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return self.result_bytes * factors.get(self.kind.removesuffix(BETWEEN_SLICES), share)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of a program.

    Attributes:
        collectives: The collectives of every kind and scope.
        unknown_loops: Number of loops with collectives and an unknown number of iterations. They are counted once.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int

    def to_table(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the totals of a step by scope and kind: count, bytes of the results, bytes sent by a device."""
        scopes: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(dict)
        for collective in self.collectives:
            row = scopes[collective.scope].setdefault(collective.kind, {"count": 0, "result_bytes": 0, "sent_bytes": 0})
            row["count"] += collective.count
            row["result_bytes"] += collective.count * collective.result_bytes
            row["sent_bytes"] += round(collective.count * collective.sent_bytes)
        return dict(scopes)


def find_collectives(text: str, scopes: tuple[str, ...]) -> Collectives:
    """Find the collectives in the HLO text of a compiled program.

    Args:
        text: The HLO text.
        scopes: Names given by `jax.named_scope`. A collective outside all of them has the scope "other".
    """
    computations, entry = _split_computations(text)
    run_counts, unknown_loops = _count_runs(computations, entry)
    # On TPUs a collective that overlaps with computation is repeated in every fusion on its way. Its channel identifies it.
    collectives: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            collective = _parse_collective(line, run_counts[name], scopes) if run_counts[name] else None
            if collective is not None:
                channel = CHANNEL_ID.search(line)
                collectives.setdefault(channel[1] if channel else f"{name} {line}", collective)
    return Collectives(tuple(collectives.values()), unknown_loops)


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := COMPUTATION_HEADER.match(line):
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _count_runs(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
    """Return how often each computation runs, and the number of loops with collectives and unknown iterations."""
    run_counts: dict[str, int] = collections.defaultdict(int)
    unknown_loops = 0

    def visit(name: str, count: int) -> bool:
        """Add `count` runs of a computation and of all that it calls. Return whether there is a collective in it."""
        nonlocal unknown_loops
        run_counts[name] += count
        has_collectives = False
        for line in computations.get(name, ()):
            trips = _find_trip_count(line, computations) if " while(" in line else 1
            callees_communicate = [visit(called_name, count * (trips or 1)) for called_name in _iter_called_computations(line)]
            unknown_loops += trips is None and any(callees_communicate)
            has_collectives |= any(callees_communicate) or HOST_SEND.search(line) is not None
            has_collectives |= any(f" {kind}(" in line or f" {kind}-start(" in line for kind in COLLECTIVE_KINDS)
        return has_collectives

    visit(entry, 1)
    return run_counts, unknown_loops


def _iter_called_computations(line: str) -> Iterator[str]:
    """Yield the names of the computations that an instruction calls, whether or not a condition selects them."""
    yield from CALLED_COMPUTATION.findall(line)
    for branches in BRANCH_COMPUTATIONS.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _find_trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """Return the number of iterations of a loop: the one in its line, otherwise the only constant in its condition."""
    if match := TRIP_COUNT.search(line):
        return int(match[1])
    condition = LOOP_CONDITION.search(line)
    constants = INTEGER_CONSTANT.findall("\n".join(computations.get(condition[1], ()))) if condition else []
    return int(constants[0]) if len(constants) == 1 else None


def _parse_collective(line: str, count: int, scopes: tuple[str, ...]) -> Collective | None:
    """Return the collective in a line that runs `count` times, or None if the line has none."""
    if send := HOST_SEND.search(line):
        return _parse_send(line, len(send[1].split(",")), send[2], count)
    instruction = HLO_INSTRUCTION.match(line)
    kind = instruction[3].removesuffix("-start") if instruction else ""
    if instruction is None or kind not in COLLECTIVE_KINDS:
        return None
    arrays = ARRAY_TYPE.findall(instruction[2])
    if instruction[3].endswith("-start") and kind != "all-reduce":  # operands, results, and scalars for synchronization
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    sizes = [_count_array_bytes(*array) for array in arrays]
    op_name = OP_NAME.search(line)
    names = re.findall(r"\w+", op_name[1]) if op_name else []
    scope = next((scope for scope in scopes if scope in names), "other")
    return Collective(kind, count, sum(sizes), _find_group_size(line), scope)


def _parse_send(line: str, slices: int, transfer: str, count: int) -> Collective:
    """Return a collective between slices, given the line that sends its operand to the host. The line names no scope."""
    kind, (operand, *_) = transfer.lower().replace("_", "-"), ARRAY_TYPE.findall(line)
    result_per_operand = {"all-gather": slices, "reduce-scatter": 1 / slices}
    result_bytes = round(_count_array_bytes(*operand) * result_per_operand.get(kind, 1))
    return Collective(kind + BETWEEN_SLICES, count, result_bytes, slices, "other")


def _find_group_size(line: str) -> int:
    """Return the number of devices in a group: {{0,1},...}, [groups,devices] or mesh['a'=4,'b'=2] {'b'}."""
    groups = REPLICA_GROUPS.search(line)
    if groups is None:
        return 1
    if groups[1]:
        return len(groups[1].split(","))
    if groups[2]:
        return int(groups[2])
    axis_sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[3]))
    return math.prod(int(axis_sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[4]))


def _count_array_bytes(dtype: str, shape: str) -> int:
    bits = DTYPE_BITS.get(dtype) or int("".join(re.findall(r"\d+", dtype)[:1]) or 0)
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
