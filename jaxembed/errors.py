"""The exceptions that end a command in one line."""

LONGEST = 2000  # characters of a message
BREAKS = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")


class UserError(Exception):
    """Bad input, told in one line: what came, what was expected, what to do.

    The message names the file and line or the config key. Commands print it after `error:` and exit with code 2. It is
    one line whatever it quotes: line breaks and other control characters are escaped, and of a very long one the middle
    is left out.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() or (c.isspace() and c not in BREAKS) else ascii(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class Stopped(Exception):
    """A run was asked to stop and has saved itself. Commands exit with 128 + `signal`, as shells count it."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def brief(error: object, most: int = 200) -> str:
    """What another library says of an error, on one line and not too long, to be quoted in a `UserError`."""
    line = " ".join(str(error).split())
    return line if len(line) <= most else f"{line[:most].rsplit(' ', 1)[0]} ..."
