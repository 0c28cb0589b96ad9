"""Read the memory of a step from the TPU compiler's buffer assignment, before the compiler generates machine code.

Code generation takes more than nine tenths of a compilation, and a plan does not need the code. XLA has no option to stop
before it, but it can dump its buffer assignment to a folder (`write_assignments`). So a child process compiles the program in a
thread, waits for these files, and ends without waiting for the thread (`run_in_child`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jaxembed.errors import UserError

T = TypeVar("T")
FILE_POLL_INTERVAL_S = 0.05
# Name endings of the files that XLA dumps for a module: its optimized HLO, its buffer assignment, and one written after both.
HLO_SUFFIX, ASSIGNMENT_SUFFIX, FINISHED_SUFFIX = (
    f"after_optimizations{suffix}.txt" for suffix in ("", "-buffer-assignment", "_after_buffer_assignment")
)
# The line of a buffer in an assignment: its size in bytes, and its properties.
ALLOCATION_LINE = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.M)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The memory of a program on a device, in bytes (see `jaxembed.planning.program.Program`), and its optimized HLO."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    hlo: str


def write_assignments(folder: Path) -> None:
    """Let XLA dump its buffer assignments to a folder. Call it before JAX compiles for the first time."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_(train_step|loss)$"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def compile_until_assigned(lowered: Any, name: str, folder: Path) -> Assignment:
    """Compile a lowered function in a thread, and return its memory as soon as XLA has dumped the buffer assignment.

    Args:
        lowered: The lowered function.
        name: Its name. No other function of the process has it.
        folder: The folder of `write_assignments`.

    Raises:
        Exception: The compiler failed, with its exception.
    """
    errors: list[Exception] = []

    def compile_and_keep_error() -> None:
        try:
            lowered.compile()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=compile_and_keep_error, daemon=True)
    thread.start()
    while True:
        is_done = not thread.is_alive()  # before the files are listed: then none can appear afterwards
        if errors:
            raise errors[0]
        if finished_files := list(folder.glob(f"*.jit_{name}.*{FINISHED_SUFFIX}")):
            stem = finished_files[0].name.removesuffix(FINISHED_SUFFIX)
            return parse_assignment(*((folder / f"{stem}{suffix}").read_text() for suffix in (ASSIGNMENT_SUFFIX, HLO_SUFFIX)))
        if is_done:
            raise RuntimeError(f"XLA wrote no assignment of {name} to {folder}")
        time.sleep(FILE_POLL_INTERVAL_S)


def parse_assignment(text: str, hlo: str) -> Assignment:
    """Return the memory that a dumped buffer assignment lists. Only buffers in the memory of the device count.

    Args:
        text: Text of the assignment.
        hlo: Optimized HLO text of the program.
    """
    sizes = {"arguments": 0, "outputs": 0, "aliased": 0, "temporaries": 0}
    for size, properties in _iter_buffers(text):
        is_argument, is_output = "parameter " in properties, "maybe-live-out" in properties
        sizes["arguments"] += size * is_argument
        sizes["outputs"] += size * is_output
        sizes["aliased"] += size * (is_argument and is_output)
        sizes["temporaries"] += size * (not is_argument and not is_output)
    return Assignment(**sizes, hlo=hlo)


def _iter_buffers(text: str) -> Iterator[tuple[int, str]]:
    """Yield the size in bytes and the properties of each buffer in the memory of the device."""
    for size, properties in ALLOCATION_LINE.findall(text):
        # XLA marks other memories of a device, such as VMEM, by a color other than the default.
        if not re.search(r"\bcolor \d|thread-local", properties):
            yield int(size), properties


def run_in_child(function: Callable[[], T]) -> T:
    """Run a function in a forked process, and return its result. Threads that it leaves behind end with the process.

    Raises:
        UserError: The process was killed.
        Exception: The function failed, with its exception.
    """
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        _send_result(function, sender)
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        raise UserError(
            f"--topology: the process that compiles ended with code {code}. Check that it has enough memory."
        ) from None
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    os.waitpid(child, 0)
    if not succeeded:
        raise result
    return result


def _send_result(function: Callable[[], Any], sender: Connection) -> NoReturn:
    """Send (whether it succeeded, its result or exception), and end this process with all of its threads."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        message: tuple[bool, Any] = True, function()
    except Exception as error:
        message = False, error
    except BaseException:  # a signal that interrupts the parent too, which prints a line
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(message)
    os._exit(0)


def _end_with_parent(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
