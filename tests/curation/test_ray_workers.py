"""Failures of the workers of a Ray cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxembed.curation.ray_workers import RayWorkers
from jaxembed.errors import UserError


def test_a_worker_of_a_ray_cluster_that_fails_is_one_line() -> None:
    """Ray kills workers where memory is short, and raises what a worker raised."""

    class RayError(Exception):
        cause = MemoryError("no room")

    def get(_: Any) -> Any:
        raise RayError("ray::StepWorker.run()\nTraceback")

    workers = RayWorkers.__new__(RayWorkers)
    workers._ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayActorError=KeyError, RayError=RayError))
    with pytest.raises(UserError, match=r"^--ray: rows 3 to 9: a worker failed \(no room\)\. Run the same"):
        workers._wait([SimpleNamespace(number=number) for number in (3, 9)], None)
