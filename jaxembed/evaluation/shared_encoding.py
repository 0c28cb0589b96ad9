"""Encode on all processes of a run while process 0 alone runs the tasks.

Process 0 sends every call to the others, which compute their share of it. So tasks need no data, no mteb, and no agreement on
the other processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxembed.devices import processes
from jaxembed.evaluation.task_encoder import EncodeWithPrompt

MESSAGE_BYTES = 2**20  # size of the messages into which a call is split


def share_encoding(encode: EncodeWithPrompt) -> tuple[EncodeWithPrompt, Callable[[], None]]:
    """Return `encode` for process 0 so that the others take part, and a function that ends their `serve_encoding`.

    Args:
        encode: Encodes texts. All processes must call it together, with the same arguments.
    """
    if processes.count() == 1:
        return encode, lambda: None

    def encode_together(texts: Sequence[str], prompt: str) -> np.ndarray:
        _send([prompt, *texts])
        return encode(texts, prompt)

    return encode_together, lambda: _send([])


def serve_encoding(encode: EncodeWithPrompt) -> None:
    """Take part in the calls of process 0 until it has no more."""
    while call := _receive():
        encode(call[1:], call[0])


def _send(call: list[str]) -> None:
    content = json.dumps(call).encode()
    count = math.ceil(len(content) / MESSAGE_BYTES)
    processes.broadcast_from_first(str(count).encode())
    for start in range(0, len(content), MESSAGE_BYTES):
        processes.broadcast_from_first(content[start : start + MESSAGE_BYTES])


def _receive() -> list[str]:
    count = int(processes.broadcast_from_first(b""))
    call = json.loads(b"".join(processes.broadcast_from_first(b"") for _ in range(count)))
    assert isinstance(call, list)
    return call
