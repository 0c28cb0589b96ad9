"""Proposed settings: estimates against programs that the TPU compiler has compiled, and the choice among them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxembed.config import LoraConfig
from jaxembed.devices.chips import TPU_CHIPS
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.model.presets import find_preset
from jaxembed.planning.proposal import Proposal, StepSizes, estimate_step, make_step_sizes, propose

PARAMETERS = {"mistral-7b": 7_110_660_096, "qwen2-0.5b": 494_032_768}
LORA = LoraConfig(base_dtype="bfloat16")


def make_step(preset: str, lora: LoraConfig | None = None) -> StepSizes:
    """Return a step of 32,768 pairs of texts of 512 tokens."""
    transformer = parse_hf_config(find_preset(preset), preset)
    return make_step_sizes(transformer, PARAMETERS[preset], lora, "bfloat16", (65_536, 512))


def make_slice(kind: str, devices: int) -> Any:
    """Return what a proposal reads of a mesh of TPU chips that are not here."""
    names = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    device = SimpleNamespace(device_kind=names[kind])
    return SimpleNamespace(devices=np.array([device]), size=devices, shape={"tensor": 1})


@pytest.mark.parametrize(
    ("preset", "lora", "kind", "devices", "fsdp", "rows", "compiled"),
    [
        ("mistral-7b", None, "v5e", 256, 256, 52, 15.2e9),
        ("mistral-7b", None, "v5e", 32, 32, 32, 16.8e9),
        ("mistral-7b", None, "v5p", 256, 256, 64, 22.5e9),
        ("mistral-7b", None, "v5p", 4, 4, 32, 62.1e9),
        ("mistral-7b", LORA, "v5e", 256, 16, 32, 13.0e9),
        ("qwen2-0.5b", None, "v5e", 1, 1, 8, 13.2e9),
    ],
)
def test_memory_is_estimated_as_the_compiler_reported(
    preset: str, lora: LoraConfig | None, kind: str, devices: int, fsdp: int, rows: int, compiled: float
) -> None:
    """The figures are those of docs/results/scaling.md."""
    step = estimate_step(make_step(preset, lora), Proposal(fsdp, rows, True, True, "nothing"), devices, TPU_CHIPS[kind])
    assert 0.95 * compiled < step.memory < 1.25 * compiled


def test_kept_values_save_time_and_need_memory() -> None:
    def run(recompute: bool, policy: str) -> Proposal:
        settings = Proposal(256, 32, recompute, True, policy)
        return estimate_step(make_step("mistral-7b"), settings, 256, TPU_CHIPS["v5p"])

    least, attention, matmuls = (run(True, policy) for policy in ("nothing", "attention", "matmuls"))
    kept = run(False, "nothing")
    assert least.memory < attention.memory < matmuls.memory and least.memory < kept.memory
    assert matmuls.seconds < least.seconds and kept.seconds < least.seconds


def test_the_fastest_settings_that_fit_are_proposed() -> None:
    sizes, mesh = make_step("mistral-7b"), make_slice("v5p", 256)
    proposals = [propose(sizes, mesh, gib << 30) for gib in (1, 16, 48, 95)]
    assert proposals[0] is None
    known = [proposal for proposal in proposals if proposal is not None]
    assert [proposal.seconds for proposal in known] == sorted((proposal.seconds for proposal in known), reverse=True)
    assert all(proposal.memory <= 0.95 * (gib << 30) for proposal, gib in zip(known, (16, 48, 95), strict=True))
    assert known[-1].describe().startswith("mesh.data=-1 mesh.fsdp=256 model.remat=true model.remat_policy=")


def test_a_small_batch_needs_no_chunks() -> None:
    transformer = parse_hf_config(find_preset("qwen2-0.5b"), "qwen2-0.5b")
    sizes = make_step_sizes(transformer, PARAMETERS["qwen2-0.5b"], None, "bfloat16", (16, 512))
    proposal = propose(sizes, make_slice("v5p", 4), 95 << 30)
    assert proposal is not None and proposal.rows is None
    assert "gradcache.rows=null" in proposal.describe()
    # Values that equal the defaults are listed too: the config may have others.
    settings = Proposal(2, 8, True, True, "nothing").describe("stages.1.")
    assert settings == (
        "mesh.data=-1 mesh.fsdp=2 model.remat=true model.remat_policy=nothing stages.1.gradcache.rows=8 "
        "stages.1.gradcache.recompute=true"
    )


def test_a_frozen_parameter_takes_4_bytes_and_a_trained_one_28() -> None:
    sizes, frozen = make_step("qwen2-0.5b"), 100_000_000
    settings, chip = Proposal(1, 8, True, True, "nothing"), TPU_CHIPS["v5e"]
    steps = (estimate_step(dataclasses.replace(sizes, frozen_parameters=n), settings, 1, chip) for n in (0, frozen))
    all_trained, some_frozen = (step.memory for step in steps)
    assert all_trained - some_frozen == (28 - 4) * frozen
