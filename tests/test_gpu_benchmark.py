"""benchmarks/gpu.py, dry-run on CPUs at tiny sizes."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest

from jaxembed.config.shipped import find_shipped_folder
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.training.mfu import make_mfu_meter


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with one device."""
    monkeypatch.syspath_prepend(str(find_shipped_folder().parent / "benchmarks"))
    return importlib.import_module("gpu")


def test_a_dry_run_reports_every_part(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The parts that PyTorch computes on the other side are left to real runs. Parts run in this process, to save time."""
    monkeypatch.setattr(gpu, "run_in_process", lambda part, side, is_tiny, seconds: gpu.run_task(part, side, is_tiny))
    gpu.main(["--tiny", "--parts", "kernels", "large_batch"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    kernels, part = result["kernels"]["kernels"], result["parts"]["large_batch:jaxembed"]
    assert {row["kernel"] for row in kernels} == {"einsum", "rows"}
    assert all(0 < row["error"] < 0.01 and row["milliseconds"] > 0 for row in kernels)
    assert part["loss"] > 0 and part["tokens"] < part["computed_tokens"] and part["tokens_per_second"] > 0
    assert "| large_batch | jaxembed | " in printed


def test_a_side_that_fails_is_a_line_of_the_table(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, Any] = {
        "full:jaxembed": {"tokens": 100, "seconds": 0.5, "flops": 989e12 / 4, "gib": 1.5},
        "full:sentence-transformers": {
            "failed": gpu.find_error_line("Traceback\n  x\ntorch.OutOfMemoryError: too large\nnote\n")
        },
        "encode:jaxembed": {"tokens": 90, "seconds": 0.5, "gib": None, "computed_tokens": 100},
        "encode:sentence-transformers": {"tokens": 90, "seconds": 1.0, "gib": None},
    }
    gpu.print_sides(results, gpu.find_peak_flops("NVIDIA H200"))
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "| full | jaxembed | 0.500 | 200 | 0.500 | 1.5 |  |",
        "| full | sentence-transformers | failed: torch.OutOfMemoryError: too large | | | | |",
        "| encode | jaxembed | 0.500 | 180 |  |  | 0.100 |",
        "| encode | sentence-transformers | 1.000 | 90 |  |  |  |",
    ]
    assert gpu.list_ratios(results) == {"encode": 2.0}


def test_flops_are_those_of_the_meter_of_training(gpu: Any) -> None:
    jaxembed_side = importlib.import_module("gpu_jaxembed")
    for lora in (False, True):
        work = gpu.WORKLOADS["lora" if lora else "full"].shrink()
        model = jaxembed_side.build_model(work)
        texts = work.draw_texts()
        trained, frozen = jaxembed_side.split_params(compute_shapes_and_shardings(model, jaxembed_side.make_mesh(1))[0])
        meter = make_mfu_meter(model.transformer, {} if lora else trained, frozen, 0, 1.0)
        lengths = np.array([len(text) for text in texts])
        assert work.count_flops(texts) == pytest.approx(meter.compute_mfu(int(lengths.sum()), int((lengths**2).sum()), 1.0))
