"""Published checkpoints: told by their files or their names, read without running their code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError
from jaxembed.fields import Fields
from jaxembed.spec import EmbeddingSpec

# What transformers' MistralConfig takes for a key that a config leaves out.
MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip


def decoder_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The Hugging Face config of the decoder that a folder's config.json describes, which may be nested in it."""
    if not is_nv_embed(config):
        return dict(config)
    inner = Fields(config, where).mapping("text_config")
    return MISTRAL | inner | {"model_type": "mistral", "sliding_window": None}  # its mask is whole, whatever the config says


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published model: its title, the name of its repositories (a regular expression), and how it treats texts.

    `mark` tells it by its files alone, given the folder and its config.json. `choices` are those of `EmbeddingSpec`; they
    go before what sentence-transformers' files in the folder say.
    """

    title: str
    name: str
    choices: Mapping[str, Any]
    mark: Callable[[Path, Mapping[str, Any]], bool] = lambda folder, config: False


E5 = "Instruct: {instruction}\nQuery: "
KALM = {
    "pooling": "mean",
    "append_eos": False,
    "instruction_template": "Instruct: {instruction} \n Query: ",
    "prompts": {"document": ""},
}
LAST = {"pooling": "last", "append_eos": True, "include_instruction": True}
LAYOUTS = (
    Layout("KaLM-Embedding v1 and v1.5", r"kalm-embedding-(.*-)?v1(\.5)?", {"attention": "causal", **KALM}),
    Layout("KaLM-Embedding v2", r"kalm-embedding-(.*-)?v2(\.5)?", {"attention": "bidirectional", **KALM}),
    Layout(
        "e5-mistral-7b-instruct, SFR-Embedding and Linq-Embed-Mistral",
        r"e5-mistral-7b-instruct|SFR-Embedding.*|Linq-Embed-Mistral",
        {"attention": "causal", **LAST, "instruction_template": E5},
    ),
    Layout(
        "Qwen3-Embedding",
        r"Qwen3-Embedding-.*",
        {
            # its tokenizer ends texts with <|endoftext|>, which is not its EOS token
            "attention": "causal", **LAST, "append_eos": False, "instruction_template": "Instruct: {instruction}\nQuery:",
        },
    ),
    Layout("gte-Qwen2-instruct", r"gte-Qwen2-.*-instruct", {"attention": "bidirectional", **LAST, "instruction_template": E5}),
    Layout(
        "GritLM",
        r"GritLM-7B.*",
        {
            "attention": "bidirectional", "pooling": "mean", "include_instruction": False, "append_eos": False,
            "instruction_template": "<|user|>\n{instruction}\n<|embed|>\n", "plain_prompt": "<|embed|>\n",
            "prompts": {"document": "<|embed|>\n"}, "max_length": 512,
        },
        lambda folder, config: "gritlm" in str(config.get("auto_map")).lower(),
    ),
)  # fmt: skip


def published_layout(name: str, folder: Path | None, config: Mapping[str, Any]) -> Layout | None:
    """The layout of what was asked for by `name`, told by its files first (`folder`, if there is one), else by its name."""
    last = re.split("[/:]", name.rstrip("/"))[-1]
    marked = [layout for layout in LAYOUTS if folder is not None and layout.mark(folder, config)]
    named = [layout for layout in LAYOUTS if re.fullmatch(layout.name, last, re.IGNORECASE)]
    return next(iter(marked + named), None)


def is_nv_embed(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "nvembed"


def nv_embed_spec(config: Mapping[str, Any], width: int, max_length: int, where: str) -> EmbeddingSpec:
    """How NV-Embed v1 and v2 treat texts (Lee et al. 2024, and the release's own code).

    EOS is put behind the text before it is cut, so a cut text has none; of the instruction, as many tokens stay out of
    the pooling as it has without BOS, counted from BOS, so its last one is pooled.
    """
    fields = Fields(config, where)
    latent = Fields(fields.mapping("latent_attention_config", {}), f"{where}: latent_attention_config")
    head_width = latent.whole("cross_dim_head", 4096)
    if head_width != width:
        raise UserError(f"{where}: cross_dim_head is {head_width}; expected hidden_size, {width}, as in the published models")
    return EmbeddingSpec(
        attention="bidirectional",
        pooling="latent_attention",
        latents=latent.whole("num_latents_value", 512),
        pooling_heads=latent.whole("num_cross_heads", 8),
        include_instruction=not fields.flag("is_mask_instruction", True),
        normalize=latent.flag("output_normalize", True),
        append_eos=False,
        eos_as_text=fields.flag("add_eos", True),
        pool_last_instruction_token=True,
        max_length=max_length,
        instruction_template="Instruct: {instruction}\nQuery: ",
    )
