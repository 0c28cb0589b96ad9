"""Several processes that train one model: how they find each other, agree, and end together.

They talk through the key-value store of JAX's coordination service, which lives in the first of them. Any thread may use it,
whereas two threads' collectives on the devices could meet in another order on every process, and hang. The store has no
public name in JAX, so nothing else touches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from jaxembed.errors import Stopped, UserError, brief

PREFIX = "jaxembed"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
VERDICT = f"{PREFIX}/verdict"  # why all of them end: written once
DONE = "done"
BEATS, HEARD = f"{PREFIX}/beats/", f"{PREFIX}/heard/"
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "CoordinationService")  # what JAX's errors about other processes name
POLL_MS = 1000
LINGER_S = 3.0
SILENCE_S = 120.0  # after which a process counts as lost, or after half of the limit if that is less
GO_ON = "run the same command on all processes to go on from the last checkpoint"

T = TypeVar("T")


@dataclasses.dataclass
class _Group:
    """This process among those of a run; `client` is None where it is alone."""

    index: int = 0
    count: int = 1
    client: Any = None
    channels: int = 0
    ended: bool = False


_group = _Group()
_ending, _took_leave = threading.Lock(), threading.Event()


def index() -> int:
    """Which process of the run this one is."""
    return _group.index


def count() -> int:
    """How many processes the run has."""
    return _group.count


def is_first() -> bool:
    """Whether this process writes the files, the log and the progress of the run."""
    return _group.index == 0


def progress(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm[Any]:
    """A bar of tqdm on standard error, which of several processes the first one alone shows."""
    return tqdm(iterable, disable=disable or not is_first(), **options)


@contextlib.contextmanager
def together(limit_s: float) -> Iterator[None]:
    """The block as one of the processes of a run, if there are several; before it, nothing may have used a device.

    They leave together. An error in one ends all, each with one line; so does one that is not heard of for two minutes, or for
    half of `limit_s` if that is less, so that all have ended before `limit_s` is over.
    """
    _join(limit_s)
    if count() == 1:
        yield
        return
    watch = threading.Thread(target=_watch, args=[limit_s], daemon=True)
    watch.start()
    try:
        yield
    except Stopped:
        _leave(watch)
        raise
    except KeyboardInterrupt:
        _end_all(130, "was interrupted")
    except UserError as error:
        _end_all(2, str(error))
    except Exception as error:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
            _await_verdict()  # where the other had time to say why it ended
            _end_all(1, f"another process has ended, or cannot be reached ({brief(error, 120)}); {GO_ON}")
        traceback.print_exc()
        _end_all(1, f"ended with {type(error).__name__}: {brief(error)}")
    _leave(watch)


def _join(limit_s: float) -> None:
    """Finds the other processes as JAX does on Slurm, Open MPI, Kubernetes and Cloud TPUs, or by three variables."""
    import jax
    from jax._src import distributed

    told = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if wrong := [name for name in (COUNT, INDEX) if name in told and not told[name].isdecimal()]:
        raise UserError(f"{wrong[0]} is {told[wrong[0]]!r}; expected a number")
    seconds = min(math.ceil(limit_s), 86_400)
    try:
        jax.distributed.initialize(  # which itself reads the address alone
            num_processes=int(told[COUNT]) if COUNT in told else None,
            process_id=int(told[INDEX]) if INDEX in told else None,
            initialization_timeout=seconds,  # nodes of one cluster may be there many minutes apart
            heartbeat_timeout_seconds=2 * seconds,  # `_watch` is to speak first, with a line
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, RuntimeError) as error:
        if not told and isinstance(error, ValueError):
            return  # no cluster here
        raise UserError(f"the processes could not join ({brief(error)}); set {ADDRESS}, {COUNT} and {INDEX}") from None
    joined = distributed.global_state
    _group.index, _group.count, _group.client = joined.process_id, joined.num_processes, joined.client
    if not is_first():
        _tell_at_abort()
        _be_quiet()


def _tell_at_abort() -> None:
    """JAX aborts a process as soon as it has lost the first one: then this makes the last line one that says what to do.

    Python's own handlers wait for the main thread, which an abort does not.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _abort_handler)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _abort_handler(number: int) -> None:
    told = f"aborted, as JAX does where process 0 of {count()} has ended or cannot be reached; {GO_ON}"
    print(f"\nerror: {told}", file=sys.stderr, flush=True)
    os._exit(1)


def _be_quiet() -> None:
    """Leaves logs and progress bars to the first process; warnings and errors are told by all."""
    from tqdm import tqdm

    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign, assignment]


def _leave(watch: threading.Thread) -> None:
    import jax

    barrier()
    if is_first():
        _set(VERDICT, DONE)
    watch.join()
    _group.ended = True
    jax.distributed.shutdown()


