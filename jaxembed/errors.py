"""The one exception a user may cause."""


class UserError(Exception):
    """Bad input, told in one line: what came, what was expected, what to do.

    The message names the file and line or the config key. Commands print it after `error:` and exit with code 2.
    """
