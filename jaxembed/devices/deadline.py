"""Call a function when a block of code takes too long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def call_if_late(limit_s: float, function: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Call a function in a separate thread if the block is not done in time. The block itself is not interrupted.

    Args:
        limit_s: Seconds that the block may take.
        function: What to call.
        *args: Arguments of the function.
    """
    timer = threading.Timer(limit_s, function, args)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