class Channel:
    """Agreements that one thread of each process makes, in the same order as the others' threads.

    Channels are made in the same order on all processes.
    """

    def __init__(self) -> None:
        _group.channels += 1
        self._name, self._turn = f"{PREFIX}/channel-{_group.channels}", 0

    @property
    def alone(self) -> bool:
        return count() == 1

    def agree(self, message: bytes, merge: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """What the first process merges of the messages of all, which come in the processes' order: 2 messages a process."""
        if self.alone:
            return merge([message])
        self._turn += 1
        name = f"{self._name}/{self._turn}"
        if not is_first():
            _group.client.key_value_set_bytes(f"{name}/{index()}", message)
            return _get(f"{name}/merged")
        parts = [message, *(_get(f"{name}/{i}") for i in range(1, count()))]
        # Who has written for this turn has read what came of the one before.
        _group.client.key_value_delete(f"{self._name}/{self._turn - 1}")
        merged = merge(parts)
        _group.client.key_value_set_bytes(f"{name}/merged", merged)
        return merged


_main = Channel()  # of the main threads


def barrier() -> None:
    """Waits until all processes are here; for the main thread alone, as what follows is."""
    _main.agree(b"", lambda messages: b"")


def of_first(message: bytes) -> bytes:
    """The first process's message, on all."""
    return _main.agree(message, lambda messages: messages[0])


def in_turn(function: Callable[[], T]) -> T:
    """`function()` on the first process, then on the others, which find the files that it made."""
    if is_first():
        result = function()
        barrier()
        return result
    barrier()
    return function()


def asked_to_stop(step: int) -> bool:
    """Whether all processes are to stop at this step, since one of them got SIGTERM: the same answer on all."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def _set(key: str, value: str) -> None:
    """Sets what is not set yet."""
    with contextlib.suppress(RuntimeError):  # ALREADY_EXISTS
        _group.client.key_value_set(key, value)


def _get(key: str) -> bytes:
    """The value of a key, as soon as it is there: how long that may take is up to `_watch`."""
    while not _group.ended:
        with _patience():
            return bytes(_group.client.blocking_key_value_get_bytes(key, POLL_MS))
    raise SystemExit  # of a thread that was still waiting as the run ended


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # JAX's own, by the code in its text
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            raise


def _verdict(wait_ms: int) -> str | None:
    with _patience():
        return str(_group.client.blocking_key_value_get(VERDICT, wait_ms))
    return None


def _watch(limit_s: float) -> None:
    """Ends this process when the run's verdict is spoken; the first one speaks it when another's beats have stopped."""
    silence = min(limit_s / 2, SILENCE_S)
    period, beat, heard = min(silence / 5, 5.0), 0, dict.fromkeys(range(count()), ("", time.monotonic()))
    while True:
        timer = threading.Timer(silence, _give_up, [f"process 0 of {count()} has not been heard of for {silence:g} s"])
        timer.daemon = True
        timer.start()
        try:
            verdict = _verdict(int(1000 * period))
            beat += 1
            _group.client.key_value_set(f"{BEATS}{index()}", str(beat), allow_overwrite=True)
            beats = _group.client.key_value_dir_get(BEATS) if is_first() else []
        except RuntimeError:  # the service is gone, and JAX ends this process now
            return
        finally:
            timer.cancel()
        if verdict is not None:
            return None if verdict == DONE else _obey(verdict)
        now = time.monotonic()
        for key, value in beats:
            of = int(key.rpartition("/")[2])
            heard[of] = heard[of] if heard[of][0] == value else (value, now)
        if is_first() and (lost := [i for i, (_, at) in heard.items() if now - at > silence]):
            _set(VERDICT, json.dumps([1, f"process {lost[0]} of {count()} has not been heard of for {silence:g} s; {GO_ON}"]))


def _obey(verdict: str) -> NoReturn:
    code, told = json.loads(verdict)
    _exit(code, told.removeprefix(_name()))  # this process's own verdict, read by its watch before it could tell it itself


def _give_up(told: str) -> None:
    _exit(1, f"{told}; {GO_ON}")


def _await_verdict() -> None:
    with contextlib.suppress(RuntimeError):
        if verdict := _verdict(POLL_MS):
            _obey(verdict)


def _end_all(code: int, told: str) -> NoReturn:
    """Ends this process with one line, and the others with that line."""
    _set(VERDICT, json.dumps([code, _name() + told]))
    _exit(code, told)


def _name() -> str:
    return f"process {index()} of {count()}: "


def _exit(code: int, told: str) -> NoReturn:
    """Ends the process at once: JAX's way out of a group would wait for the others."""
    _ending.acquire()  # for good: another thread that is about to end the process waits for it here
    print(f"\nerror: {told}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    threading.Thread(target=_take_leave, daemon=True).start()
    _took_leave.wait(LINGER_S)
    os._exit(code)


def _take_leave() -> None:
    """Says that this process has heard; the first one, with which the service goes, waits until all others have."""
    with contextlib.suppress(RuntimeError):
        _set(f"{HEARD}{index()}", "")
        while is_first() and len(_group.client.key_value_dir_get(HEARD)) < count():
            time.sleep(0.05)
    _took_leave.set()
