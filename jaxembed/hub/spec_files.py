"""Read the spec of a model from the files of its folder, and write it as jaxembed.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxembed.config.field_lists import log_once
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json, write_json
from jaxembed.formats.nv_embed import is_nv_embed, read_nv_embed_spec
from jaxembed.formats.published import PUBLISHED_LAYOUTS, PublishedLayout, find_published_layout
from jaxembed.formats.run_files import read_run_file
from jaxembed.formats.sentence_transformers import MODULES_FILE, read_sentence_transformers_spec
from jaxembed.model.families import TransformerConfig

log = logging.getLogger("jaxembed")

SPEC_FILE = "jaxembed.json"
# Values of keys that a jaxembed.json lacks, if they differ from the defaults of new models. Earlier versions left
# instructions out of the pooling.
EARLIER_DEFAULTS: Mapping[str, Any] = MappingProxyType({"include_instruction": False})


def write_spec(folder: Path, spec: EmbeddingSpec) -> None:
    """Write jaxembed.json."""
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))


def parse_spec(values: Mapping[str, Any], where: str) -> EmbeddingSpec:
    """Parse the content of a jaxembed.json. null counts as absent, and absent keys have the values of earlier versions.

    Raises:
        UserError: A key is unknown or has a wrong value; the line starts with `where`.
    """
    given_values = {key: value for key, value in values.items() if value is not None}
    return parse_section(EmbeddingSpec, {**EARLIER_DEFAULTS, **given_values}, where)


def read_recorded_spec(run_dir: Path) -> EmbeddingSpec | None:
    """Read the spec that a run recorded, or return None if the run is new.

    Raises:
        UserError: The file is damaged.
    """
    path = run_dir / SPEC_FILE
    return read_run_file(lambda path: parse_spec(read_json(path), str(path)), path) if exists(path) else None


def make_preset_spec(name: str, config: Mapping[str, Any], transformer: TransformerConfig) -> EmbeddingSpec:
    """Return the spec of a preset: that of the published model whose name it has, otherwise our defaults."""
    if is_nv_embed(config):
        return read_nv_embed_spec(config, transformer, f"{name}: config.json")
    layout = find_published_layout(name, None, config)
    return _apply_layout(EmbeddingSpec(), layout, name, None, str(config.get("_name_or_path")), transformer)


def read_folder_spec(name: str, folder: Path, config: Mapping[str, Any], transformer: TransformerConfig) -> EmbeddingSpec:
    """Read the spec of a model folder.

    The first of these that exists is used: jaxembed.json, NV-Embed's config, a published layout (with the prompts of
    sentence-transformers' files), sentence-transformers' files, our defaults.

    Args:
        name: Name that the user gave. Published models are recognized by it.
        folder: Folder of the model.
        config: Content of the folder's config.json.
        transformer: The transformer that `config` describes.

    Raises:
        UserError: A file is invalid, or the folder needs its own Python code.
    """
    if (folder / SPEC_FILE).is_file():
        return parse_spec(read_json(folder / SPEC_FILE), str(folder / SPEC_FILE))
    if is_nv_embed(config):
        return read_nv_embed_spec(config, transformer, f"{name}: config.json")
    layout = find_published_layout(name, folder, config)
    if layout is None and not exists(folder / MODULES_FILE) and "auto_map" in config:
        titles = ", ".join(layout.title for layout in PUBLISHED_LAYOUTS)
        raise UserError(
            f"{folder}: config.json needs its own Python code (auto_map), which is not run (expected {SPEC_FILE}, "
            f"sentence-transformers' {MODULES_FILE}, or the layout of NV-Embed, {titles}). "
            "If the weights are those of a plain decoder, remove auto_map from a copy."
        )
    _log_ignored_code(folder, config, layout, transformer)
    spec = _read_listed_modules(EmbeddingSpec(), folder, config, transformer)
    return _apply_layout(spec, layout, name, folder, str(config.get("_name_or_path")), transformer)


def has_spec_files(folder: Path) -> bool:
    """Return whether a folder has a file that says how texts become vectors."""
    return exists(folder / SPEC_FILE) or exists(folder / MODULES_FILE)


def log_default_spec(folder: Path, spec: EmbeddingSpec) -> None:
    """Log once that a folder is encoded with our defaults, because none of its files says how texts become vectors."""
    is_default = spec == EmbeddingSpec(max_length=spec.max_length)
    if is_default and not has_spec_files(folder):
        log_once(
            f"{folder}: no file says how texts become vectors, so the defaults are used ({spec.attention} attention, "
            f"{spec.pooling} pooling)",
            logging.INFO,
        )


def read_adapter_spec(
    name: str, folder: Path, transformer: TransformerConfig, base_spec: EmbeddingSpec, weights_name: str
) -> EmbeddingSpec:
    """Read the spec of a PEFT folder, as `read_folder_spec` does. Without such files, it has the spec of its base.

    Args:
        name: Name that the user gave.
        folder: The PEFT folder.
        transformer: The transformer of the base.
        base_spec: The spec of the base.
        weights_name: Name of the model under all adapters.
    """
    if (folder / SPEC_FILE).is_file():
        return parse_spec(read_json(folder / SPEC_FILE), str(folder / SPEC_FILE))
    config = read_json(folder / "config.json") if exists(folder / "config.json") else {}
    layout = find_published_layout(name, folder, config)
    _log_ignored_code(folder, config, layout, transformer)
    spec = _read_listed_modules(base_spec, folder, config, transformer)
    return _apply_layout(spec, layout, name, folder, weights_name, transformer)


def _log_ignored_code(
    folder: Path, config: Mapping[str, Any], layout: PublishedLayout | None, transformer: TransformerConfig
) -> None:
    """Log once that a folder of no known layout names Python code, which is not run."""
    if layout is None and "auto_map" in config:
        log_once(
            f"{folder}: config.json names Python code (auto_map), which is not run: it is read as a stock {transformer.family}"
        )


def _read_listed_modules(
    default: EmbeddingSpec, folder: Path, config: Mapping[str, Any], transformer: TransformerConfig
) -> EmbeddingSpec:
    """Return the spec of sentence-transformers' files, or `default` if the folder has no modules.json."""
    return read_sentence_transformers_spec(folder, config, transformer) if exists(folder / MODULES_FILE) else default


def _apply_layout(
    spec: EmbeddingSpec,
    layout: PublishedLayout | None,
    name: str,
    folder: Path | None,
    weights_name: str,
    transformer: TransformerConfig,
) -> EmbeddingSpec:
    """Return the spec with the choices of a published layout, if there is one, and at most the length of the transformer.

    Prompts of the files remain.
    """
    if layout is not None:
        log.info("%s: read as %s", name, layout.title)
        choices = layout.read_spec_choices(folder, weights_name)
        spec = spec.replace(**{**choices, "prompts": {**choices["prompts"], **spec.prompts}})
    return spec.replace(max_length=min(spec.max_length, transformer.max_positions))
