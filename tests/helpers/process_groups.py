"""Start code as the processes of one run."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path

from helpers.commands import ENV, Process


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_all(code: str, arguments: Sequence[str], root: Path, count: int, devices: int) -> list[Process]:
    """Start code as `count` processes of one run, with `devices` devices each."""
    address, children = f"127.0.0.1:{find_free_port()}", []
    for i in range(count):
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", ENV["XLA_FLAGS"])
        group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        env = {**ENV, **group, "XLA_FLAGS": flags, "JAXEMBED_CACHE": str(root / "cache")}
        children.append(Process(code, arguments, env))
    return children
