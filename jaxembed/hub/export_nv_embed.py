"""Export a model in the layout of NV-Embed's release."""

from __future__ import annotations

import copy
from pathlib import Path

from jaxembed.data.scratch import move_into_place, open_scratch_folder
from jaxembed.data.tokenize import drop_eos
from jaxembed.errors import UserError
from jaxembed.files import write_json
from jaxembed.formats.nv_embed import build_nv_embed_config, read_nv_embed_spec
from jaxembed.formats.weights import save_params
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.parity import FLOAT32_TOLERANCE, Parity, compare_vectors, encode_probes, select_probes
from jaxembed.hub.stock_folder import build_hf_config, make_dtype_converter

BFLOAT16_TOLERANCE = 0.05  # there is no PyTorch model to measure the error of bfloat16
TENSOR_PREFIXES = {"decoder": "embedding_model.", "pooling": "latent_attention_model."}
# Fields of a spec that the layout fixes or lacks.
UNCHECKED_FIELDS = ("max_length", "prompts", "append_eos", "eos_as_text", "matryoshka_dims", "exit_layers")


def export_nv_embed(embedder: Embedder, out: Path, dtype: str) -> Parity:
    """Write a model in NV-Embed's layout, and compare its vectors with those of the folder as jaxembed reads it.

    In this layout EOS is part of a text when it is truncated, so texts beyond the limit lose it. The comparison leaves these
    texts out.

    Args:
        embedder: The model.
        out: The new folder. Its parent must exist.
        dtype: Dtype of the weights: float32 or bfloat16.

    Raises:
        UserError: The layout cannot represent the model, or the vectors differ. Nothing is written then.
    """
    with open_scratch_folder(out) as scratch:
        folder = scratch / "nv-embed"
        folder.mkdir()
        config = build_nv_embed_config(build_hf_config(embedder, dtype), embedder.spec, embedder.model.transformer.width)
        _check_representable(config, embedder, out)
        write_json(folder / "config.json", config)
        save_params(folder / "model.safetensors", embedder.params, TENSOR_PREFIXES, make_dtype_converter(dtype))
        tokenizer = copy.deepcopy(embedder.tokenizer.hf_tokenizer)
        drop_eos(tokenizer)
        tokenizer.save_pretrained(folder)
        probes = select_probes(embedder, truncated=False)
        tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
        parity = compare_vectors(encode_probes(embedder, probes), encode_probes(Embedder.load(folder), probes), tolerance)
        if not parity.passes:
            raise UserError(f"{out}: not written, because {parity}.")
        move_into_place(folder, out)
    return parity


def _check_representable(config: dict[str, object], embedder: Embedder, out: Path) -> None:
    """Check that reading the config back gives the spec of the model.

    Raises:
        UserError: It gives another spec.
    """
    transformer, spec = embedder.model.transformer, embedder.spec
    config_spec = read_nv_embed_spec(config, transformer, str(out))
    differing = [
        f"{key} {getattr(spec, key)!r}"
        for key, value in vars(config_spec).items()
        if key not in UNCHECKED_FIELDS and value != getattr(spec, key)
    ]
    if differing or transformer.family != "mistral":
        problem = ", ".join(differing) or f"a {transformer.family} decoder"
        raise UserError(f"{out}: not written, because NV-Embed's layout cannot represent this model ({problem}).")
