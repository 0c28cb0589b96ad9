"""Propose the mesh, the rows per chunk and the rematerialization of a step, from estimates of memory and time.

The estimates are arithmetic on sizes; nothing is compiled. Time is a roofline model without overlap: matmuls, then memory
traffic, then communication. Compared with programs of the TPU compiler, memory is estimated 0 to 20% too high.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.config import LoraConfig
from jaxembed.devices.chips import TpuChip, find_chip
from jaxembed.model.families import TransformerConfig

# Rates (FLOP/s, bytes/s) for devices that the table of chips lacks. Only their ratios matter for the choice of settings.
UNKNOWN_CHIP = TpuChip("", peak_flops=200e12, memory=0, memory_bandwidth=800e9, link_bandwidth=200e9)
# Bytes per trained parameter in float32: its value, two moments, and its gradients of a chunk, of a step, and in transit.
STATE_BYTES_PER_PARAMETER = 28
# Bytes per element of the hidden states (tokens x width) that embedding, last norm and pooling store. They count only without
# recomputation, which stores all chunks at once.
OUTSIDE_BYTES_PER_ELEMENT = 16
MAX_MEMORY_SHARE = 0.95  # share of the device memory that the estimate may fill
EQUAL_SPEED_RATIO = 1.02  # settings whose step times differ by at most this ratio count as equally fast


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """Sizes of a training step.

    Attributes:
        transformer: Sizes of the transformer.
        parameters: Number of its parameters.
        lora: Adapters, if the transformer is frozen.
        itemsize: Bytes per element of the compute dtype.
        rows: Rows of a batch, over all devices.
        row_length: Tokens of a row.
        frozen_parameters: Number of parameters that are not trained. With adapters, all are counted as such.
    """

    transformer: TransformerConfig
    parameters: int
    lora: LoraConfig | None
    itemsize: int
    rows: int
    row_length: int
    frozen_parameters: int = 0

    @property
    def layer_weights(self) -> int:
        """Number of weights in the matrices of a layer."""
        c = self.transformer
        attention_columns = c.head_width * (2 * c.heads + 2 * c.kv_heads)  # of the query, key, value and output projections
        return c.width * (attention_columns + (3 if c.gated_mlp else 2) * c.mlp_width)

    @property
    def layer_elements(self) -> int:
        """Number of activation elements per token that the backward pass of a layer needs."""
        c = self.transformer
        return 4 * c.width + c.head_width * (3 * c.heads + 2 * c.kv_heads) + 4 * c.mlp_width


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Settings of a step, with estimates of its memory and time on each device.

    Attributes:
        fsdp: `mesh.fsdp`.
        rows: `gradcache.rows`, the rows of a device per chunk; None for all rows at once.
        recompute: `gradcache.recompute`.
        remat: `model.remat`.
        policy: `model.remat_policy`.
        memory: Estimated bytes of memory on a device.
        seconds: Estimated seconds of a step.
    """

    fsdp: int
    rows: int | None
    recompute: bool
    remat: bool
    policy: str
    memory: float = 0.0
    seconds: float = 0.0

    def describe(self, prefix: str = "") -> str:
        """Return all settings as overrides of a config. `prefix` precedes the keys of a stage."""
        return (
            f"mesh.data=-1 mesh.fsdp={self.fsdp} model.remat={str(self.remat).lower()} model.remat_policy={self.policy} "
            f"{prefix}gradcache.rows={'null' if self.rows is None else self.rows} "
            f"{prefix}gradcache.recompute={str(self.recompute).lower()}"
        )


def propose(sizes: StepSizes, mesh: Mesh, memory: int) -> Proposal | None:
    """Return the settings with the fastest estimated step that fits into memory; None if none fits.

    Of settings that are about as fast, those with the least memory are returned. The number of devices along `tensor` does
    not change.

    Args:
        sizes: Sizes of the step.
        mesh: The devices.
        memory: Bytes of memory of a device.
    """
    device = mesh.devices.flat[0]
    device_chip = find_chip(device.device_kind)
    chip = device_chip if isinstance(device_chip, TpuChip) else UNKNOWN_CHIP
    num_devices = mesh.size // mesh.shape["tensor"]
    candidates = (estimate_step(sizes, candidate, num_devices, chip) for candidate in _iter_candidates(sizes, num_devices))
    fitting = [candidate for candidate in candidates if candidate.memory <= MAX_MEMORY_SHARE * memory]
    fastest = min((candidate.seconds for candidate in fitting), default=0.0)
    fast = [candidate for candidate in fitting if candidate.seconds <= EQUAL_SPEED_RATIO * fastest]
    return min(fast, key=lambda candidate: candidate.memory, default=None)


