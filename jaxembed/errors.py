"""Exceptions that end a command with one line."""

import difflib
import errno
import os
import re
import signal
from collections.abc import Iterable

MAX_MESSAGE_CHARS = 2000
# What the system refuses for reasons that the user can remove. Other errors of the system may be mistakes of this program.
SYSTEM_ERRORS = {
    errno.ENOSPC: "Make room on the disk, and run the same command.",
    errno.EDQUOT: "Make room in your quota, and run the same command.",
    errno.EFBIG: "Raise the limit on the size of files, and run the same command.",
    errno.EROFS: "Name another folder, or set JAXEMBED_CACHE if it is the cache.",
    errno.EACCES: "Change its permissions, name another folder, or set JAXEMBED_CACHE if it is the cache.",
    errno.EPERM: "Change its permissions, name another folder, or set JAXEMBED_CACHE if it is the cache.",
    errno.EIO: "Check the disk.",
    errno.ESTALE: "Check the network disk.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Close other programs: the system has too many open files.",
    errno.ENOMEM: "Free memory, or raise the limit on it.",
}
# What JAX's errors say where memory ran out. YNNPACK computes matmuls on CPUs.
MEMORY_ERRORS = ("RESOURCE_EXHAUSTED", "YNNPACK operation failed", "std::bad_alloc", "Out of memory")
RUST_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust, as in tokenizers and safetensors, writes an `OSError`
LINE_BREAKS = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")


class UserError(Exception):
    """Bad input. The message says in one line what is wrong, what was found and expected, and what to do.

    The message names the file and line, or the config key. Commands print it after `error:` and exit with code 2. Whatever the
    message quotes, it stays one line: line breaks and other control characters are escaped, and the middle of a very long
    message is removed. It ends with a period.
    """

    def __init__(self, message: str):
        message = message if message.endswith((".", "!", "?")) else f"{message}."
        line = "".join(c if c.isprintable() or (c.isspace() and c not in LINE_BREAKS) else ascii(c)[1:-1] for c in message)
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} ... {line[-half:]}")


class Stopped(Exception):
    """A run was asked to stop and has saved its state. Commands exit with 128 + `signal`, as shells do."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def get_interrupt_signal(interrupt: KeyboardInterrupt) -> int:
    """Return the signal that a `KeyboardInterrupt` stands for: its argument, or SIGINT if Python itself raised it."""
    return interrupt.args[0] if interrupt.args else signal.SIGINT


def summarize(error: object, max_chars: int = 200) -> str:
    """Return the message of another library's error on one short line, to be quoted in a `UserError`."""
    line = " ".join(str(error).split())
    return line if len(line) <= max_chars else f"{line[:max_chars].rsplit(' ', 1)[0]} ..."


def suggest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return a sentence, after a space, that names the nearest candidates; empty if none is near.

    Args:
        name: The unknown name.
        candidates: Names that exist.
        count: Maximum number of suggested names.
    """
    spellings = {candidate.lower(): candidate for candidate in candidates}
    nearest = [spellings[lower] for lower in difflib.get_close_matches(name.lower(), spellings, n=count, cutoff=0.5)]
    return f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def explain_system_error(error: BaseException) -> str | None:
    """Return one line about an error of the operating system, such as a full disk or no memory; None for any other error.

    Failures of the library tokenizers count too. It panics on some regular expressions of a tokenizer.json. For texts that the
    vocabulary cannot spell, it raises a plain `Exception`, which nothing else does.
    """
    if (match := RUST_SYSTEM_ERROR.search(str(error))) and int(match[1]) in SYSTEM_ERRORS and not isinstance(error, OSError):
        error = OSError(int(match[1]), os.strerror(int(match[1])))
    if type(error).__name__ == "PanicException" or type(error) is Exception:
        return (
            f"a library failed ({summarize(error)}). Check the tokenizer.json of the model, mainly its regular expressions and "
            "its unknown token."
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(m in str(error) for m in MEMORY_ERRORS)):
        detail = f" ({reason})" if (reason := summarize(error)) else ""
        return f"out of memory{detail}. Free memory, raise the limit on it, or lower the sizes of batches and models."
    if not isinstance(error, OSError) or error.errno not in SYSTEM_ERRORS:
        return None
    subject = error.filename2 or error.filename or "a file"
    return str(UserError(f"{subject}: cannot be used ({error.strerror}). {SYSTEM_ERRORS[error.errno]}"))
