"""A connection to a Ray cluster, whose workers are actors: processes that may run on other machines."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any

from jaxembed.errors import UserError, summarize

log = logging.getLogger("jaxembed")

LOCAL_ADDRESS = "local"
MAX_RETRIES = 2  # of a call whose worker ended


class RayCluster:
    """A connection to a Ray cluster. It is a context manager.

    Attributes:
        num_workers: Number of workers to start.
    """

    def __init__(self, address: str, num_workers: int | None):
        """Connect to a cluster, or start one.

        Args:
            address: Address of a cluster; `local` starts one on this machine, which ends with the connection.
            num_workers: Number of workers. None: one for each processor of the cluster.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        self.ray = _import_ray()
        # Functions of the user are imported by the workers too.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}}
        options: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False} if address == LOCAL_ADDRESS else {}
        try:
            self.ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray {address}: cannot be reached ({summarize(error)}). Start a cluster with ray start --head, or leave the "
                "address out."
            ) from None
        processors = max(int(self.ray.cluster_resources().get("CPU", 1)), 1)
        self.num_workers = num_workers or processors
        if self.num_workers > processors:
            log.warning(
                "--workers is %d, but the cluster has %d processors, one for each worker: the other workers wait until "
                "machines join the cluster", self.num_workers, processors,
            )  # fmt: skip

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()

    def start_workers(self, worker_class: type, *arguments: Any, threads: int = 1) -> list[Any]:
        """Start the workers, and return their handles. A worker that ends is started anew, and its calls are repeated.

        Args:
            worker_class: The class of the workers. Each worker is an instance of it.
            *arguments: Arguments of its constructor, which may be stored objects of Ray.
            threads: Number of calls that one worker runs at the same time.
        """
        actor = self.ray.remote(
            num_cpus=1, max_restarts=-1, max_task_retries=MAX_RETRIES, max_concurrency=threads
        )(worker_class)  # fmt: skip
        return [actor.remote(*arguments) for _ in range(self.num_workers)]

    def wait(self, reference: Any, subject: str) -> Any:
        """Return the result of a call once a worker has it.

        Args:
            reference: Ray's reference to the result.
            subject: What the call works on, for messages, such as "rows 1 to 16".

        Raises:
            UserError: The worker lacks a module, ended `MAX_RETRIES` + 1 times, or failed, for example because memory ran out.
        """
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            if missing := re.search(r"No module named '[^']*'", str(error)):
                raise UserError(
                    f"--ray: a worker cannot start ({missing[0]}). Install it on every machine of the cluster."
                ) from None
            problem = f"the workers ended {MAX_RETRIES + 1} times"
        except self.ray.exceptions.RayError as error:
            problem = f"a worker failed ({summarize(getattr(error, 'cause', None) or error)})"
        raise UserError(f"--ray: {subject}: {problem}. Run the same command without --ray, which shows why.")


def _import_ray() -> Any:
    """Return Ray, with its usage reports and its log of ended workers turned off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs ray, which is not installed. Run pip install '.[ray]'.") from None
    return ray
