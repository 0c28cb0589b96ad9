"""Layouts of published embedding models: which model a folder or name refers to, and how that model treats texts.

A model is recognized by its files or its name. Its own Python code is never run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxembed.config.field_lists import FieldList
from jaxembed.config.fields import Fields
from jaxembed.config.spec import HiddenProjection
from jaxembed.data.tokenize import TOKEN_BOUNDARY
from jaxembed.files import exists, read_json

SpecChoices = Mapping[str, Any]  # values of fields of `EmbeddingSpec`


@dataclasses.dataclass(frozen=True)
class PublishedLayout:
    """A family of published models.

    Attributes:
        title: Name of the family, for messages.
        name_pattern: Regular expression of the names of its repositories.
        choices: Values of fields of `EmbeddingSpec`, or a function that reads them from the folder (None for a preset) and the
            name of the transformer that its adapters belong to. They override the sentence-transformers files in the folder,
            except for `prompts`.
        matches_files: Function of a folder and its config.json that recognizes the family only by its files.
    """

    title: str
    name_pattern: str
    choices: SpecChoices | Callable[[Path | None, str], SpecChoices]
    matches_files: Callable[[Path, Mapping[str, Any]], bool] = lambda folder, config: False

    def read_spec_choices(self, folder: Path | None, transformer_name: str) -> SpecChoices:
        """Return the values of fields of `EmbeddingSpec` for the model in `folder`."""
        return self.choices(folder, transformer_name) if callable(self.choices) else self.choices


E5_TEMPLATE = "Instruct: {instruction}\nQuery: "
# Documents have no prompt. Evaluation gives a model instructions if its spec has prompts, so the empty one must be there.
EMPTY_DOCUMENT_PROMPT = {"document": ""}
KALM_CHOICES = {
    "pooling": "mean", "append_eos": False, "include_instruction": True, "prompts": EMPTY_DOCUMENT_PROMPT,
    "instruction_template": "Instruct: {instruction} \n Query: ",
}  # fmt: skip
LAST_TOKEN_CHOICES = {
    "pooling": "last", "append_eos": True, "include_instruction": True, "prompts": EMPTY_DOCUMENT_PROMPT,
}  # fmt: skip
E5_MISTRAL_CHOICES = {"attention": "causal", **LAST_TOKEN_CHOICES, "instruction_template": E5_TEMPLATE}
BGE_ICL_TEMPLATE = "<instruct>{instruction}\n<query>"
BGE_ICL_TOKENS = ("<instruct>", "<query>", "<response>")
ECHO_CHOICES = {
    "attention": "causal", "append_eos": True, "include_instruction": False, "max_length": 1024, "text_length": 300,
    "instruction_template": f"Instruct:{TOKEN_BOUNDARY}{{instruction}},{TOKEN_BOUNDARY}", "prompts": EMPTY_DOCUMENT_PROMPT,
    "echo": f"\nQuery:{TOKEN_BOUNDARY}{{text}}{TOKEN_BOUNDARY}\nQuery again:{TOKEN_BOUNDARY}{{text}}",
    "plain_echo": f"Document:{TOKEN_BOUNDARY}{{text}}{TOKEN_BOUNDARY}\nDocument again:{TOKEN_BOUNDARY}{{text}}",
}  # fmt: skip
LLM2VEC_CONFIG_FILE = "llm2vec_config.json"
LLM2VEC_FIELDS = FieldList(
    read=frozenset({"pooling_mode", "max_length", "doc_max_length", "skip_instruction"}), harmless=frozenset(), refused={}
)
# LLM2Vec wraps texts in the chat template of some decoders: pattern of the decoder's name -> text before, text after.
LLM2VEC_CHAT_TEMPLATES = {
    r".*(Mistral-7B-Instruct-v0\.2|Llama-2-7b-chat-hf)": ("[INST] ", " [/INST]"),
    r".*Meta-Llama-3(\.1)?-8B-Instruct": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
}


def _read_llm2vec_choices(folder: Path | None, transformer_name: str) -> SpecChoices:
    """Return the fields of `EmbeddingSpec` for LLM2Vec (BehnamGhader et al. 2024, and its code).

    The instruction precedes a text without a line break. Both are wrapped in the chat template of `transformer_name`.
    LLM2Vec truncates documents at a word so that at most 400 tokens remain. Here they are truncated at the 400th token.
    """
    path = folder / LLM2VEC_CONFIG_FILE if folder is not None else None
    config = read_json(path) if path is not None and exists(path) else {}
    LLM2VEC_FIELDS.check(config, str(path))
    fields = Fields(config, str(path))
    fields.choice("pooling_mode", ("mean",), "mean")  # raises for other poolings
    templates = (chat for pattern, chat in LLM2VEC_CHAT_TEMPLATES.items() if re.fullmatch(pattern, transformer_name))
    before, after = next(templates, ("", ""))
    return {
        "attention": "bidirectional", "pooling": "mean", "append_eos": False, "pool_text_tokens": True,
        "include_instruction": not fields.boolean("skip_instruction", True), "max_length": fields.integer("max_length", 512),
        "text_length": fields.integer("doc_max_length", 400), "instruction_template": before + "{instruction} ",
        "plain_prompt": before, "query_suffix": after, "prompts": {"document": before},
    }  # fmt: skip


def _read_embedding_gemma_choices(folder: Path | None, transformer_name: str) -> SpecChoices:
    """Return the fields of `EmbeddingSpec` for EmbeddingGemma (Schechter Vera et al. 2025). Its files state the projections."""
    projections = {"hidden_projections": (HiddenProjection(width=3072),), "projection": 768} if folder is None else {}
    return {
        "attention": "bidirectional", "pooling": "mean", "fixed_prompts": True, **projections,
        "instruction_template": "task: {instruction} | query: ",
        "prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
    }  # fmt: skip


def _is_llm2vec(folder: Path, config: Mapping[str, Any]) -> bool:
    return exists(folder / LLM2VEC_CONFIG_FILE) or "EncoderModel" in str(config.get("auto_map"))


def _is_gritlm(folder: Path, config: Mapping[str, Any]) -> bool:
    return "gritlm" in str(config.get("auto_map")).lower()


def _is_bge_icl(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer has the tokens that bge-en-icl added."""
    path = folder / "tokenizer_config.json"
    added_tokens = read_json(path).get("added_tokens_decoder") if exists(path) else None
    return all(f'"{token}"' in json.dumps(added_tokens) for token in BGE_ICL_TOKENS)


