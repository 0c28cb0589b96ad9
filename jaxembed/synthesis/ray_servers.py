"""LLM servers that the workers of a Ray cluster ask.

The store of answers, all draws and the acceptance of rows stay in the process of the command, so the rows do not depend on the
workers. An answer whose worker ended is requested again by a new worker.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading

from jaxembed.devices.ray_cluster import RayCluster
from jaxembed.errors import UserError
from jaxembed.synthesis.endpoints import OptionRefusedError, ServerOptions, TooLongError
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.servers import LlmServers
from jaxembed.verification.http_client import read_key

REQUEST_ERRORS = (TooLongError, OptionRefusedError, UserError)


class RequestWorker:
    """Sends requests, in a process of the cluster. Its threads share the HTTP clients."""

    def __init__(self, options: ServerOptions):
        """Create the HTTP clients with the API key of this process's environment."""
        self._servers = LlmServers(dataclasses.replace(options, api_key=read_key(options.key_variable)))

    def ask(self, request: Request) -> Answer | Exception:
        """Return the answer to a request, or the error that `LlmServers.ask` raises: Ray would wrap a raised one."""
        try:
            return self._servers.ask(request)
        except REQUEST_ERRORS as error:
            return error


class RayServers:
    """Lets the workers of a cluster send requests in turn. Threads may share it. Calls end with the connection to the cluster.

    Attributes:
        options: The servers and how to call them.
    """

    def __init__(self, cluster: RayCluster, options: ServerOptions):
        """Start the workers, which divide `options.concurrency`. The API key stays here: each worker reads its own."""
        self.options, self._cluster = options, cluster
        threads = -(-options.concurrency // cluster.num_workers)
        workers = cluster.start_workers(RequestWorker, dataclasses.replace(options, api_key=""), threads=threads)
        self._workers, self._lock = itertools.cycle(workers), threading.Lock()

    def ask(self, request: Request) -> Answer:
        """Return the answer to a request, as `LlmServers.ask` does. Also raise `UserError` if a worker fails."""
        with self._lock:
            worker = next(self._workers)
        answer = self._cluster.wait(worker.ask.remote(request), "a request")
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Answer)
        return answer
