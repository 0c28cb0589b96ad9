"""Encode on all processes of a run while only process 0 runs the tasks.

Process 0 sends every call to the other processes, which compute their share. So they need neither mteb nor the data of tasks.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxembed.devices import processes
from jaxembed.evaluation.task_encoder import EncodeWithPrompt, TaskEncoder

MESSAGE_BYTES = 2**20  # size of the messages into which a call is split


@contextlib.contextmanager
def share_encoding(encoder: TaskEncoder) -> Iterator[None]:
    """Within the block, encode on all processes. Only process 0 enters it.

    Searches in the block use only the devices of process 0.

    Args:
        encoder: The model. The other processes pass the same one to `serve_encoding`.
    """
    if processes.count() == 1:
        yield
        return
    from jaxembed.devices.mesh import own_devices_only  # imports JAX

    encode = encoder.encode_with_prompt

    def encode_together(texts: Sequence[str], prompt: str) -> np.ndarray:
        _send([prompt, *texts])
        return encode(texts, prompt)

    encoder.encode_with_prompt = encode_together
    with own_devices_only():
        yield
    encoder.encode_with_prompt = encode
    _send([])


def serve_encoding(encode: EncodeWithPrompt) -> None:
    """Encode together with process 0, until it leaves `share_encoding`."""
    while call := _receive():
        prompt, *texts = call
        encode(texts, prompt)


def _send(call: list[str]) -> None:
    """Send a call from process 0: the prompt and the texts, or an empty list to end `serve_encoding`."""
    content = json.dumps(call).encode()
    count = math.ceil(len(content) / MESSAGE_BYTES)
    processes.broadcast_from_first(str(count).encode())
    for start in range(0, len(content), MESSAGE_BYTES):
        processes.broadcast_from_first(content[start : start + MESSAGE_BYTES])


def _receive() -> list[str]:
    """Receive a call on another process (see `_send`)."""
    count = int(processes.broadcast_from_first(b""))
    call = json.loads(b"".join(processes.broadcast_from_first(b"") for _ in range(count)))
    assert isinstance(call, list)
    return call
