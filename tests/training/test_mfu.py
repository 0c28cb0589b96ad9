"""MFU compared with constants computed by hand, and the speed and the trace that a run records."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from helpers.runs import make_config, write_base_and_data
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.families import TransformerConfig
from jaxembed.model.lora import split_params, stack_shapes
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics
from jaxembed.training.mfu import count_kernel_weights, find_device_peak, make_mfu_meter
from jaxembed.training.profile import Profile

DECODER = TransformerConfig("qwen2", vocab_size=50, width=8, layers=3, heads=2, kv_heads=1, head_width=4, mlp_width=16)
# In each of 3 layers: q and out are 8 x 8, k and v are 8 x 4, and the three kernels of the MLP are 8 x 16.
KERNEL_WEIGHTS = 3 * (2 * 64 + 2 * 32 + 3 * 128)
ADAPTER_WEIGHTS = 3 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))  # rank 2


def split_shapes(spec: EmbeddingSpec, lora: LoraConfig | None = None) -> tuple[Any, Any]:
    """Return the shapes of the trained and of the frozen parameters."""
    return split_params(nn.unbox(infer_parameter_shapes(EmbeddingModel(DECODER, spec, ComputeOptions(), lora))))


def test_a_token_costs_six_flops_per_weight_and_a_pair_twelve_per_channel() -> None:
    meter = make_mfu_meter(DECODER, *split_shapes(EmbeddingSpec()), adapters=0, peak_flops=1e6)
    assert (meter.token_flops, meter.pair_flops) == (6 * KERNEL_WEIGHTS, 12 * 3 * 2 * 4)
    assert meter.compute_mfu(tokens=10, pairs=25, seconds=0.5) == (10 * 6 * 1728 + 25 * 288) / 0.5e6


def test_frozen_weights_cost_four_flops_and_only_one_of_several_adapters_counts() -> None:
    trained, frozen = split_shapes(EmbeddingSpec(), LoraConfig(rank=2, alpha=4.0))
    single = make_mfu_meter(DECODER, trained, frozen, adapters=0, peak_flops=1.0)
    assert single.token_flops == 4 * KERNEL_WEIGHTS + 6 * ADAPTER_WEIGHTS
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trained)
    stacked = make_mfu_meter(DECODER, stack_shapes(shapes, 3), frozen, adapters=3, peak_flops=1.0)
    assert stacked.token_flops == single.token_flops


def test_poolings_count_the_kernels_that_tokens_pass() -> None:
    self_attention = EmbeddingSpec(pooling="self_attention", pooling_heads=2)
    pooling_weights = 64 + 128 + 64 + 8 * 64 + 32 * 8
    assert count_kernel_weights(split_shapes(self_attention)[0]) == KERNEL_WEIGHTS + pooling_weights
    latent = EmbeddingSpec(pooling="latent_attention", latents=5, pooling_heads=2)  # heads as wide as the model
    assert count_kernel_weights(split_shapes(latent)[0]) == KERNEL_WEIGHTS + 2 * 8 * 16 + 8 * 64 + 32 * 8
    paper = latent.replace(pooling="latent_attention_paper")  # attention without kernels, then a feed-forward layer
    assert count_kernel_weights(split_shapes(paper)[0]) == KERNEL_WEIGHTS + 8 * 32 + 32 * 8


def test_the_peak_is_that_of_the_chip_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")])
    assert find_device_peak("bfloat16") == 197e12
    assert find_device_peak("float32") is None
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="cpu")])
    assert find_device_peak("bfloat16") is None


def test_a_run_logs_mfu_and_traces_the_chosen_steps(tmp_path: Path) -> None:
    write_base_and_data(tmp_path)
    tiny = ["train.steps=2", "eval.sets=[]"]
    train(make_config(tmp_path, "plain", *tiny))
    train(make_config(tmp_path, "measured", *tiny, "train.peak_flops=1e12", "train.profile_steps=[2, 2]"))
    plain, measured = (read_metrics(tmp_path / run) for run in ("plain", "measured"))
    assert not (tmp_path / "plain" / "profile").exists()
    assert not any("mfu" in row for row in plain)
    np.testing.assert_array_equal([row["loss"] for row in plain], [row["loss"] for row in measured])
    # 3 layers of 32 x (64, 32, 32), 64 x 32 and three of 32 x 48, on 2 devices.
    token_flops = 6 * 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)
    for row in measured:
        kernel_mfu = row["useful_tokens_per_second"] * token_flops / 2e12
        assert kernel_mfu < row["mfu"] < 1.5 * kernel_mfu  # the rest is attention
    [trace] = (tmp_path / "measured" / "profile").rglob("*.xplane.pb")
    events = (event for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for event in line.events)
    assert {dict(event.stats)["step_num"] for event in events if event.name == "train"} == {2}


def test_the_trace_of_a_run_that_ends_early_is_written(tmp_path: Path) -> None:
    profile = Profile((2, 5), tmp_path)
    profile.before_step(1)
    profile.close()
    assert not list(tmp_path.iterdir())
    profile.before_step(3)  # a run that resumes there
    profile.after_step(3, jnp.ones(3) + 1)
    profile.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_the_steps_of_a_trace_must_be_in_order(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.profile_steps: the steps are 5 to 1 \(expected a first step that is not"):
        make_config(tmp_path, "wrong", "train.profile_steps=[5, 1]")
