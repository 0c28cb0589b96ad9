"""What opening a run checks before any data is read."""

from __future__ import annotations

import dataclasses
import importlib
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from helpers.runs import make_config, write_base_and_data
from jaxembed.config import Config, load_config
from jaxembed.devices import processes
from jaxembed.errors import Stopped, UserError
from jaxembed.hub.resolve import find_base
from jaxembed.runs.open import _check_prompts_fit, _resolve_spec, _warn_of_long_warmup, open_run
from jaxembed.runs.record import record_run
from jaxembed.runs.train import _make_file_error
from jaxembed.training.run_lock import RunLock


def load(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": "preset:tiny"}, "data": {"sources": [{"path": "absent.jsonl"}]}}))
    return load_config(path, [f"run.dir={folder / 'run'}", *overrides])


def test_bm25_without_its_library_is_reported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    mesh: Any = None
    with pytest.raises(UserError, match=r"^BM25: bm25s is not installed\. Run pip install '\.\[eval\]'\.$"):
        open_run(load(tmp_path, "eval.bm25=true"), mesh, RunLock(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_beyond_the_schedule_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_long_warmup(load(tmp_path, "train.steps=10", "optim.warmup_steps=10"), 0)
    assert not caplog.text
    _warn_of_long_warmup(load(tmp_path, "train.steps=10", "optim.warmup_steps=11"), 0)
    assert "optim.warmup_steps is 11, more than the 10 steps of the schedule" in caplog.text
    caplog.clear()
    stages = "stages=[{train: {steps: 6}}, {train: {steps: 6}, optim: {restart: false}}]"
    _warn_of_long_warmup(load(tmp_path, stages, "optim.warmup_steps=12"), 0)
    assert not caplog.text, "the stages share a schedule of 12 steps"
    _warn_of_long_warmup(load(tmp_path, stages, "optim.warmup_steps=13"), 1)
    assert "stages.1.optim.warmup_steps is 13" in caplog.text


def test_a_prompt_that_does_not_fit_names_its_stage() -> None:
    tokenizer: Any = SimpleNamespace(max_text_tokens=lambda prompts: [0], spec=SimpleNamespace(max_length=8))
    with pytest.raises(UserError, match=r"^stages\.1\.data\.max_length is 8, but the query prompt 'Find' and the tokens"):
        _check_prompts_fit({"query": "Find"}, tokenizer, "stages.1.")


def test_spec_has_the_matryoshka_widths_of_the_last_stage_and_leaves_instructions_out_of_echoes(tmp_path: Path) -> None:
    base = find_base("preset:tiny")
    stages = "stages=[{train: {steps: 6}, matryoshka: {dims: [32]}}, {train: {steps: 6}, matryoshka: {dims: [64, 16]}}]"
    spec = _resolve_spec(load(tmp_path, stages), base, None)
    assert (spec.matryoshka_dims, spec.include_instruction) == ((16, 64), True)
    inherited = dataclasses.replace(base, spec=spec)
    assert _resolve_spec(load(tmp_path), inherited, None).matryoshka_dims == ()
    echo = _resolve_spec(load(tmp_path, "model.echo='{text} {text}'"), base, None)
    assert not echo.include_instruction
    chosen = load(tmp_path, "model.pooling.include_instruction=true")
    assert _resolve_spec(chosen, base, echo).include_instruction, "the config decides, not the recorded spec"


@pytest.mark.parametrize(
    "moment",
    ["jaxembed.runs.plans.open_sources", "transformers.PreTrainedTokenizerBase.save_pretrained", "jaxembed.runs.train.resume"],
)
def test_a_signal_before_the_first_step_ends_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """While data is read, while the tokenizer is written, and before weights are loaded."""
    make_config(write_base_and_data(tmp_path), "run")
    monkeypatch.setattr(processes, "_join", lambda limit_s: None)  # other tests have used JAX already
    monkeypatch.setattr(moment, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    train_command = importlib.import_module("jaxembed.train")  # the package has a function of this name
    arguments = train_command.make_parser().parse_args([str(tmp_path / "run.yaml"), f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(Stopped, match=r"continues from its last checkpoint, if it has one\. Run the same command") as stop:
        train_command.main(arguments)
    assert stop.value.signal == signal.SIGTERM
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".partial" or path.name == "lock"]


def test_a_refused_resume_leaves_the_files_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "data_hashes.json").write_text('{"a.jsonl": "old"}')
    source = SimpleNamespace(config=SimpleNamespace(path="a.jsonl", split=""), digest="new")
    base = SimpleNamespace(name="base", hash=lambda: "", hf_config={})
    run: Any = SimpleNamespace(
        run_dir=tmp_path, sources=[source], held_out=(), encoders={}, base=base,
        model=SimpleNamespace(lora=None, has_head=False), spec=None, ranges=None, stages=[],
    )  # fmt: skip
    with pytest.raises(UserError, match="its training data changed"):
        record_run(run)
    assert [path.name for path in tmp_path.iterdir()] == ["data_hashes.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "run: cannot be written (No space left on device). Fix"),
        (OSError(5, "Input/output error", "a.jsonl"), "a.jsonl: cannot be accessed (Input/output error). Fix"),
        (OSError("no\nreason"), "run: cannot be written (no reason). Fix"),
    ],
)
def test_an_error_of_a_file_names_it(error: OSError, message: str) -> None:
    assert str(_make_file_error(error, Path("run"))).startswith(message)
