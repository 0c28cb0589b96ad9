"""Chips by JAX's names of devices."""

from __future__ import annotations

import pytest

from jaxembed.devices.chips import TPU_CHIPS, find_chip


@pytest.mark.parametrize(
    ("device_kind", "peak_flops"),
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)  # fmt: skip
def test_a_chip_is_found_by_its_device_kind(device_kind: str, peak_flops: float) -> None:
    chip = find_chip(device_kind)
    assert chip is not None and chip.peak_flops == peak_flops


@pytest.mark.parametrize("device_kind", ["NVIDIA L40S", "cpu", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU7x"])
def test_an_unknown_device_has_no_chip(device_kind: str) -> None:
    assert find_chip(device_kind) is None


def test_tpu_names_of_topologies_and_devices_agree() -> None:
    assert find_chip("TPU v5 lite") is TPU_CHIPS["v5e"]
    assert find_chip("TPU v5") is TPU_CHIPS["v5p"]
