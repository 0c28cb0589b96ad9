"""Several processes that train one model: how they join, exchange messages, and leave.

A process that runs alone is a group of one: everything here works, and nothing waits.

- Joining and leaving use `jax.distributed`.
- Messages between processes go through `KeyValueStore`, which names the private JAX API that remains and why.
- Stopping at the same step uses `jax.experimental.multihost_utils.reached_preemption_sync_point`.
- `jaxembed.devices.group_exit` ends all processes where one fails, dies or hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from jaxembed.devices.group_exit import FIRST_PROCESS_LOST, RESUME_HINT, GroupMonitor, report_jax_aborts, stop_reporting_aborts
from jaxembed.devices.key_value_store import KeyValueStore, get_process_index_and_count
from jaxembed.devices.standard_streams import LossyStream
from jaxembed.errors import Stopped, UserError, explain_system_error, get_interrupt_signal, summarize

ADDRESS_VARIABLE, COUNT_VARIABLE, INDEX_VARIABLE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
MAX_JOIN_S = 86_400
POLL_INTERVAL_S = 1.0
JOIN_REMINDER_S = 10.0  # after this time, a log line says what the start waits for
COUNT_KEY = "jaxembed/count"
# Parts of JAX's error messages that mean that another process is gone.
CONNECTION_ERRORS = ("Gloo", "NCCL", "UNAVAILABLE", "CoordinationService", "DEADLINE_EXCEEDED", "Barrier")

log = logging.getLogger("jaxembed")

T = TypeVar("T")


@dataclasses.dataclass
class _Group:
    """The group of this process.

    Attributes:
        index: Index of this process.
        count: Number of processes.
        store: Their shared store; None for a process that runs alone.
        channels: Number of channels that this process has opened.
        has_ended: Whether the processes have left the group.
    """

    index: int = 0
    count: int = 1
    store: KeyValueStore | None = None
    channels: int = 0
    has_ended: bool = False


_group = _Group()


def index() -> int:
    """Return the index of this process in the run."""
    return _group.index


def count() -> int:
    """Return the number of processes of the run."""
    return _group.count


def is_first() -> bool:
    """Return whether this is process 0, which writes the files, the log and the progress of the run."""
    return _group.index == 0


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm[Any]:
    """Return a tqdm bar on standard error. Only process 0 shows it."""
    return tqdm(iterable, disable=disable or not is_first(), file=LossyStream(sys.stderr), **options)


@contextlib.contextmanager
def process_group(limit_s: float) -> Iterator[None]:
    """Run the block as one of the processes of a run, if there are several.

    Enter it before any device is used. The processes leave it together. An error in one of them ends all, each with one line.
    So does a process that does not respond for two minutes, or for half of `limit_s` if that is shorter.

    Args:
        limit_s: Seconds within which the processes must have joined, and within which all must have ended if one is lost.
    """
    _join(limit_s)
    if _group.store is None:
        yield
        return
    monitor = GroupMonitor(_group.store, index(), count(), limit_s)
    monitor.start()
    try:
        check_same_count(_group.store, count(), limit_s)
        yield
    except Stopped:
        _leave(monitor)
        raise
    except KeyboardInterrupt as interrupt:
        monitor.end_all(128 + get_interrupt_signal(interrupt), "interrupted")
    except UserError as error:
        monitor.end_all(2, str(error))
    except BaseException as error:
        if line := explain_system_error(error):
            monitor.end_all(2, line)
        if not isinstance(error, Exception):
            raise
        if is_connection_error(error):
            monitor.exit_if_group_ends()
            reason = summarize(error, 120)
            monitor.end_all(1, f"another process has ended or cannot be reached ({reason}). {RESUME_HINT}")
        traceback.print_exc()
        monitor.end_all(1, f"{type(error).__name__}: {summarize(error)}")
    _leave(monitor)


def _join(limit_s: float) -> None:
    """Join the other processes of the run, if there are any.

    JAX finds them on Slurm, Open MPI, Kubernetes and Cloud TPUs. Elsewhere three environment variables name them.
    """
    import jax

    variables = {name: os.environ[name] for name in (ADDRESS_VARIABLE, COUNT_VARIABLE, INDEX_VARIABLE) if os.environ.get(name)}
    for name in (COUNT_VARIABLE, INDEX_VARIABLE):
        if name in variables and not variables[name].isdecimal():
            raise UserError(f"{name}: not an integer ({variables[name]!r})")
    if variables.get(INDEX_VARIABLE) == "0" and ADDRESS_VARIABLE in variables:
        _check_port_is_free(variables[ADDRESS_VARIABLE])
    seconds = min(math.ceil(limit_s), MAX_JOIN_S)
    report_jax_aborts(f"the processes could not join in {seconds} s: another one has ended, or was not started. {RESUME_HINT}")
    reminder = threading.Timer(JOIN_REMINDER_S, log.warning, ["waiting up to %d s for the other processes to start", seconds])
    reminder.daemon = True
    reminder.start()
    try:
        jax.distributed.initialize(  # it reads only the address from the environment itself
            num_processes=int(variables[COUNT_VARIABLE]) if COUNT_VARIABLE in variables else None,
            process_id=int(variables[INDEX_VARIABLE]) if INDEX_VARIABLE in variables else None,
            initialization_timeout=seconds,  # nodes of one cluster may start many minutes apart
            heartbeat_timeout_seconds=2 * seconds,  # `GroupMonitor` should act first: it prints a line
            shutdown_timeout_seconds=seconds,
        )
    except Exception as error:  # what JAX raises depends on the cluster that it detects
        stop_reporting_aborts()
        if not variables and isinstance(error, ValueError):
            return  # no cluster here
        raise UserError(
            f"the processes could not join ({summarize(error)}). Set {ADDRESS_VARIABLE}, {COUNT_VARIABLE} and {INDEX_VARIABLE}."
        ) from None
    finally:
        reminder.cancel()
    _group.index, _group.count = get_process_index_and_count()
    if _group.count > 1:
        _group.store = KeyValueStore()
    if is_first():
        stop_reporting_aborts()
    else:
        report_jax_aborts(FIRST_PROCESS_LOST)
        _hide_progress()


def _check_port_is_free(address: str) -> None:
    """Raise `UserError` if process 0 cannot listen at its address: JAX would crash without a message."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS_VARIABLE}: {address!r} is not an address (expected HOST:PORT)")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", int(port)))
        except OSError as error:
            raise UserError(f"{ADDRESS_VARIABLE}: port {port} cannot be used ({error.strerror}). Name a free port.") from None


