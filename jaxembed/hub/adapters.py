"""Turn PEFT folders into low-rank updates of a base's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxembed.errors import UserError
from jaxembed.formats.peft import read_adapters
from jaxembed.formats.weights import LowRankUpdate
from jaxembed.model.families import TransformerConfig


def read_kernel_updates(folders: Iterable[Path], transformer: TransformerConfig, shapes: Any) -> dict[str, LowRankUpdate]:
    """Read the low-rank updates that PEFT folders add to the kernels of a transformer.

    Args:
        folders: PEFT folders. Their updates are summed.
        transformer: The transformer: its family and its number of layers.
        shapes: Tree of the shapes of the model's parameters.

    Returns:
        The factors ([L, in, rank], [L, rank, out]) of each update by the path of its kernel. The scale is in the second one.

    Raises:
        UserError: An adapter does not fit its kernel.
    """
    flat_shapes = flatten_dict(shapes)
    updates: dict[str, LowRankUpdate] = {}
    for folder in folders:
        lora, adapters = read_adapters(folder, transformer)
        flat = flatten_dict(adapters)
        for path in (path[:-1] for path in flat if path[-1] == "lora_a"):
            a, b = flat[*path, "lora_a"], np.float32(lora.scale) * flat[*path, "lora_b"]
            kernel_path = "/".join((*path, "kernel"))
            shape, kernel_shape = (a.shape[-2], b.shape[-1]), flat_shapes[*path, "kernel"].shape[-2:]
            if shape != kernel_shape:
                raise UserError(
                    f"{folder}: the adapters do not fit the base ({'/'.join(path[1:])} maps {shape[0]} to {shape[1]}; "
                    f"expected {kernel_shape[0]} to {kernel_shape[1]}). Use the base that they were trained on."
                )
            if kernel_path in updates:  # A1 B1 + A2 B2 = [A1 A2] [B1; B2]
                first_a, first_b = updates[kernel_path]
                a, b = np.concatenate((first_a, a), axis=-1), np.concatenate((first_b, b), axis=-2)
            updates[kernel_path] = (a, b)
    return updates
