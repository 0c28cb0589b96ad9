"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxembed.config.fields import Fields
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json, write_json
from jaxembed.formats.weights import TABLE
from jaxembed.model.lora import TARGETS, LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT puts before names, for a base without and with a language-model head.
PREFIXES = ("base_model.model.model.", "base_model.model.")
# Keys of variants that compute something else -> the value that leaves them off.
OFF = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}


def is_peft(folder: Path) -> bool:
    return exists(folder / CONFIG)


def base_of(folder: Path) -> str:
    """The base that a PEFT folder names."""
    return Fields(read_json(folder / CONFIG), str(folder / CONFIG)).text("base_model_name_or_path")


def read_adapters(folder: Path, layers: int) -> tuple[LoRA, Any]:
    """Sizes and parameters (`lora_a`, `lora_b` stacked over the layers) of a PEFT folder.

    `UserError` on another kind of adapters than LoRA, on tensors that are missing and on those that have no place here.
    """
    path = folder / CONFIG
    config = read_json(path)
    fields = Fields(config, str(path))
    if fields.text("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {fields.text('peft_type')}; only LORA is supported")
    wrong = [key for key, off in OFF.items() if config.get(key, off) not in (off, None)]
    wrong += [key for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save") if config.get(key)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is {config[wrong[0]]!r}, which is not supported")
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not a whole safetensors file ({error}); fetch it again") from None
    tensors = {_bare(name): tensor.astype(np.float32) for name, tensor in stored.items()}
    params: dict[tuple[str, ...], np.ndarray] = {}
    targets = []
    for target, (path_here, theirs) in _projections().items():
        names = {part: [f"{theirs.format(i=i)}.{part}.weight" for i in range(layers)] for part in ("lora_A", "lora_B")}
        found = [name for part in names.values() for name in part if name in tensors]
        if not found:
            continue
        absent = [name for part in names.values() for name in part if name not in tensors]
        if absent:
            raise UserError(f"{folder / WEIGHTS}: {absent[0]} is missing; adapters must stand in every layer or in none")
        targets.append(target)
        for part, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            params[(*path_here, ours)] = np.stack([tensors.pop(name).T for name in names[part]])
    if tensors or not targets:
        told = next(iter(tensors), "nothing")
        raise UserError(f"{folder / WEIGHTS}: holds {told}; expected adapters of {', '.join(TARGETS)} in {layers} layers")
    return LoRA(fields.whole("r"), fields.number("lora_alpha"), targets=tuple(targets)), unflatten_dict(params)


def write_adapters(folder: Path, params: Any, lora: LoRA, base: str) -> None:
    """Writes a PEFT folder, which must exist, of the adapters among a model's parameters."""
    flat = flatten_dict(params)
    tensors = {}
    for target in lora.targets:
        path, theirs = _projections()[target]
        for part, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            for i, one in enumerate(np.asarray(flat[(*path, ours)])):
                tensors[f"{PREFIXES[1]}{theirs.format(i=i)}.{part}.weight"] = np.ascontiguousarray(one.T)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base, "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": list(lora.targets),
            "inference_mode": True, **OFF,
        },
    )  # fmt: skip


def _projections() -> Mapping[str, tuple[tuple[str, ...], str]]:
    """PEFT's name of each projection -> its path in our tree and its name in the base's files, without .weight."""
    kernels = {e.theirs.removesuffix(".weight"): tuple(e.ours.split("/")[:-1]) for e in TABLE if e.ours.endswith("/kernel")}
    return {name.rsplit(".", 1)[-1]: (path, name) for name, path in kernels.items() if name.rsplit(".", 1)[-1] in TARGETS}


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
