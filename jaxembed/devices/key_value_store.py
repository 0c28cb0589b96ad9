"""A key-value store that all processes of a run share. Only this file uses JAX's private API for several processes.

The store belongs to JAX's coordination service, which process 0 hosts. JAX has no public name for it: this file reads
`jax._src.distributed.global_state` (its `client`, `process_id` and `num_processes`).

The public equivalents do not suffice. `jax.experimental.multihost_utils` (`broadcast_one_to_all`, `process_allgather`,
`sync_global_devices`) runs collectives on the devices. Two threads of a process must not do that concurrently: another process
may run their collectives in the other order, and both hang. Any thread may use the store. `jax.process_index` initializes the
devices, which can only be done once the processes have joined.
"""

from __future__ import annotations

import contextlib
from typing import Any


def get_process_index_and_count() -> tuple[int, int]:
    """Return this process's index and the number of processes, after `jax.distributed.initialize`."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


class KeyValueStore:
    """The store of the run that this process has joined by `jax.distributed.initialize`.

    Every method raises RuntimeError if the service cannot be reached.
    """

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client

    def set(self, key: str, value: bytes, overwrite: bool = False) -> None:
        """Set a key. Without `overwrite` it must be new."""
        self._client.key_value_set_bytes(key, value, allow_overwrite=overwrite)

    def set_if_absent(self, key: str, value: bytes) -> None:
        """Set a key unless a process has set it already."""
        with contextlib.suppress(RuntimeError):  # ALREADY_EXISTS
            self.set(key, value)

    def get(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value of a key as soon as it is set, or None after `timeout_s` seconds."""
        try:
            return bytes(self._client.blocking_key_value_get_bytes(key, int(1000 * timeout_s)))
        except RuntimeError as error:  # JAX's own error, with a status code as the first word of its text
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
            return None

    def list(self, prefix: str) -> dict[str, bytes]:
        """Return all keys below a prefix that ends in a slash, and their values."""
        return {key: bytes(value) for key, value in self._client.key_value_dir_get_bytes(prefix)}

    def delete(self, key: str) -> None:
        """Delete a key, and all keys below it."""
        self._client.key_value_delete(key)
