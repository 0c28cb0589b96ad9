"""Published embedders as tiny folders in the layout of their repositories, with vectors computed by PyTorch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from tokenizers.processors import Sequence, TemplateProcessing

from helpers import tiny

E5 = "Instruct: {}\nQuery: "
MAX_LENGTH, MAX_POSITIONS = 100, 128  # tokens: what the files say of a text, and what the tiny models have


@dataclasses.dataclass(frozen=True)
class Published:
    """The files of a repository, and what its own code does.

    Attributes:
        family: Family of the decoder.
        pooling: Name of the pooling in sentence-transformers' files.
        prompt: Template of the prompt of an instruction.
        plain: Prompt of a text without an instruction.
        causal: Whether the mask is causal.
        code: Python class that config.json names (auto_map).
        modules: Whether it has sentence-transformers' files.
        prompts: Prompts stored in these files.
        end: Token that its code appends, which its tokenizer.json does not.
        eos: Whether tokenizer_config.json sets add_eos_token.
        skip_prompt: Whether the prompt is not pooled.
        config: More keys of config.json.
        dense: Width of the linear layer after the pooling, or 0.
    """

    family: str
    pooling: str
    prompt: str = E5
    plain: str = ""
    causal: bool = True
    code: str = ""
    modules: bool = True
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    end: str = ""
    eos: bool = False
    skip_prompt: bool = False
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dense: int = 0


KALM = "Instruct: {} \n Query: "
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
PUBLISHED = {
    "KaLM-embedding-multilingual-mini-v1": Published("qwen2", "mean", KALM),
    "KaLM-embedding-multilingual-mini-instruct-v1.5": Published("qwen2", "mean", KALM),
    "KaLM-embedding-multilingual-mini-instruct-v2": Published("qwen2", "mean", KALM, causal=False, code="modeling.Qwen2Model"),
    "e5-mistral-7b-instruct": Published(
        "mistral", "lasttoken", prompts={"web_search_query": E5.format(SEARCH)}, end="</s>", eos=True
    ),
    "SFR-Embedding-Mistral": Published("mistral", "lasttoken", end="</s>", eos=True),
    "Linq-Embed-Mistral": Published("mistral", "lasttoken", end="</s>", eos=True),
    "gte-Qwen2-1.5B-instruct": Published(
        "qwen2", "lasttoken", causal=False, code="modeling_qwen.Qwen2Model", prompts={"query": E5.format(SEARCH)},
        end="<|endoftext|>", eos=True, config={"is_causal": False},
    ),
    "Qwen3-Embedding-0.6B": Published(
        "qwen3", "lasttoken", E5.rstrip(), prompts={"query": E5.rstrip().format(SEARCH), "document": ""}
    ),
    "GritLM-7B": Published(
        "mistral-window", "mean", "<|user|>\n{}\n<|embed|>\n", "<|embed|>\n", causal=False, modules=False, skip_prompt=True,
        code="modeling_gritlm7b.MistralForCausalLM",
    ),
}  # fmt: skip
# Layouts that add nothing to training and export.
OTHER_PUBLISHED = {
    "gte-Qwen1.5-7B-instruct": Published(
        "qwen2", "lasttoken", causal=False, code="modeling_qwen.Qwen2Model", prompts={"query": E5.format(SEARCH)},
        end="<|endoftext|>", eos=True,
    ),
    "stella_en_1.5B_v5": Published(
        "qwen2", "mean", causal=False, code="modeling_qwen.Qwen2Model", prompts={"s2p_query": E5.format(SEARCH)},
        end="<|endoftext|>", eos=True, dense=24,
    ),
}  # fmt: skip


class Reference:
    """The tiny model of a published layout: its folder, and its vectors from transformers' stock decoder."""

    def __init__(self, name: str, root: Path):
        self.published, self.folder = (PUBLISHED | OTHER_PUBLISHED)[name], root / name
        torch.manual_seed(0)
        self.dense = torch.nn.Linear(tiny.SIZES["hidden_size"], self.published.dense) if self.published.dense else None
        family = self.published.family
        self.transformer = tiny.build_torch_model(family, causal=self.published.causal)
        self.tokenizer = tiny.build_tokenizer(bos=True) if family.startswith("mistral") else tiny.build_qwen_tokenizer()
        if name.startswith("Qwen3"):  # its tokenizer.json ends texts with a token that is not its EOS
            self.tokenizer.backend_tokenizer.post_processor = make_end_processor(self.tokenizer, "<|endoftext|>")
            self.tokenizer.eos_token = "<|im_end|>"
        self._save()

    def _save(self) -> None:
        p, folder = self.published, self.folder
        self.transformer.save_pretrained(folder)
        self.tokenizer.model_max_length = MAX_LENGTH
        self.tokenizer.save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", {"add_eos_token": True} if p.eos else {})
        code = {"auto_map": {"AutoModel": p.code}} if p.code else {}
        edit_json(folder / "config.json", {**code, **p.config}, drop=() if p.config else ("is_causal",))
        if not p.modules:
            return
        kinds = ["Transformer", "Pooling", "Dense" if p.dense else "Normalize"]
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_LENGTH, "do_lower_case": False}))
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{kind}": kind.startswith(p.pooling) for kind in ("cls_token", "mean_tokens", "lasttoken")}
        pooling = {"word_embedding_dimension": 32, **modes, "include_prompt": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": p.prompts}))
        if self.dense is not None:
            (folder / "2_Dense").mkdir()
            sizes = {"in_features": self.dense.in_features, "out_features": p.dense, "bias": True}
            dense = sizes | {"activation_function": "torch.nn.modules.linear.Identity"}
            (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
            weights = {f"linear.{key}": x for key, x in self.dense.state_dict().items()}
            safetensors.torch.save_file(weights, folder / "2_Dense" / "model.safetensors")

    def encode(self, texts: list[str], instruction: str = "") -> np.ndarray:
        p = self.published
        prompt = p.prompt.format(instruction) if instruction else p.plain
        end = self.tokenizer(p.end, add_special_tokens=False)["input_ids"]
        limit = (MAX_LENGTH if p.modules else MAX_POSITIONS) - len(end)
        skipped = len(self.tokenizer(prompt)["input_ids"]) if p.skip_prompt else 0
        vectors = []
        for text in texts:
            ids = self.tokenizer(prompt + text, truncation=True, max_length=limit)["input_ids"] + end
            with torch.no_grad():
                hidden = self.transformer(torch.tensor([ids])).last_hidden_state[0]
                pooled = hidden[-1] if p.pooling == "lasttoken" else hidden[skipped:].mean(dim=0)
                pooled = self.dense(pooled) if self.dense is not None else pooled
            vectors.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
        return np.stack(vectors)


def make_end_processor(tokenizer: transformers.PreTrainedTokenizerFast, token: str) -> Any:
    template = TemplateProcessing(single=f"$A {token}", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))])
    return Sequence([tokenizer.backend_tokenizer.post_processor, template])


def edit_json(path: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(values | changes))
