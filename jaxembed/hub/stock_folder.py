"""Write a model as a folder that transformers, sentence-transformers and servers read with their stock classes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import ends_with_eos, starts_with_bos
from jaxembed.errors import UserError
from jaxembed.files import read_json, write_json
from jaxembed.formats import stock_files
from jaxembed.formats.sentence_transformers import MODULES_FILE, POOLING_MODES, TOKEN_POOLING_FILE
from jaxembed.formats.tokenizer_config import TOKENIZER_CONFIG_FILE
from jaxembed.formats.weights import save_params
from jaxembed.hub.embedder import Embedder

Convert = Callable[[np.ndarray], np.ndarray]

NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class ModuleContent(NamedTuple):
    """The content of a module of a sentence-transformers folder.

    Attributes:
        config: Its config.json.
        params: Parameters that include its weights.
        prefixes: Name prefix of its weights, keyed by their part of the parameters. Empty: it has no weights.
    """

    config: dict[str, Any]
    params: Any = None
    prefixes: Mapping[str, str] = {}


def check_exportable(spec: EmbeddingSpec) -> None:
    """Check that stock classes can represent the spec.

    Raises:
        UserError: Stock classes cannot represent it.
    """
    if spec.attention not in ("causal", "bidirectional"):
        raise UserError(
            f"model.attention: {spec.attention} cannot be exported, because stock classes lack this mask "
            "(expected causal or bidirectional). Export only the adapters, or train with another mask."
        )
    if spec.pool_last_instruction_token and not spec.include_instruction and spec.pooling in POOLING_MODES:
        raise UserError(
            f"{spec.pooling} pooling with the last token of the instruction cannot be exported, because stock classes pool "
            "either all of the instruction or nothing. Train it further with model.pooling.include_instruction=true."
        )
    if spec.echo:
        raise UserError(
            "model.echo presents a text twice, which stock classes do not do, so this model cannot be exported. "
            "Train it without model.echo."
        )
    if spec.pool_text_tokens:
        raise UserError(
            "this model pools as many tokens as a text has by itself, which stock classes do not do, so it cannot be exported. "
            "Export its adapters with --adapters."
        )
    if spec.eos_as_text:
        raise UserError(
            "this model truncates EOS from long texts, which stock classes do not do. Export it with --layout nv-embed, or "
            "train it further."
        )


def write_stock_folder(embedder: Embedder, folder: Path, dtype: str) -> None:
    """Write the model into a new folder.

    Args:
        embedder: The model.
        folder: The folder to create.
        dtype: Dtype of the weights: float32 or bfloat16.
    """
    folder.mkdir()
    # Files that transformers loads.
    write_json(folder / "config.json", build_hf_config(embedder, dtype))
    family = embedder.model.transformer.family
    # TEI reads the transformer under these names alone, without "model.". transformers 5 finds a head beside them.
    prefixes = dict.fromkeys(("decoder", "head") if embedder.model.has_head else ("decoder",), "")
    save_params(folder / "model.safetensors", embedder.params, prefixes, make_dtype_converter(dtype), family)
    _write_tokenizer(folder, embedder)
    # Files that sentence-transformers adds.
    write_json(folder / "config_sentence_transformers.json", stock_files.build_model_config(embedder.spec, family))
    write_json(folder / "sentence_bert_config.json", stock_files.build_transformer_config(embedder.spec))
    _write_modules(folder, embedder, make_dtype_converter(dtype))


def _write_modules(folder: Path, embedder: Embedder, convert: Convert) -> None:
    """Write modules.json, and the folder of each module with its config and its weights."""
    modules = stock_files.build_module_list(embedder.spec)
    write_json(folder / MODULES_FILE, modules)
    contents = {kind: iter(entries) for kind, entries in _list_module_contents(embedder).items()}
    for module in modules[1:]:
        module_folder = folder / module["path"]
        module_folder.mkdir()
        config, params, prefixes = next(contents[module["type"].rsplit(".", 1)[-1]])
        write_json(module_folder / "config.json", config)
        if prefixes:
            save_params(module_folder / "model.safetensors", params, prefixes, convert)
    if embedder.spec.pooling not in POOLING_MODES:
        shutil.copy(TOKEN_POOLING_FILE, folder)


def _list_module_contents(embedder: Embedder) -> dict[str, list[ModuleContent]]:
    """Return the content of each module after the transformer, by kind, in the order of modules.json."""
    width = embedder.model.transformer.width
    dense_configs = stock_files.build_dense_configs(embedder.spec, width)
    layers = _split_projection(embedder.params["projection"], len(dense_configs)) if dense_configs else []
    return {
        "Pooling": [ModuleContent(stock_files.build_pooling_config(embedder.spec, width))],
        "TokenPooling": [ModuleContent(_build_token_pooling_config(embedder), embedder.params, {"pooling": ""})],
        "Dense": [
            ModuleContent(config, {"projection": layer}, {"projection": ""})
            for config, layer in zip(dense_configs, layers, strict=True)
        ],
        "Normalize": [ModuleContent({})],
    }


def _split_projection(projection: Mapping[str, Any], count: int) -> list[Any]:
    """Split a projection into its layers. Each gets the parameters of a projection with a single layer."""
    hidden = [f"hidden_{i}" for i in range(count - 1)]
    last = {name: leaf for name, leaf in projection.items() if name not in hidden}
    return [*(projection[name] for name in hidden), last]


def make_dtype_converter(dtype: str) -> Convert:
    """Return a function that converts arrays to float32 or bfloat16."""
    return lambda x: x.astype(NUMPY_DTYPES[dtype])


def build_hf_config(embedder: Embedder, dtype: str) -> dict[str, Any]:
    """Return config.json of the exported transformer. Fields that the base leaves out have the defaults of transformers.

    Args:
        embedder: The model.
        dtype: Dtype of the weights.
    """
    from transformers import AutoConfig

    complete: Mapping[str, Any] = json.loads(AutoConfig.for_model(**embedder.hf_config).to_json_string())
    tokenizer = embedder.tokenizer.hf_tokenizer
    return stock_files.build_config(complete, embedder.spec, embedder.model.transformer, tokenizer, dtype)


def _write_tokenizer(folder: Path, embedder: Embedder) -> None:
    """Write the tokenizer. BOS and EOS are part of tokenizer.json."""
    tokenizer, spec = copy.deepcopy(embedder.tokenizer.hf_tokenizer), embedder.spec
    tokenizer.chat_template = None  # with one, sentence-transformers wraps every text in a chat
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = spec.max_length
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    path, transformer = folder / TOKENIZER_CONFIG_FILE, embedder.model.transformer
    adds_bos, adds_eos = starts_with_bos(tokenizer), ends_with_eos(tokenizer)
    write_json(path, stock_files.build_tokenizer_config(read_json(path), spec, transformer, adds_bos, adds_eos))


def _build_token_pooling_config(embedder: Embedder) -> dict[str, Any]:
    """Return the config of our own module, which holds the weights of a pooling."""
    spec = embedder.spec
    return {
        "width": embedder.model.transformer.width,
        "kind": spec.pooling,
        "latent_count": spec.latents,
        "heads": spec.pooling_heads,
        "pooled_prompt_tokens": int(spec.pool_last_instruction_token),
    }
