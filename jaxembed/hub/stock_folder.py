"""Write a model as a folder of stock transformers and sentence-transformers classes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.files import read_json_value, write_json
from jaxembed.formats.sentence_transformers import MODULES_FILE, POOLING_MODES, TOKEN_POOLING_FILE, TOKEN_POOLING_TYPE
from jaxembed.formats.weights import POOLING_FOLDER, find_part_files, save_params
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.torch_model import import_sentence_transformers
from jaxembed.model.families import FAMILIES

Convert = Callable[[np.ndarray], np.ndarray]

NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def check_exportable(spec: EmbeddingSpec) -> None:
    """Check that stock classes can treat texts as the spec does.

    Raises:
        UserError: They cannot.
    """
    if spec.attention not in ("causal", "bidirectional"):
        raise UserError(
            f"model.attention: {spec.attention} cannot be exported, because stock classes lack this mask "
            "(expected causal or bidirectional). Export the adapters alone, or train with another mask."
        )
    if spec.pool_last_instruction_token and spec.pooling in POOLING_MODES:
        raise UserError(
            f"{spec.pooling} pooling with the last token of the instruction cannot be exported, because stock classes pool "
            "either all of the instruction or nothing. Train it further with another choice."
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
            "this model cuts EOS off long texts, which stock classes do not do. Export it with --layout nv-embed, or train it "
            "further."
        )


def write_stock_folder(embedder: Embedder, scratch: Path, dtype: str) -> Path:
    """Write the model with sentence-transformers' own classes into a new folder below `scratch`.

    Args:
        embedder: The model.
        scratch: Existing folder for temporary files.
        dtype: Dtype of the weights: float32 or bfloat16.

    Returns:
        The folder.
    """
    raw, folder, spec = scratch / f"raw-{dtype}", scratch / dtype, embedder.spec
    raw.mkdir()
    # Write what transformers loads: config, decoder weights, tokenizer.
    config = build_hf_config(embedder, dtype)
    (raw / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    convert = dtype_converter(dtype)
    save_params(raw / "model.safetensors", embedder.params, {"decoder": ""}, convert)
    tokenizer = copy.deepcopy(embedder.tokenizer.hf_tokenizer)
    tokenizer.chat_template = None  # with one, sentence-transformers wraps every text in a chat
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = spec.max_length
    tokenizer.save_pretrained(raw)
    # Load it, add the other modules, and save everything.
    _build_sentence_transformer(embedder, raw).save(str(folder), create_model_card=False)
    shutil.rmtree(raw)
    # Replace the random weights of the projection, and add our module for poolings with weights.
    if spec.projection:
        save_params(find_part_files(folder)["projection"], embedder.params, {"projection": ""}, convert)
    if spec.pooling not in POOLING_MODES:
        _add_token_pooling(folder, embedder, convert)
    return folder


def dtype_converter(dtype: str) -> Convert:
    """Return a function that converts arrays to float32 or bfloat16."""
    return lambda x: x.astype(NUMPY_DTYPES[dtype])


def build_hf_config(embedder: Embedder, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of the exported decoder: that of the base, with the model's mask and special tokens."""
    tokenizer = embedder.tokenizer.hf_tokenizer
    config = dict(embedder.hf_config) | {
        "architectures": [FAMILIES[embedder.model.decoder.family].architecture],
        "is_causal": embedder.spec.attention == "causal",
        "dtype": dtype,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    config.pop("torch_dtype", None)
    config.pop("auto_map", None)
    return config


def _build_sentence_transformer(embedder: Embedder, transformer_folder: Path) -> Any:
    """Return a `SentenceTransformer` with the modules and prompts of the model. Its projection has random weights."""
    st = import_sentence_transformers()
    from sentence_transformers.sentence_transformer import modules
    from torch import nn

    spec, width = embedder.spec, embedder.model.decoder.width
    chain = [
        modules.Transformer(str(transformer_folder), max_seq_length=spec.max_length),
        modules.Pooling(width, POOLING_MODES.get(spec.pooling, "mean"), include_prompt=spec.include_instruction),
    ]
    if spec.projection:
        activation = {"identity": nn.Identity(), "tanh": nn.Tanh()}[spec.projection_activation]
        chain.append(modules.Dense(width, spec.projection, spec.projection_bias, activation))
    if spec.normalize:
        chain.append(modules.Normalize())
    default_name = _name_plain_prompt(spec)
    prompts = {**spec.prompts, **({default_name: spec.plain_prompt} if default_name else {})}
    model = st.SentenceTransformer(modules=chain, prompts=prompts, similarity_fn_name="cosine", device="cpu")
    model.default_prompt_name = default_name
    return model


def _name_plain_prompt(spec: EmbeddingSpec) -> str | None:
    """Return the name under which the prompt of plain texts is stored, without replacing another prompt; None without one."""
    if not spec.plain_prompt:
        return None
    equal = [name for name, prompt in spec.prompts.items() if prompt == spec.plain_prompt]
    free = [name for name in ("document", "plain", "default") if name not in spec.prompts]
    return (equal or free)[0]


def _add_token_pooling(folder: Path, embedder: Embedder, convert: Convert) -> None:
    """Insert the pooling's weights and PyTorch module between the transformer and the stock mean pooling."""
    spec, pooling_folder = embedder.spec, folder / POOLING_FOLDER
    pooling_folder.mkdir()
    config = {
        "width": embedder.model.decoder.width,
        "kind": spec.pooling,
        "latent_count": spec.latents,
        "heads": spec.pooling_heads,
        "pooled_prompt_tokens": int(spec.pool_last_instruction_token),
    }
    write_json(pooling_folder / "config.json", config)
    save_params(pooling_folder / "model.safetensors", embedder.params, {"pooling": ""}, convert)
    shutil.copy(TOKEN_POOLING_FILE, folder)
    transformer, *rest = read_json_value(folder / MODULES_FILE)
    token_pooling = {"path": POOLING_FOLDER, "type": TOKEN_POOLING_TYPE}
    chain = [transformer, token_pooling, *rest]
    write_json(folder / MODULES_FILE, [module | {"idx": i, "name": str(i)} for i, module in enumerate(chain)])
