"""Published checkpoints: told by their files or their names, read without running their code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
