"""MFU against constants by hand, and what a run logs and traces of its own speed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from helpers.runs import prepare, settings
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import DecoderConfig
from jaxembed.model.lora import LoRA, split, stacked_shapes
from jaxembed.runs.train import train
from jaxembed.training import mfu as flops
from jaxembed.training.metrics import read_metrics
from jaxembed.training.profile import Profile

DECODER = DecoderConfig("qwen2", vocab_size=50, width=8, layers=3, heads=2, kv_heads=1, head_width=4, mlp_width=16)
# q and out 8 x 8, k and v 8 x 4, three of 8 x 16, in each of 3 layers
KERNELS = 3 * (2 * 64 + 2 * 32 + 3 * 128)
ADAPTERS = 3 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))  # of rank 2


def shapes(spec: EmbeddingSpec, lora: LoRA | None = None) -> tuple:
    return split(nn.unbox(parameter_shapes(EmbeddingModel(DECODER, spec, Compute(), lora))))


def test_a_token_costs_six_of_each_number_and_a_pair_twelve_of_each_channel():
    used = flops.make_mfu_meter(DECODER, *shapes(EmbeddingSpec()), adapters=0, peak=1e6)
    assert (used.a_token, used.a_pair) == (6 * KERNELS, 12 * 3 * 2 * 4)
    assert used.mfu(tokens=10, pairs=25, seconds=0.5) == (10 * 6 * 1728 + 25 * 288) / 0.5e6


def test_frozen_kernels_cost_four_and_one_adapter_is_counted():
    trained, frozen = shapes(EmbeddingSpec(), LoRA(2, 4.0))
    one = flops.make_mfu_meter(DECODER, trained, frozen, adapters=0, peak=1.0)
    assert one.a_token == 4 * KERNELS + 6 * ADAPTERS
    mesh = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh), trained)
    assert flops.make_mfu_meter(DECODER, stacked_shapes(placed, 3), frozen, adapters=3, peak=1.0).a_token == one.a_token


def test_poolings_count_what_tokens_pass():
    assert flops.numbers(shapes(EmbeddingSpec(pooling="self_attention", pooling_heads=2))[0]) == KERNELS + (
        64 + 128 + 64 + 8 * 64 + 32 * 8
    )
    latent = EmbeddingSpec(pooling="latent_attention", latents=5, pooling_heads=2)  # heads as wide as the model
    assert flops.numbers(shapes(latent)[0]) == KERNELS + 2 * 8 * 16 + 8 * 64 + 32 * 8


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", None), ("cpu", None),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("TPU7x", None),
    ],
)  # fmt: skip
def test_peaks_by_the_names_of_devices(kind, peak, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert flops.device_peak("bfloat16") == peak
    assert flops.device_peak("float32") is None


def test_a_run_logs_mfu_and_traces_the_steps_that_it_is_told(tmp_path):
    prepare(tmp_path)
    tiny = ["train.steps=2", "eval.sets=[]"]
    train(settings(tmp_path, "plain", *tiny))
    train(settings(tmp_path, "measured", *tiny, "train.peak_flops=1e12", "train.profile_steps=[2, 2]"))
    plain, measured = (read_metrics(tmp_path / run) for run in ("plain", "measured"))
    assert not (tmp_path / "plain" / "profile").exists()
    assert not any("mfu" in row for row in plain)
    np.testing.assert_array_equal([row["loss"] for row in plain], [row["loss"] for row in measured])
    # 3 layers of 32 x (64, 32, 32), 64 x 32 and three of 32 x 48; 2 devices
    a_token = 6 * 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)
    for row in measured:
        speed = row["useful_tokens_per_second"] * a_token / 2e12
        assert speed < row["mfu"] < 1.5 * speed  # attention is the rest
    [trace] = (tmp_path / "measured" / "profile").rglob("*.xplane.pb")
    events = (event for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for event in line.events)
    assert {dict(event.stats)["step_num"] for event in events if event.name == "train"} == {2}


def test_a_trace_is_written_of_a_run_that_ends_before_its_last_step(tmp_path):
    profile = Profile((2, 5), tmp_path)
    profile.before(1)
    profile.close()
    assert not list(tmp_path.iterdir())
    profile.before(3)  # of a run that was resumed there
    profile.after(3, jnp.ones(3) + 1)
    profile.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_steps_of_a_trace_are_in_order(tmp_path):
    with pytest.raises(UserError, match=r"train\.profile_steps: steps 5 to 1; expected two steps, the first not after"):
        settings(tmp_path, "wrong", "train.profile_steps=[5, 1]")
