"""Read adapter_config.json, the config of a PEFT folder. Needs no JAX."""

from __future__ import annotations

from pathlib import Path

from jaxembed.config.field_lists import FieldList
from jaxembed.config.fields import Fields, quote_value
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json

ADAPTER_CONFIG_FILE = "adapter_config.json"
# Initializations that do not change the base. Others (pissa, olora, corda, loftq, lora_ga, mica) change it.
SUPPORTED_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields that turn LoRA variants off in the folders that we write.
DISABLED_VARIANTS = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
ADAPTER_FIELDS = FieldList(
    read=frozenset({"peft_type", "r", "lora_alpha", "base_model_name_or_path", "init_lora_weights"}),
    # The tensors show which projections have adapters. The configs of initializations matter only with these.
    harmless=frozenset(
        {
            "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "target_modules", "exclude_modules",
            "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
            "corda_config", "lora_ga_config", "ensure_weight_tying", "enable_lora", "merge_weights",
        }
    ),
    refused={
        **{key: (off,) for key, off in DISABLED_VARIANTS.items()},
        "revision": ("main",), "modules_to_save": (), "layers_to_transform": (), "rank_pattern": (), "alpha_pattern": (),
        "megatron_config": (), "trainable_token_indices": (), "velora_config": (), "alora_invocation_tokens": (),
        "use_qalora": (False,), "monteclora_config": (), "layer_replication": (), "lora_bias": (False,),
        "target_parameters": (), "use_bdlora": (False,), "arrow_config": (), "kasa_config": (),
    },
)  # fmt: skip


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
        UserError: It describes anything but plain LoRA with one rank on an unchanged base.
    """
    config = read_json(path)
    fields = Fields(config, str(path))
    kind = fields.string("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind} is not supported (expected LORA).")
    ADAPTER_FIELDS.check(config, str(path))
    initialization = config.get("init_lora_weights")
    if not any(type(initialization) is type(value) and initialization == value for value in SUPPORTED_INITIALIZATIONS):
        raise UserError(
            f"{path}: init_lora_weights {quote_value(initialization)} is not supported, because it changes the base (expected "
            "true, false, gaussian, eva or orthogonal). Convert the adapters to plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion, or merge them with PEFT."
        )
    return fields
