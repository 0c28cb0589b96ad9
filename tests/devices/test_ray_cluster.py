"""Workers of a Ray cluster: the same output as without, and failures in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from helpers.llm_server import MODEL, Behavior, run_llm_server
from helpers.synthesis import RECIPE
from jaxembed.data.jsonl import write_jsonl
from jaxembed.devices.ray_cluster import RayCluster
from jaxembed.errors import UserError

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-0123456789"
FUNCTIONS = """
import os
from pathlib import Path

MARK = Path(__file__).with_name("worker-ended")

def end_once(row):
    if row.get("query", "").endswith("question 50 about harbor") and not MARK.exists():
        MARK.touch()
        os._exit(1)
    return row

def fail(row):
    return row if "question 50" not in row.get("query", "") else row["no such key"]

def end(row):
    os._exit(1)

class Absent:
    def __reduce__(self):  # what a worker that lacks a module gets
        return __import__, ("absent_module",)

    def __call__(self, row):
        return row

absent = Absent()
"""
# One cluster serves all cases. It is started by a process without JAX, because Ray forks.
SCRIPT = """
import functools, json, os, signal, sys, threading, time
from pathlib import Path
from jaxembed.config.curation import load_curate_config
from jaxembed.config.synthesis import load_synthesis_config
from jaxembed.curate import make_context
from jaxembed.curation import batches
from jaxembed.curation.engine import curate
from jaxembed.curation.ray_workers import map_batches_with_ray
from jaxembed.devices.ray_cluster import RayCluster
from jaxembed.errors import UserError
from jaxembed.synthesis import engine
from jaxembed.synthesis.endpoints import ServerOptions
from jaxembed.synthesis.ray_servers import RayServers
from jaxembed.synthesis.servers import LlmServers

batches.ROWS_PER_BATCH = 16
cases, options = json.loads(sys.argv[1]), ServerOptions(**json.loads(sys.argv[2]))
messages = []

def try_run(run, *arguments):
    try:
        run(*arguments)
        messages.append("written")
    except UserError as error:
        messages.append(str(error))

def run_curation(out, function, *map_in_workers):
    config = load_curate_config("config.yaml", [f"out={out}", f"steps.0.function=ray_functions.{function}"])
    curate(config, make_context(Path("cache")), "config.yaml", *map_in_workers)

def run_synthesis(out, source):
    path = Path("recipe.yaml")
    engine.synthesize(load_synthesis_config(str(path), [], 30), path, source, Path(out), cache=Path("cache"))

def end_worker():
    answers = Path("synthesized/answers/answers.jsonl")
    while not answers.exists() or answers.read_bytes().count(b"\\n") < 8:
        time.sleep(0.02)
    for folder in Path("/proc").glob("[0-9]*"):
        if (folder / "cmdline").read_bytes().startswith(b"ray::RequestWorker"):
            os.kill(int(folder.name), signal.SIGKILL)
            return messages.append("ended")

run_synthesis("synthesized-alone", LlmServers(options))
with RayCluster("local", 2) as cluster:
    for out, function in cases:
        try_run(run_curation, out, function, functools.partial(map_batches_with_ray, cluster))
    threading.Thread(target=end_worker, daemon=True).start()
    try_run(run_synthesis, "synthesized", RayServers(cluster, options))
    os.environ["NO_KEY"] = ""
    try_run(run_synthesis, "refused", RayServers(cluster, ServerOptions(options.urls, options.model, "", "NO_KEY")))
(Path("worker-ended")).touch()
run_curation("alone", "end_once")
Path("messages.json").write_text(json.dumps(messages))
"""


def write_curation(folder: Path) -> None:
    """Write a config, its rows, and its functions."""
    topics = ["budget", "garden", "harbor", "violin", "engine", "planet"]
    rows = [
        {"query": f"this is question {i} about {topics[i % 6]}", "pos": [f"the {topics[-1 - i % 6]} number {i * 7919}"]}
        for i in range(60)
    ]
    write_jsonl(folder / "pairs.jsonl", [*rows, rows[3]])
    (folder / "ray_functions.py").write_text(FUNCTIONS)
    steps: list[dict[str, Any]] = [{"name": "function", "function": "ray_functions.end_once"}, {"name": "duplicates"}]
    steps += [{"name": "language", "languages": ["en"]}, {"name": "balance", "max_rows": 40}]
    tree = {"out": "out", "sources": [{"path": "pairs.jsonl"}], "steps": steps}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_workers_of_a_cluster_write_the_same_rows_and_may_end(tmp_path: Path) -> None:
    write_curation(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    cases = [("spread", "end_once"), ("failed", "fail"), ("absent", "absent"), ("ended", "end")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OPENAI_API_KEY": KEY}
    with run_llm_server(Behavior(fault_share=0.2, flaw_share=0.1, key=KEY, delay_s=0.05)) as server:
        options = {"urls": [server.url], "model": MODEL, "api_key": KEY, "concurrency": 4}
        command = [sys.executable, "-c", SCRIPT, json.dumps(cases), json.dumps(options)]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    messages = json.loads((tmp_path / "messages.json").read_text())
    assert messages[0] == "written"
    assert "pairs.jsonl:51: ray_functions.fail failed (KeyError: 'no such key'). Correct it" in messages[1]
    assert messages[2].startswith("--ray: a worker cannot start (No module named 'absent_module'). Install it")
    assert messages[3].startswith("--ray: rows 1 to 16: the workers ended 3 times. Run the same command without --ray")
    assert read_all(tmp_path / "spread") == read_all(tmp_path / "alone")
    # A worker that sends requests was killed, too.
    assert messages[4:6] == ["ended", "written"]
    assert "the server needs a key, which is read from the environment variable NO_KEY (status 401" in messages[6]
    rows = [(tmp_path / name / "search.jsonl").read_bytes() for name in ("synthesized", "synthesized-alone")]
    assert rows[0] == rows[1] and rows[0].count(b"\n") == 30
    assert not any(KEY.encode() in content for content in read_all(tmp_path).values())


def test_a_worker_that_fails_is_one_line() -> None:
    """Ray kills workers where memory is short, and raises what a worker raised."""

    class RayError(Exception):
        cause = MemoryError("no room")

    def get(_: Any) -> Any:
        raise RayError("ray::StepWorker.run()\nTraceback")

    cluster = RayCluster.__new__(RayCluster)
    cluster.ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayActorError=KeyError, RayError=RayError))
    with pytest.raises(UserError, match=r"^--ray: rows 3 to 9: a worker failed \(no room\)\. Run the same"):
        cluster.wait(None, "rows 3 to 9")


def test_more_workers_than_processors_are_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ray = SimpleNamespace(init=lambda **options: None, cluster_resources=lambda: {"CPU": 4.0})
    monkeypatch.setattr("jaxembed.devices.ray_cluster._import_ray", lambda: ray)
    assert RayCluster("auto", None).num_workers == RayCluster("auto", 4).num_workers == 4
    assert not caplog.messages
    assert RayCluster("auto", 5).num_workers == 5
    assert "--workers is 5, but the cluster has 4 processors" in caplog.text
