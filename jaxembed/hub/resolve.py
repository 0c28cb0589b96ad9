"""Find the model that a name refers to: a preset, a run directory, a folder, or a hub id."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from jaxembed.config import LoraConfig, read_run_config
from jaxembed.config.fields import Fields
from jaxembed.config.sections import parse_section
from jaxembed.errors import UserError
from jaxembed.files import exists, expand_home, read_json
from jaxembed.formats.checkpoints import CheckpointReader, pick_step
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.formats.nv_embed import read_transformer_config
from jaxembed.formats.peft_config import ADAPTER_CONFIG_FILE, is_peft_folder, read_base_name
from jaxembed.formats.published import find_first_stage_adapters
from jaxembed.formats.run_files import BASE_RECORD_FILE, name_merged_adapters, read_run_file
from jaxembed.hub.base import Base, BaseWithWeights, FolderBase, PresetBase
from jaxembed.hub.folders import PRESET_PREFIX, find_folder
from jaxembed.hub.restore import RunBase
from jaxembed.hub.spec_files import make_preset_spec, read_adapter_spec, read_folder_spec
from jaxembed.model.presets import find_preset


def find_base(name: str) -> Base:
    """Find the model that `model.base` or MODEL names.

    Args:
        name: preset:NAME, a run directory (its best checkpoint), a model folder, a PEFT folder, or a hub id.

    Raises:
        UserError: There is no such model, or it cannot be a base.
    """
    if name.startswith(PRESET_PREFIX):
        return _find_preset(name)
    return _find_base_with_weights(name, ())


def find_base_with_weights(name: str) -> BaseWithWeights:
    """Find a model as `find_base` does.

    Raises:
        UserError: The model is a preset, which has no weights.
    """
    return _find_base_with_weights(name, ())


def find_model(name: str, checkpoint: str = "best") -> BaseWithWeights:
    """Find a model as `Embedder.load` does, without loading its weights.

    Args:
        name: Run directory, folder or hub id.
        checkpoint: Checkpoint of a run: best, last, or a step.

    Raises:
        UserError: There is no such model or checkpoint.
    """
    if exists((folder := expand_home(name)) / BASE_RECORD_FILE):
        return find_run(name, folder, checkpoint)
    return find_base_with_weights(name)


def find_run(name: str, run_dir: Path, checkpoint: str = "best") -> RunBase:
    """Return the model of a run directory at a checkpoint.

    Args:
        name: Name that the user gave.
        run_dir: The run directory.
        checkpoint: best (on the held-out sets), last, or a step.

    Raises:
        UserError: The run has no such checkpoint, or its files are damaged.
    """
    where = str(run_dir / BASE_RECORD_FILE)
    record = Fields(read_run_file(read_json, run_dir / BASE_RECORD_FILE, "train again"), where)
    hf_config = record.mapping("config")
    transformer = parse_hf_config(hf_config, f"{where}: config")
    spec = read_folder_spec(str(run_dir), run_dir, hf_config, transformer)
    lora = record.mapping("lora", {})
    step = _pick_checkpoint(run_dir, checkpoint)
    merged_adapters = _list_merged_adapters(run_dir, step) if lora else ()
    return RunBase(
        name=name,
        hf_config=hf_config,
        transformer=transformer,
        spec=spec,
        weights_name=name,
        run_dir=run_dir,
        step=step,
        trained_from=record.string("name"),
        trained_spec=spec,
        lora=parse_section(LoraConfig, lora, f"{where}: lora") if lora else None,
        has_head=record.boolean("has_head"),
        merged_adapters=merged_adapters,
        find_frozen_base=functools.partial(_find_frozen_base, record, merged_adapters),
    )


def _pick_checkpoint(run_dir: Path, checkpoint: str) -> int:
    checkpoints = CheckpointReader(run_dir)
    try:
        return pick_step(checkpoints, checkpoint, run_dir)
    finally:
        checkpoints.close()


def _list_merged_adapters(run_dir: Path, step: int) -> tuple[Path, ...]:
    """Return the folders of the adapters that a run merged into its base before a step."""
    config = read_run_file(read_run_config, run_dir / "config.yaml", "train again")
    if not config.list_merging_stages(len(config.stages) - 1):
        return ()
    checkpoints = CheckpointReader(run_dir)
    try:
        stage = int(checkpoints.read_cursor(step)["stage"])
    finally:
        checkpoints.close()
    return tuple(name_merged_adapters(run_dir, merging) for merging in config.list_merging_stages(stage))


def _find_frozen_base(record: Fields, merged_adapters: Sequence[Path]) -> Base:
    """Return the base under the adapters of a run, with those that the run has merged into it.

    Args:
        record: The run's base.json, with name and hash of the base.
        merged_adapters: PEFT folders.
    """
    name = record.string("name")
    try:
        base = find_base(name)
    except UserError as error:
        raise UserError(f"{error} The run contains adapters only and needs its base. Restore it.") from None
    if base.hash() != record.string("hash"):
        raise UserError(f"{name}: not the base that the run's adapters were trained on (its hash differs). Restore that base.")
    for folder in merged_adapters:
        assert isinstance(base, BaseWithWeights)  # adapters need weights
        base = base.with_adapters(name, folder, base.spec)
    return base


def _find_preset(name: str) -> PresetBase:
    config = find_preset(name.removeprefix(PRESET_PREFIX))
    hf_config = read_transformer_config(config, name)
    transformer = parse_hf_config(hf_config, name)
    return PresetBase(name=name, hf_config=hf_config, transformer=transformer, spec=make_preset_spec(name, config, transformer))


def _find_base_with_weights(name: str, visited: tuple[Path, ...]) -> BaseWithWeights:
    """Find a model with weights. `visited` are the PEFT folders that led to this name."""
    if name.startswith(PRESET_PREFIX):
        raise UserError(f"{name}: a preset has no weights. Train it first.")
    folder = find_folder(name)
    if exists(folder / BASE_RECORD_FILE):
        return _find_earlier_run(name, folder)
    if is_peft_folder(folder):
        return _find_adapted_base(name, folder, visited)
    return _find_model_folder(name, folder)


def _find_earlier_run(name: str, run_dir: Path) -> RunBase:
    """Return the model of a run at its best checkpoint. Raise `UserError` if it has several adapters to choose from."""
    run = find_run(name, run_dir)
    if run.lora is not None and len(run.lora.names) > 1:
        raise UserError(
            f"{name}: several adapters ({', '.join(run.lora.names)}). Export one (python -m jaxembed.export --adapter NAME) "
            "and name its folder."
        )
    return run


def _find_adapted_base(name: str, folder: Path, visited: tuple[Path, ...]) -> BaseWithWeights:
    """Return the base of a PEFT folder with the folder's adapters."""
    if folder.resolve() in visited:
        raise UserError(
            f"{folder / ADAPTER_CONFIG_FILE}: base_model_name_or_path leads back to this folder (expected the folder of the "
            "weights). Change it."
        )
    base_name = find_first_stage_adapters(name, folder) or read_base_name(folder)
    try:
        base = _find_base_with_weights(base_name, (*visited, folder.resolve()))
    except UserError as error:
        raise UserError(f"the base of the adapters in {folder}: {error}") from None
    spec = read_adapter_spec(name, folder, base.transformer, base.spec, base.weights_name)
    return base.with_adapters(name, folder, spec)


def _find_model_folder(name: str, folder: Path) -> FolderBase:
    config_path = folder / "config.json"
    config = read_json(config_path)
    hf_config = read_transformer_config(config, str(config_path))
    transformer = parse_hf_config(hf_config, str(config_path))
    spec = read_folder_spec(name, folder, config, transformer)
    return FolderBase(name=name, hf_config=hf_config, transformer=transformer, spec=spec, weights_name=name, folder=folder)