def make_step_sizes(
    transformer: TransformerConfig,
    parameters: int,
    lora: LoraConfig | None,
    dtype: Any,
    batch_shape: tuple[int, int],
    frozen_parameters: int = 0,
) -> StepSizes:
    """Return the sizes of a step.

    Args:
        transformer: Sizes of the transformer.
        parameters: Number of its parameters.
        lora: Adapters, if any.
        dtype: Dtype of the computation.
        batch_shape: Rows of the batch, and tokens of a row.
        frozen_parameters: Number of parameters that are not trained.
    """
    return StepSizes(transformer, parameters, lora, jax.numpy.dtype(dtype).itemsize, *batch_shape, frozen_parameters)


def _iter_candidates(sizes: StepSizes, num_devices: int) -> Iterator[Proposal]:
    """Yield settings to compare."""
    device_rows = -(-sizes.rows // num_devices)
    chunk_sizes = [None, *(1 << i for i in range(device_rows.bit_length()) if 1 << i < device_rows)]
    remat_settings = [(False, "nothing"), (True, "nothing"), (True, "attention"), (True, "matmuls")]
    for fsdp in (n for n in range(1, num_devices + 1) if num_devices % n == 0 and sizes.transformer.width % n == 0):
        for rows in chunk_sizes:
            for remat, policy in remat_settings:
                yield Proposal(fsdp, rows, True, remat, policy)
            if rows is not None:
                yield Proposal(fsdp, rows, False, True, "nothing")


def estimate_step(sizes: StepSizes, settings: Proposal, num_devices: int, chip: TpuChip) -> Proposal:
    """Return the settings with estimates of memory and time.

    Args:
        sizes: Sizes of the step.
        settings: The settings.
        num_devices: Number of devices that the batch is split over.
        chip: Rates of a device.
    """
    # Sizes on each device.
    c, itemsize = sizes.transformer, sizes.itemsize
    device_rows = -(-sizes.rows // num_devices)
    chunk_rows = min(settings.rows or device_rows, device_rows)
    num_chunks = -(-device_rows // chunk_rows)
    device_tokens, chunk_tokens = device_rows * sizes.row_length, chunk_rows * sizes.row_length
    weights = sizes.layer_weights * c.layers
    remote_share = (settings.fsdp - 1) / settings.fsdp  # of the parameters, which other devices hold

    # Memory: the state, the stored activations of a chunk or of all chunks, and one layer with its gradients and weights.
    trained_parameters = sizes.parameters - sizes.frozen_parameters
    if sizes.lora is None:
        parameter_bytes = STATE_BYTES_PER_PARAMETER * trained_parameters + 4 * sizes.frozen_parameters
    else:
        parameter_bytes = {"float32": 4, "bfloat16": 2, "int8": 1}[sizes.lora.base_dtype] * sizes.parameters
    stored_tokens = chunk_tokens if settings.recompute else device_tokens
    activation_bytes = itemsize * _count_stored_elements(sizes, settings) * c.layers * stored_tokens
    outside_bytes = 0 if settings.recompute else OUTSIDE_BYTES_PER_ELEMENT * c.width * device_tokens
    layer_bytes = 2 * itemsize * sizes.layer_elements * chunk_tokens + (2 * itemsize + 4) * sizes.layer_weights
    memory = parameter_bytes / settings.fsdp + activation_bytes + outside_bytes + layer_bytes

    # Passes over the weights: forward, once more for each recomputation, and backward for inputs and trained weights.
    recomputations = (num_chunks > 1 and settings.recompute) + (settings.remat and settings.policy != "matmuls")
    forward_passes, backward_passes = 1 + recomputations, 2 if sizes.lora is None else 1
    # Time: matmuls, memory traffic of weights and activations, and communication.
    attention_flops = 4 * sizes.row_length * c.heads * c.head_width * c.layers
    flops = device_tokens * (2 * weights * (forward_passes + backward_passes) + attention_flops * (forward_passes + 2))
    traffic_elements = num_chunks * weights + device_tokens * c.layers * sizes.layer_elements
    traffic_bytes = itemsize * (forward_passes + backward_passes) * traffic_elements
    all_gather_bytes = num_chunks * (forward_passes + 1) * itemsize * weights * remote_share
    reduce_bytes = 0.0 if sizes.lora is not None else num_chunks * 8 * weights * remote_share
    if sizes.lora is None and num_devices > settings.fsdp:
        reduce_bytes += 8 * trained_parameters / settings.fsdp * (num_chunks if settings.fsdp > 1 else 1)
    compute_seconds = flops / chip.peak_flops + traffic_bytes / chip.memory_bandwidth
    seconds = compute_seconds + (all_gather_bytes + reduce_bytes) / chip.link_bandwidth
    return dataclasses.replace(settings, memory=memory, seconds=seconds)


def _count_stored_elements(sizes: StepSizes, settings: Proposal) -> float:
    """Return the elements per token and layer that are stored between the forward and the backward pass."""
    c = sizes.transformer
    heads = c.heads * c.head_width
    if not settings.remat:
        return sizes.layer_elements
    projections = 2 * heads + 2 * c.kv_heads * c.head_width + c.width + 2 * c.mlp_width
    return c.width + {"attention": heads, "matmuls": projections}.get(settings.policy, 0)
