"""Published checkpoints: told by their files or their names, read without running their code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxembed.config.fields import Fields
from jaxembed.data.tokenize import BORDER
from jaxembed.files import exists, read_json


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published model: its title, the name of its repositories (a regular expression), and how it treats texts.

    `mark` tells it by its files alone, given the folder and its config.json. `choices` are those of `EmbeddingSpec`, or a
    function that reads them from the folder (None for a preset) and the name of the decoder that its adapters belong to;
    they go before what sentence-transformers' files in the folder say, but for `prompts`.
    """

    title: str
    name: str
    choices: Mapping[str, Any] | Callable[[Path | None, str], Mapping[str, Any]]
    mark: Callable[[Path, Mapping[str, Any]], bool] = lambda folder, config: False

    def choices_of(self, folder: Path | None, root: str) -> Mapping[str, Any]:
        return self.choices(folder, root) if callable(self.choices) else self.choices


E5 = "Instruct: {instruction}\nQuery: "
PLAIN = {"document": ""}  # documents have no prompt; that there are prompts tells evaluation to give instructions
KALM = {
    "pooling": "mean", "append_eos": False, "include_instruction": True, "prompts": PLAIN,
    "instruction_template": "Instruct: {instruction} \n Query: ",
}  # fmt: skip
LAST = {"pooling": "last", "append_eos": True, "include_instruction": True, "prompts": PLAIN}
ICL = "<instruct>{instruction}\n<query>"
ECHO = {
    "attention": "causal", "append_eos": True, "include_instruction": False, "max_length": 1024, "text_length": 300,
    "instruction_template": f"Instruct:{BORDER}{{instruction}},{BORDER}", "prompts": PLAIN,
    "echo": f"\nQuery:{BORDER}{{text}}{BORDER}\nQuery again:{BORDER}{{text}}",
    "plain_echo": f"Document:{BORDER}{{text}}{BORDER}\nDocument again:{BORDER}{{text}}",
}  # fmt: skip
LAYOUTS = (
    Layout(
        "LLM2Vec",
        r"(?-i:LLM2Vec-.*)",
        lambda folder, root: llm2vec_choices(folder, root),
        lambda folder, config: exists(folder / LLM2VEC_CONFIG) or "EncoderModel" in str(config.get("auto_map")),
    ),
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
    Layout(
        "bge-en-icl",
        r"bge-en-icl",
        {
            "attention": "causal", **LAST, "instruction_template": ICL, "query_suffix": "\n<response>",
            "example_template": f"{ICL}{{query}}\n<response>{{response}}", "max_length": 4096, "text_length": 512,
        },
        lambda folder, config: _has_icl_tokens(folder),
    ),
    Layout("Echo (last token)", r"echo-.*-lasttoken", {**ECHO, "pooling": "last"}),
    Layout("Echo (mean)", r"echo-.*-meantoken", {**ECHO, "pooling": "mean"}),
)  # fmt: skip
# LLM2Vec puts texts into the chat form of some bases: name of the base -> what stands before and behind.
CHATS = {
    r".*(Mistral-7B-Instruct-v0\.2|Llama-2-7b-chat-hf)": ("[INST] ", " [/INST]"),
    r".*Meta-Llama-3(\.1)?-8B-Instruct": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
}
LLM2VEC_CONFIG = "llm2vec_config.json"


def published_layout(name: str, folder: Path | None, config: Mapping[str, Any]) -> Layout | None:
    """The layout of what was asked for by `name`, told by its files first (`folder`, if there is one), else by its name.

    `config` is the folder's config.json.
    """
    names = _names(name, folder)
    marked = [layout for layout in LAYOUTS if folder is not None and layout.mark(folder, config)]
    named = [layout for layout in LAYOUTS if any(re.fullmatch(layout.name, found, re.IGNORECASE) for found in names)]
    return next(iter(marked + named), None)


def _names(name: str, folder: Path | None) -> list[str]:
    """What a repository may be called: the last part of a hub id, of a preset's name or of a folder's path, and what the
    hub's cache calls the folder of its snapshots.
    """
    path = folder.resolve() if folder is not None else Path(name)
    cached = [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    return [re.split("[/:]", name.rstrip("/"))[-1], path.name, *cached]


def llm2vec_choices(folder: Path | None, root: str) -> dict[str, Any]:
    """How LLM2Vec treats texts (BehnamGhader et al. 2024, and its code).

    Its instruction stands before a text without a line break, both in the chat form of `root`. It cuts documents at words,
    down to 400 tokens; here they are cut at the 400th token.
    """
    path = folder / LLM2VEC_CONFIG if folder is not None else None
    fields = Fields(read_json(path) if path is not None and exists(path) else {}, str(path))
    fields.choice("pooling_mode", ("mean",), "mean")
    before, behind = next((chat for base, chat in CHATS.items() if re.fullmatch(base, root)), ("", ""))
    return {
        "attention": "bidirectional", "pooling": "mean", "append_eos": False, "pool_text_tokens": True,
        "include_instruction": not fields.flag("skip_instruction", True), "max_length": fields.whole("max_length", 512),
        "text_length": fields.whole("doc_max_length", 400), "instruction_template": before + "{instruction} ",
        "plain_prompt": before, "query_suffix": behind, "prompts": {"document": before},
    }  # fmt: skip


def first_stage(name: str, folder: Path) -> str | None:
    """The adapters under those of LLM2Vec's second stage, whose files name the decoder alone; None for others."""
    found = [re.fullmatch(r"(LLM2Vec-.*-mntp)-(supervised|unsup-simcse)", part) for part in _names(name, folder)]
    match = next(filter(None, found), None)
    if match is None:
        return None
    beside = folder.with_name(match[1])
    return str(beside) if exists(beside) else f"McGill-NLP/{match[1]}"


def _has_icl_tokens(folder: Path) -> bool:
    """Whether the tokenizer has the tokens that bge-en-icl added."""
    path = folder / "tokenizer_config.json"
    added = read_json(path).get("added_tokens_decoder") if exists(path) else None
    return all(f'"{token}"' in json.dumps(added) for token in ("<instruct>", "<query>", "<response>"))
