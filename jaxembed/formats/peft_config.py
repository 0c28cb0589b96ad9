"""Reading adapter_config.json, the config of a PEFT folder. Needs no JAX."""

from __future__ import annotations

from pathlib import Path

from jaxembed.config.fields import Fields
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json

ADAPTER_CONFIG_FILE = "adapter_config.json"
# Keys of LoRA variants that compute something else, with the values that turn these variants off.
DISABLED_VARIANTS = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
UNSUPPORTED_KEYS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save")


def is_peft_folder(folder: Path) -> bool:
    """Return whether a folder contains PEFT adapters."""
    return exists(folder / ADAPTER_CONFIG_FILE)


def read_base_name(folder: Path) -> str:
    """Return the name of the base model that a PEFT folder refers to."""
    path = folder / ADAPTER_CONFIG_FILE
    return Fields(read_json(path), str(path)).string("base_model_name_or_path")


def read_lora_config(path: Path) -> Fields:
    """Read an adapter_config.json.

    Raises:
        UserError: If it describes anything but plain LoRA with one rank.
    """
    config = read_json(path)
    fields = Fields(config, str(path))
    kind = fields.string("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind} is not supported (expected LORA).")
    unsupported = [key for key, off in DISABLED_VARIANTS.items() if config.get(key, off) not in (off, None)]
    unsupported += [key for key in UNSUPPORTED_KEYS if config.get(key)]
    if unsupported:
        raise UserError(f"{path}: {unsupported[0]} {config[unsupported[0]]!r} is not supported (expected plain LoRA).")
    return fields