E5_CHOICES = {"pooling": "mean", "fixed_prompts": True, "prompts": {"query": "query: ", "document": "passage: "}}
# Encoders that pool [CLS] and only have a prompt for queries.
BGE_CHOICES = {
    "pooling": "first", "fixed_prompts": True,
    "prompts": {"query": "Represent this sentence for searching relevant passages: ", "document": ""},
}  # fmt: skip
# "Represent this sentence to retrieve related articles", with a full-width colon.
BGE_CHINESE_PROMPTS = {"query": "为这个句子生成表示以用于检索相关文章\N{FULLWIDTH COLON}", "document": ""}


PUBLISHED_LAYOUTS = (
    PublishedLayout("LLM2Vec", r"(?-i:LLM2Vec-.*)", _read_llm2vec_choices, _is_llm2vec),
    PublishedLayout(
        "KaLM-Embedding v1 and v1.5",
        r"kalm-embedding-(.*-)?v1(\.5)?",
        {"attention": "causal", **KALM_CHOICES, "instruction_table": "kalm"},
    ),
    PublishedLayout(
        "KaLM-Embedding v2",
        r"kalm-embedding-(.*-)?v2(\.5)?",
        {"attention": "bidirectional", **KALM_CHOICES, "instruction_table": "kalm_v2"},
    ),
    PublishedLayout(
        "KaLM-Embedding-Gemma3",
        r"kalm-embedding-gemma3-.*",
        # Its files specify mask and pooling.
        {name: KALM_CHOICES[name] for name in ("include_instruction", "prompts", "instruction_template")},
    ),
    PublishedLayout(
        "e5-mistral-7b-instruct", r"e5-mistral-7b-instruct", {**E5_MISTRAL_CHOICES, "instruction_table": "e5_mistral"}
    ),
    PublishedLayout(
        "SFR-Embedding and Linq-Embed-Mistral", r"SFR-Embedding.*|Linq-Embed-Mistral", E5_MISTRAL_CHOICES
    ),
    PublishedLayout(
        "Qwen3-Embedding",
        r"Qwen3-Embedding-.*",
        {
            # The tokenizer itself appends <|endoftext|>, which is not its EOS token.
            "attention": "causal", **LAST_TOKEN_CHOICES, "append_eos": False,
            "instruction_template": "Instruct: {instruction}\nQuery:", "instruction_table": "qwen3_embedding",
        },
    ),
    PublishedLayout(
        "gte-Qwen1.5-instruct and gte-Qwen2-instruct",
        r"gte-Qwen(1\.5|2)-.*-instruct",
        {"attention": "bidirectional", **LAST_TOKEN_CHOICES, "instruction_template": E5_TEMPLATE},
    ),
    PublishedLayout(
        "stella-1.5B-v5",
        r"stella[-_](en[-_])?1\.5B[-_]v5",
        # Its files specify the rest: EOS, and the width of the projection.
        {
            "attention": "bidirectional", "pooling": "mean", "include_instruction": True, "prompts": EMPTY_DOCUMENT_PROMPT,
            "instruction_template": E5_TEMPLATE,
        },
    ),
    PublishedLayout(
        "GritLM",
        r"GritLM-7B.*",
        {
            "attention": "bidirectional", "pooling": "mean", "include_instruction": False, "append_eos": False,
            "instruction_template": "<|user|>\n{instruction}\n<|embed|>\n", "plain_prompt": "<|embed|>\n",
            "prompts": {"document": "<|embed|>\n"}, "max_length": 512, "instruction_table": "gritlm",
        },
        _is_gritlm,
    ),
    PublishedLayout(
        "bge-en-icl",
        r"bge-en-icl",
        {
            "attention": "causal", **LAST_TOKEN_CHOICES, "max_length": 4096, "text_length": 512,
            "instruction_template": BGE_ICL_TEMPLATE, "query_suffix": "\n<response>",
            "example_template": f"{BGE_ICL_TEMPLATE}{{query}}\n<response>{{response}}",
        },
        _is_bge_icl,
    ),
    PublishedLayout("EmbeddingGemma", r"embeddinggemma-300m.*", _read_embedding_gemma_choices),
    PublishedLayout("E5 and multilingual E5", r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?", E5_CHOICES),
    PublishedLayout(
        "modernbert-embed",
        r"modernbert-embed-(base|large)",
        {
            "pooling": "mean", "fixed_prompts": True,
            "prompts": {"query": "search_query: ", "document": "search_document: "},
        },
    ),
    PublishedLayout(
        "multilingual-e5-large-instruct",
        r"multilingual-e5-large-instruct",
        {
            "pooling": "mean", "fixed_prompts": False, "prompts": EMPTY_DOCUMENT_PROMPT, "instruction_template": E5_TEMPLATE,
        },
    ),
    PublishedLayout(
        "BGE (English), UAE, mxbai-embed and snowflake-arctic-embed",
        r"bge-(small|base|large)-en(-v1\.5)?|UAE-Large-V1|mxbai-embed-large-v1|snowflake-arctic-embed-(xs|s|m|l)(-v1\.5)?",
        BGE_CHOICES,
    ),
    PublishedLayout("BGE (Chinese)", r"bge-(small|base|large)-zh(-v1\.5)?", {**BGE_CHOICES, "prompts": BGE_CHINESE_PROMPTS}),
    PublishedLayout("Echo (last token)", r"echo-.*-lasttoken", {**ECHO_CHOICES, "pooling": "last"}),
    PublishedLayout("Echo (mean)", r"echo-.*-meantoken", {**ECHO_CHOICES, "pooling": "mean"}),
)  # fmt: skip


def find_published_layout(name: str, folder: Path | None, config: Mapping[str, Any]) -> PublishedLayout | None:
    """Return the layout of a published model, or None. Its files decide first, then its name.

    Args:
        name: Name that the user gave: a hub id, a preset or a folder.
        folder: Folder of the model, None for a preset.
        config: Content of the folder's config.json.
    """
    names = _list_possible_names(name, folder)
    matches = [layout for layout in PUBLISHED_LAYOUTS if folder is not None and layout.matches_files(folder, config)]
    matches += [
        layout
        for layout in PUBLISHED_LAYOUTS
        if any(re.fullmatch(layout.name_pattern, candidate, re.IGNORECASE) for candidate in names)
    ]
    return next(iter(matches), None)


def find_first_stage_adapters(name: str, folder: Path) -> str | None:
    """Return the name of the adapters on which LLM2Vec's second stage was trained, or None for other adapters.

    The files of the second stage refer only to the transformer.
    """
    pattern = r"(LLM2Vec-.*-mntp)-(supervised|unsup-simcse)"
    matches = (re.fullmatch(pattern, candidate) for candidate in _list_possible_names(name, folder))
    match = next(filter(None, matches), None)
    if match is None:
        return None
    sibling = folder.with_name(match[1])
    return str(sibling) if exists(sibling) else f"McGill-NLP/{match[1]}"


def _list_possible_names(name: str, folder: Path | None) -> list[str]:
    """Return the names that a repository may have.

    These are the last part of a hub id, of a preset's name or of a folder's path, and the name in the path of a snapshot in
    the hub's cache (models--OWNER--NAME).
    """
    path = folder.resolve() if folder is not None else Path(name)
    cache_names = [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    return [re.split("[/:]", name.rstrip("/"))[-1], path.name, *cache_names]
