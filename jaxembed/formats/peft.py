"""LoRA adapters as PEFT folders: reads adapter_model.safetensors, and writes whole folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxembed.config import LoraConfig
from jaxembed.config.model import MAX_LORA_RANK
from jaxembed.errors import UserError
from jaxembed.files import exists, write_json
from jaxembed.formats.peft_config import ADAPTER_CONFIG_FILE, DISABLED_VARIANTS, read_lora_config
from jaxembed.model.families import FAMILIES, TransformerConfig
from jaxembed.model.lora import TARGET_PROJECTIONS

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# Prefixes of PEFT's tensor names: on a base with a language-model head, and on one without.
PEFT_NAME_PREFIXES = ("base_model.model.model.", "base_model.model.")
# PEFT's names of the two factors, and ours.
FACTORS = {"lora_A": "lora_a", "lora_B": "lora_b"}


def read_adapters(folder: Path, transformer: TransformerConfig) -> tuple[LoraConfig, Any]:
    """Read the LoRA adapters of a PEFT folder for a transformer with a given family and number of layers.

    Returns:
        The sizes of the adapters, and their parameters: `lora_a` [L, in, rank] and `lora_b` [L, rank, out] in float32 at the
        paths of the projections.

    Raises:
        UserError: The adapters are of another kind than LoRA, or tensors are missing, misshapen or unexpected.
    """
    fields = read_lora_config(folder / ADAPTER_CONFIG_FILE)
    path, rank = folder / ADAPTER_WEIGHTS_FILE, fields.integer("r", maximum=MAX_LORA_RANK)
    tensors, num_layers, projections = _load_tensors(path), transformer.layers, _list_projections(transformer.family)
    params: dict[tuple[str, ...], np.ndarray] = {}
    targets = []
    for target, (param_path, module) in projections.items():
        names = {factor: [f"{module.format(i=i)}.{factor}.weight" for i in range(num_layers)] for factor in FACTORS}
        missing = [name for factor in FACTORS for name in names[factor] if name not in tensors]
        if len(missing) == len(FACTORS) * num_layers:  # no adapter on this projection
            continue
        if missing:
            raise UserError(f"{path}: {missing[0]} is missing (expected adapters of {target} in every layer).")
        targets.append(target)
        for factor, param_name in FACTORS.items():
            params[*param_path, param_name] = _stack_layers(tensors, names[factor], factor, rank, path)
    if tensors or not targets:
        problem = f"unexpected tensor {next(iter(tensors))}" if tensors else "no adapters"
        raise UserError(f"{path}: {problem} (expected adapters of {', '.join(projections)} in {num_layers} layers).")
    return LoraConfig(rank=rank, alpha=fields.positive_number("lora_alpha"), targets=tuple(targets)), unflatten_dict(params)


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Load the adapters' tensors in float32, by their names without PEFT's prefix."""
    if not exists(path):
        pickle_path = path.with_suffix(".bin")
        problem = (
            f"only {pickle_path.name} is there, and of the two only safetensors is read"
            if exists(pickle_path)
            else "no such file"
        )
        raise UserError(f"{path}: {problem}. Load the adapters with PEFT, and save them again with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}). Download it again.") from None
    return {_strip_prefix(name): tensor.astype(np.float32) for name, tensor in tensors.items()}


def _strip_prefix(name: str) -> str:
    for prefix in PEFT_NAME_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _stack_layers(tensors: dict[str, np.ndarray], names: Sequence[str], factor: str, rank: int, path: Path) -> np.ndarray:
    """Take a factor's tensors of all layers, [rank, in] or [out, rank], and stack their transposes.

    Raises:
        UserError: A tensor has another rank than the config, or another shape than in the first layer.
    """
    first = tensors[names[0]].shape
    expected = (rank, *first[1:]) if factor == "lora_A" else (*first[:1], rank)
    for name in names:
        if tensors[name].shape != expected:
            raise UserError(f"{path}: {name} is misshapen ({tensors[name].shape}; expected {expected}).")
    return np.stack([tensors.pop(name).T for name in names])


def write_adapters(folder: Path, params: Any, lora: LoraConfig, base: str, family: str = "llama") -> None:
    """Write the adapters among a model's parameters as a PEFT folder.

    Args:
        folder: Existing folder to write to.
        params: The parameters of the model, with adapters.
        lora: Sizes of the adapters.
        base: Name of the base model.
        family: Family of the transformer.
    """
    flat, projections = flatten_dict(params), _list_projections(family)
    tensors = {}
    targets = [target for target in lora.targets if target in projections]
    for param_path, module in (projections[target] for target in targets):
        for factor, param_name in FACTORS.items():
            for i, layer in enumerate(np.asarray(flat[*param_path, param_name])):
                name = f"{PEFT_NAME_PREFIXES[1]}{module.format(i=i)}.{factor}.weight"
                tensors[name] = np.ascontiguousarray(layer.T)
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise UserError(f"{broken[0]}: these adapters are not finite (NaN or infinity). Use another checkpoint.")
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(
        folder / ADAPTER_CONFIG_FILE,
        {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base, "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
            "target_modules": _build_module_pattern({target: projections[target][1] for target in targets}),
            "inference_mode": True, **DISABLED_VARIANTS,
        },
    )  # fmt: skip


def _list_projections(family: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return each projection's path in our tree and its module in the base's files, by the target that names it in configs.

    Raises:
        UserError: Projections share a module.
    """
    targets = {projection: target for target, projection in TARGET_PROJECTIONS.items()}
    paths = {tuple(path.split("/")): module for path, module in FAMILIES[family].modules.items()}
    projections = {targets[path[-1]]: (path, module) for path, module in paths.items() if path[-1] in targets}
    if len({module for _, module in projections.values()}) < len(projections):
        raise UserError(
            f"PEFT folders of {family} are not supported, because its projections share modules (expected one for each). "
            "Export the whole model instead."
        )
    return projections


def _build_module_pattern(modules: Mapping[str, str]) -> list[str] | str:
    """Return PEFT's `target_modules`: the last names of modules, or a pattern of whole names where these are ambiguous.

    Args:
        modules: The modules of the adapters, by their targets.
    """
    if all(module.endswith(f".{target}") for target, module in modules.items()):
        return list(modules)
    names = "|".join(re.escape(module.partition("{i}.")[2]) for module in modules.values())
    return rf".*\.\d+\.({names})"
