"""Exceptions that end a command with one line."""

MAX_MESSAGE_CHARS = 2000
LINE_BREAKS = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")


class UserError(Exception):
    """Bad input. The message says in one line what is wrong, what was found and expected, and what to do.

    The message names the file and line, or the config key. Commands print it after `error:` and exit with code 2. Whatever the
    message quotes, it stays one line: line breaks and other control characters are escaped, and the middle of a very long
    message is cut out.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() or (c.isspace() and c not in LINE_BREAKS) else ascii(c)[1:-1] for c in message)
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} ... {line[-half:]}")


class Stopped(Exception):
    """A run was asked to stop and has saved its state. Commands exit with 128 + `signal`, as shells do."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def summarize(error: object, max_chars: int = 200) -> str:
    """Return the message of another library's error on one short line, to be quoted in a `UserError`."""
    line = " ".join(str(error).split())
    return line if len(line) <= max_chars else f"{line[:max_chars].rsplit(' ', 1)[0]} ..."
