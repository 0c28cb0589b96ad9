"""The collectives of a compiled program, out of its HLO text: how often each runs, how much it moves, and for what."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # of other types the digits in their names are

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
BODY = re.compile(r"body=%?([\w.\-]+)")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")
GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
# Messages between slices: on TPUs the hosts carry them, and the program only hands them over.
ACROSS = re.compile(r' send\(.*_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')
BETWEEN = " between slices"
CHANNEL = re.compile(r"channel_id=(\d+)")
SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that a program runs `count` times a step, between the devices of a slice, or between slices as its kind says.

    `result_bytes` is its result's size on a device, once; `sent_bytes` what a device sends, once, where the `devices` (or
    slices) of a group stand in a ring. `scope` is the part of the step that it belongs to, by the names in its metadata: the
    TPU compiler leaves these out where there are several slices.
    """

    kind: str
    count: int
    result_bytes: int
    devices: int
    scope: str

    @property
    def sent_bytes(self) -> float:
        others = (self.devices - 1) / self.devices
        turns = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return self.result_bytes * turns.get(self.kind.removesuffix(BETWEEN), others)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Those of a program; `unknown_loops` are loops whose turns the text does not say, counted as one."""

    found: tuple[Collective, ...]
    unknown_loops: int

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """By scope and kind: how many a step, the bytes of their results and those that a device sends."""
        rows: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(dict)
        for one in self.found:
            row = rows[one.scope].setdefault(one.kind, {"count": 0, "result_bytes": 0, "sent_bytes": 0})
            row["count"] += one.count
            row["result_bytes"] += one.count * one.result_bytes
            row["sent_bytes"] += round(one.count * one.sent_bytes)
        return dict(rows)


def collectives(text: str, scopes: tuple[str, ...]) -> Collectives:
    """The collectives of a compiled program's text. A scope is a name of `jax.named_scope`; what has none is `other`."""
    computations, entry = _computations(text)
    times, unknown = _times(computations, entry)
    found: dict[str, Collective] = {}  # by channel: on TPUs one that overlaps others stands in every piece of its way
    for name, lines in computations.items():
        for line in lines:
            one = _collective(line, times[name], scopes) if times[name] else None
            if one is not None:
                channel = CHANNEL.search(line)
                found.setdefault(channel[1] if channel else f"{name} {line}", one)
    return Collectives(tuple(found.values()), unknown)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if begin := COMPUTATION.match(line):
            lines = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
    """How often each computation runs, and the number of loops with collectives whose turns are unknown."""
    times: dict[str, int] = collections.defaultdict(int)
    unknown = 0

    def run(name: str, count: int) -> bool:
        nonlocal unknown
        times[name] += count
        speaks = False
        for line in computations.get(name, ()):
            turns = _turns(line, computations) if " while(" in line else 1
            inside = [run(called, count * (turns or 1)) for called in _called(line)]
            unknown += turns is None and any(inside)
            speaks |= any(inside) or ACROSS.search(line) is not None
            speaks |= any(f" {kind}(" in line or f" {kind}-start(" in line for kind in KINDS)
        return speaks

    run(entry, 1)
    return times, unknown


def _called(line: str) -> Iterator[str]:
    yield from CALLED.findall(line)
    for branches in BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _turns(line: str, computations: dict[str, list[str]]) -> int | None:
    """The turns of a loop: as its line says, else the one number that its condition compares with."""
    if told := TRIPS.search(line):
        return int(told[1])
    condition = CONDITION.search(line)
    numbers = CONSTANT.findall("\n".join(computations.get(condition[1], ()))) if condition else []
    return int(numbers[0]) if len(numbers) == 1 else None


def _collective(line: str, count: int, scopes: tuple[str, ...]) -> Collective | None:
    if across := ACROSS.search(line):
        return _between_slices(line, len(across[1].split(",")), across[2], count)
    instruction = INSTRUCTION.match(line)
    kind = instruction[3].removesuffix("-start") if instruction else ""
    if instruction is None or kind not in KINDS:
        return None
    shapes = [_size(*array) for array in ARRAY.findall(instruction[2])]
    if instruction[3].endswith("-start") and kind != "all-reduce":
        shapes = shapes[1:2]  # (operand, result, ...)
    scope = SCOPE.search(line)
    parts = re.findall(r"\w+", scope[1]) if scope else []
    return Collective(kind, count, sum(shapes), _group(line), next((s for s in scopes if s in parts), "other"))


def _between_slices(line: str, slices: int, transfer: str, count: int) -> Collective:
    """One of the host's, by the array that it is given; such programs do not say what it is for."""
    kind, (given, *_) = transfer.lower().replace("_", "-"), ARRAY.findall(line)
    shares = {"all-gather": slices, "reduce-scatter": 1 / slices}
    return Collective(kind + BETWEEN, count, round(_size(*given) * shares.get(kind, 1)), slices, "other")


def _group(line: str) -> int:
    """How many devices speak with each other: {{0,1},...}, [groups,devices] or mesh['a'=4,'b'=2] {'b'}."""
    groups = GROUPS.search(line)
    if groups is None:
        return 1
    if groups[1]:
        return len(groups[1].split(","))
    if groups[2]:
        return int(groups[2])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[3]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[4]))


def _size(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) or int("".join(re.findall(r"\d+", dtype)[:1]) or 0)
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
