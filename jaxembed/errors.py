"""The exceptions that end a command in one line."""


class UserError(Exception):
    """Bad input, told in one line: what came, what was expected, what to do.

    The message names the file and line or the config key. Commands print it after `error:` and exit with code 2.
    """


class Stopped(Exception):
    """A run was asked to stop and has saved itself. Commands exit with 128 + `signal`, as shells count it."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