def check_same_count(store: KeyValueStore, own_count: int, timeout_s: float) -> None:
    """Raise `UserError` if process 0 was started with another number of processes than this one."""
    if is_first():
        store.set_if_absent(COUNT_KEY, str(own_count).encode())
        return
    first_count = store.get(COUNT_KEY, timeout_s)
    if first_count is not None and int(first_count) != own_count:
        raise UserError(
            f"{COUNT_VARIABLE}: this process was started as one of {own_count}, process 0 as one of {int(first_count)}. Give "
            "all processes the same number."
        )


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error of JAX means that another process is gone. A process that runs alone has none."""
    is_from_jax = isinstance(error, RuntimeError | ValueError)
    return count() > 1 and is_from_jax and any(name in str(error) for name in CONNECTION_ERRORS)


def _hide_progress() -> None:
    """Hide the info lines and progress bars of this process. Its warnings and errors still appear."""
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign, assignment]


def _leave(monitor: GroupMonitor) -> None:
    """Leave the group once all processes are done."""
    import jax

    barrier()
    monitor.finish()
    _group.has_ended = True
    jax.distributed.shutdown()


class Channel:
    """A sequence of rounds in which the processes agree on a message.

    A channel belongs to one thread of each process. Open channels in the same order on all processes.
    """

    def __init__(self) -> None:
        _group.channels += 1
        self._name, self._round = f"jaxembed/channel-{_group.channels}", 0

    @property
    def is_single_process(self) -> bool:
        """Whether there is no other process to agree with."""
        return count() == 1

    def agree(self, message: bytes, merge: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """Merge the messages of all processes, and return the result on all.

        Args:
            message: The message of this process.
            merge: Merges the messages, which are in the order of the processes. It runs on process 0.
        """
        store = _group.store
        if store is None:
            return merge([message])
        self._round += 1
        key = f"{self._name}/{self._round}"
        # Every other process sends its message to process 0, and waits for the result.
        if not is_first():
            store.set(f"{key}/{index()}", message)
            return _wait_for(store, f"{key}/merged")
        # Process 0 collects the messages.
        messages = [message, *(_wait_for(store, f"{key}/{i}") for i in range(1, count()))]
        # A process that has written in this round has read the result of the round before: its keys can go.
        store.delete(f"{self._name}/{self._round - 1}")
        # Merge the messages, and send the result to all.
        merged = merge(messages)
        store.set(f"{key}/merged", merged)
        return merged


def _wait_for(store: KeyValueStore, key: str) -> bytes:
    """Return the value of a key as soon as it is set. `GroupMonitor` limits how long that may take."""
    while not _group.has_ended:
        if (value := store.get(key, POLL_INTERVAL_S)) is not None:
            return value
    raise SystemExit  # ends a thread that was still waiting as the run ended


_main_channel = Channel()


def barrier() -> None:
    """Wait until all processes are here. Call it, and the functions below, in the main thread only."""
    _main_channel.agree(b"", lambda messages: b"")


def broadcast_from_first(message: bytes) -> bytes:
    """Return the message of process 0, on all processes."""
    return _main_channel.agree(message, lambda messages: messages[0])


def run_on_first_process_first(function: Callable[[], T]) -> T:
    """Run a function on process 0, then on the others, which find the files that it has written."""
    if is_first():
        result = function()
        barrier()
        return result
    barrier()
    return function()


def should_stop_at(step: int) -> bool:
    """Return whether all processes should stop at this step because one got SIGTERM: the same answer on all."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))
