"""The command `synthesize`: its files, a server that misbehaves, kills, budgets, and bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.commands import ENV
from helpers.llm_server import FAULTS, MODEL, Behavior, LlmServer, make_text, read_prompt, run_llm_server
from helpers.synthesis import RECIPE
from jaxembed.config import SourceConfig
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.sources import open_source
from jaxembed.errors import UserError

from .conftest import Synthesize

KEY = "sk-very-secret-0123456789"
CONCURRENCY = 16  # requests at once, the default


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_recipe(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(RECIPE | changes))


def test_rows_train_and_their_provenance_is_beside_them(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    result = synthesize("--max-rows=12")
    rows, origins = read_rows(tmp_path / "out/search.jsonl"), read_rows(tmp_path / "out/provenance/search.jsonl")
    assert result["rows"] == {"search": 12} and len(rows) == len(origins) == 12 and result["ended_by"] == "rows"
    source = open_source(SourceConfig(path=str(tmp_path / "out")), tmp_path / "cache")
    assert (source.format, len(source)) == ("pairs", 12)
    assert all(set(row) == {"prompt", "query", "pos", "neg"} and len(row["neg"]) == 1 for row in rows)
    assert origins[0]["recipe"] == "test" and origins[0]["model"] == MODEL and len(origins[0]["requests"]) == 2
    assert {origin["values"]["tasks"]["domain"] for origin in origins} <= {"law", "medicine"}
    stored = {record["key"] for record in read_rows(tmp_path / "out/answers/answers.jsonl")}
    assert {key for origin in origins for key in origin["requests"]} <= stored
    page = (tmp_path / "out/report.html").read_text()
    assert "Synthesis report" in page and "distinct-2" in page and "http" not in page


def test_a_part_is_held_out(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    result = synthesize("--max-rows=20", "--heldout-percent=40")
    split = tmp_path / "out/search-split"
    sizes = result["heldout"][str(split)]
    assert sizes["train"] + sizes["heldout"] == 20 and sizes["documents"] == 20
    assert len(read_rows(split / "train.jsonl")) == sizes["train"]
    again = synthesize("--max-rows=26", "--heldout-percent=40")["heldout"][str(split)]
    assert again["train"] + again["heldout"] == 26 and again["train"] >= sizes["train"] and again["heldout"] >= sizes["heldout"]


def test_a_rerun_sends_no_requests_and_more_rows_continue(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    synthesize("--max-rows=6")
    first, asked = (tmp_path / "out/search.jsonl").read_text(), len(server.bodies)
    again = synthesize("--max-rows=6", url="http://127.0.0.1:9")  # nothing listens there
    assert (tmp_path / "out/search.jsonl").read_text() == first and len(server.bodies) == asked
    assert again["new_tokens"] == 0 and again["stored_answers"] == again["requests"]
    synthesize("--max-rows=9")
    assert (tmp_path / "out/search.jsonl").read_text().startswith(first)
    assert max(server.answered.values()) == 1


def test_an_unreliable_server_yields_the_rows_of_a_reliable_one(
    synthesize: Synthesize, server: LlmServer, tmp_path: Path
) -> None:
    synthesize("--max-rows=30", "--concurrency=1", out="calm")
    server.behavior = Behavior(fault_share=0.5)
    synthesize("--max-rows=30", "--concurrency=8", out="wild")
    assert (tmp_path / "calm/search.jsonl").read_text() == (tmp_path / "wild/search.jsonl").read_text()
    assert {FAULTS[int(digest[:8], 16) % len(FAULTS)] for digest in server.faults} == set(FAULTS)


def test_invalid_answers_are_counted_and_requested_again(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    server.behavior = Behavior(flaw_share=0.4)
    result = synthesize("--max-rows=30")
    report = json.loads((tmp_path / "out/report.json").read_text())
    invalid = {reason for step in report["tasks"]["search"]["steps"] for reason in step["invalid"]}
    assert {"refused", "not JSON", "in another language", "truncated at max_tokens"} <= invalid
    assert result["rows"] == {"search": 30} and 0.2 < result["invalid_share"] < 0.6
    texts = (tmp_path / "out/search.jsonl").read_text()
    assert "sorry" not in texts and "Sprache" not in texts


def test_duplicated_answers_become_one_row(synthesize: Synthesize, server: LlmServer, recipe: Path, tmp_path: Path) -> None:
    existing = [{"query": make_text("old"), "pos": ["x"]}]
    write_jsonl(tmp_path / "existing.jsonl", existing)
    write_recipe(recipe, existing=[{"path": str(tmp_path / "existing.jsonl")}])
    texts = [make_text("old"), make_text("new"), make_text("new").upper()]

    def write(body: Any) -> str | None:
        if "Task:" not in (prompt := read_prompt(body)):
            return None
        return json.dumps({"query": texts[len(prompt) % 3], "document": make_text(prompt), "wrong": make_text(prompt[::-1])})

    server.behavior = Behavior(write=write)
    result = synthesize("tasks.0.steps.0.requests=6")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert result["rows"] == {"search": 1} and result["ended_by"] == "recipe"
    assert report["tasks"]["search"]["rejected"]["copy of an earlier row"] > 10
    assert report["tasks"]["search"]["steps"][0]["dropped"].keys() <= {"known already"}


def test_kills_at_random_moments_neither_lose_nor_duplicate_rows(
    synthesize: Synthesize, server: LlmServer, recipe: Path, tmp_path: Path
) -> None:
    server.behavior = Behavior(fault_share=0.2, flaw_share=0.2)
    synthesize("--max-rows=40", out="calm")
    server.bodies.clear()
    server.behavior = Behavior(flaw_share=0.2, delay_s=0.005)
    command = [
        sys.executable,
        "-m",
        "jaxembed.synthesize",
        str(recipe),
        "--server",
        server.url,
        "--model",
        MODEL,
        "--max-rows=40",
        str(tmp_path / "killed"),
    ]
    rng, kills = random.Random(0), 0
    for target in (rng.uniform(1, 30) for _ in range(3)):
        # A new process starts faster than the server of `helpers.commands`: the command does not import JAX.
        process, start = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL), time.monotonic()
        asked = len(server.bodies)
        while len(server.bodies) < asked + target and process.poll() is None and time.monotonic() < start + 60:
            time.sleep(0.001)
        process.kill()
        process.wait()
        kills += process.returncode == -9
    with (tmp_path / "killed/answers/answers.jsonl").open("a") as file:
        file.write('{"key": "0123')  # half a line, as a kill during a write leaves it
    synthesize("--max-rows=40", out="killed")
    assert kills > 1
    assert read_rows(tmp_path / "killed/search.jsonl") == read_rows(tmp_path / "calm/search.jsonl")
    answers = read_answers(tmp_path / "killed")
    assert answers == read_answers(tmp_path / "calm")
    assert len(server.bodies) <= len(answers) + kills * CONCURRENCY


def test_copied_answers_serve_a_synthesis_with_other_keys(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    synthesize("--max-rows=12")
    shutil.copytree(tmp_path / "out/answers", tmp_path / "stricter/answers")
    asked = len(server.bodies)
    synthesize("--max-rows=12", "threshold=0.99", out="stricter")
    assert len(server.bodies) == asked
    assert read_rows(tmp_path / "stricter/search.jsonl") == read_rows(tmp_path / "out/search.jsonl")


def test_a_disk_that_fills_is_named_and_leaves_no_half_file(
    synthesize: Synthesize, server: LlmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, written = os.pwrite, 0

    def fill_after_five(descriptor: int, content: bytes, offset: int) -> int:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, content[: 1 + len(content) // 2], offset)  # a write may be short

    open_path = Path.open

    def open_full(path: Path, mode: str = "r", **options: Any) -> Any:
        return open_path(Path("/dev/full") if mode == "w" else path, mode, **options)

    for patch, file in (("os.pwrite", "answers/answers.jsonl"), ("pathlib.Path.open", "search.jsonl")):
        with monkeypatch.context() as context:
            context.setattr(patch, fill_after_five if patch == "os.pwrite" else open_full)
            with pytest.raises(OSError, match="No space left") as error:
                synthesize("--max-rows=6")
        assert str(error.value.filename).endswith(file)
        assert not list((tmp_path / "out").rglob("*.partial")) and not (tmp_path / "out/search.jsonl").exists()
    synthesize("--max-rows=6")
    synthesize("--max-rows=6", out="calm")
    assert read_rows(tmp_path / "out/search.jsonl") == read_rows(tmp_path / "calm/search.jsonl")
    # Once for each output, and what could not be stored again.
    assert sum(server.answered.values()) <= 2 * len(server.answered) + CONCURRENCY


def read_answers(out: Path) -> dict[str, dict[str, Any]]:
    """Return the stored answers by the key of their request, without their times. Each key must be there once."""
    rows = read_rows(out / "answers/answers.jsonl")
    for row in rows:
        del row["answer"]["time"]
    answers = {row["key"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


def test_a_budget_is_not_exceeded_and_a_larger_one_continues(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    sampling = "tasks.0.steps.{}.sampling.max_tokens=50"
    keys = [sampling.format(0), sampling.format(1)]
    small = synthesize(*keys, "--budget-tokens=5000")
    assert small["ended_by"] == "budget" and 1000 < small["prompt_tokens"] + small["completion_tokens"] <= 5000
    rows = read_rows(tmp_path / "out/search.jsonl")
    server.behavior = Behavior(delay_s=0.01, fault_share=0.5)
    again = synthesize(*keys, "--budget-tokens=5000", out="slow")
    assert again["rows"] == small["rows"] and read_rows(tmp_path / "slow/search.jsonl") == rows
    large = synthesize(*keys, "--budget-tokens=9000")
    assert read_rows(tmp_path / "out/search.jsonl")[: len(rows)] == rows and large["rows"]["search"] > len(rows)


def test_endpoints_share_the_work_and_a_dead_one_is_left_out(
    synthesize: Synthesize, server: LlmServer, caplog: pytest.LogCaptureFixture
) -> None:
    with run_llm_server(Behavior(delay_s=0.002)) as second:
        server.behavior = Behavior(delay_s=0.002)
        result = synthesize(f"--server={second.url}", "--server=http://127.0.0.1:9", "--max-rows=40")
        assert result["rows"] == {"search": 40} and len(server.bodies) > 5 and len(second.bodies) > 5
    assert "http://127.0.0.1:9/v1: cannot be reached" in caplog.text


def test_the_key_is_only_in_requests(
    synthesize: Synthesize,
    server: LlmServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def write(body: Any) -> str | None:
        return (
            json.dumps({"query": f"my key is {KEY}", "document": "d", "wrong": "w"}) if "Task:" in read_prompt(body) else None
        )

    server.behavior = Behavior(key=KEY, fault_share=0.3, write=write)
    monkeypatch.setenv("OTHER_KEY", KEY)
    synthesize("--max-rows=1", "--key-env=OTHER_KEY")
    server.behavior = Behavior(key="another")
    with pytest.raises(UserError, match=r"does not accept the key in the environment variable OTHER_KEY") as error:
        synthesize("--max-rows=1", "--key-env=OTHER_KEY", out="refused")
    assert any(KEY in headers for headers in server.headers) and KEY not in str(error.value)
    streams = capfd.readouterr()
    assert KEY not in streams.out + streams.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY in path.read_text(errors="ignore")]


def test_bad_input_is_one_line(
    synthesize: Synthesize, server: LlmServer, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1: cannot be reached .*Check that the server runs"):
        synthesize(url="http://127.0.0.1:9", out="a")
    with pytest.raises(UserError, match=r"does not serve the model 'stub' .found stub-model.*Did you mean 'stub-model'"):
        synthesize(model="stub", out="b")
    server.behavior = Behavior(key=KEY)
    with pytest.raises(UserError, match=r"needs a key, which is read from the environment variable OPENAI_API_KEY"):
        synthesize(out="c")
    server.behavior = Behavior(max_prompt_chars=10)
    with pytest.raises(UserError, match=r"step tasks: its prompts do not fit into the context of the model .*maximum context"):
        synthesize(out="d")
    server.behavior = Behavior()
    synthesize("--max-rows=1")
    with pytest.raises(UserError, match=r"belongs to a synthesis with another recipe .found 'test'; expected 'other'"):
        synthesize("name=other")
    with pytest.raises(UserError, match=r"belongs to a synthesis with another set of keys. Name another output"):
        synthesize("seed=3")
    write_jsonl(tmp_path / "other" if (tmp_path / "other").mkdir() else tmp_path / "other/x.jsonl", [{}])
    with pytest.raises(UserError, match=r"other: already exists, and is not the output of a synthesis"):
        synthesize(out="other")
    with pytest.raises(UserError, match=r"placeholder {domain} has no values \(none is known here\). Add values.domain"):
        synthesize("tasks.0.steps.0.values={}")
    with pytest.raises(UserError, match=r"inputs.documents is empty. Set it to your data: inputs.documents=PATH"):
        synthesize("inputs.documents=")


def test_unsupported_schemas_and_seeds_are_left_out_and_logged_once(
    synthesize: Synthesize, server: LlmServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.behavior = Behavior(refused=("lengths",))
    synthesize("--max-rows=3", out="a")
    assert server.bodies[-1]["response_format"]["json_schema"]["strict"] and "maxLength" not in str(server.bodies[-1])
    server.behavior = Behavior(refused=("response_format", "seed", "max_tokens"))
    caplog.clear()
    caplog.set_level("INFO", "jaxembed")
    synthesize("--max-rows=3", out="b")
    assert not {"response_format", "seed", "max_tokens"} & set(server.bodies[-1])
    assert [sum(text in line for line in caplog.messages) for text in ("as text that is parsed", "refuses seed")] == [1, 1]


def test_quotas_limit_groups_and_tasks_share_the_rows(synthesize: Synthesize, recipe: Path, tmp_path: Path) -> None:
    (task,) = RECIPE["tasks"]
    quotas = [
        {"by": "{example.words}", "max_share": 0.6},
        {"by": "language", "max_rows": 100},
        {"by": "length", "max_rows": 100},
    ]
    write_recipe(recipe, tasks=[task | {"quotas": quotas, "weight": 3}, task | {"name": "more"}])
    result = synthesize("--max-rows=20")
    assert result["rows"] == {"search": 15, "more": 5}
    origins = read_rows(tmp_path / "out/provenance/search.jsonl")
    assert sum(origin["values"]["example"]["words"] == "50" for origin in origins) == 9
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["tasks"]["search"]["groups"]["language"] == {"en": 15}


def test_a_dry_run_estimates_without_requests(
    synthesize: Synthesize, server: LlmServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "jaxembed")
    result = synthesize("--dry-run", "--max-rows=100")
    assert result["requests"] == 110 and result["rows"] == 100 and not server.headers
    assert "Write a list of tasks in" in caplog.text
    synthesize("--max-rows=10")
    measured = synthesize("--dry-run", "--max-rows=100")
    assert measured["based_on"].startswith("10 rows in") and measured["prompt_tokens"] > 1000
