"""The one way from texts to tokens, used by training, encoding, evaluation and export.

Prompt and text are joined, then tokenised once. BOS and EOS come from the tokenizer's own post-processor, to which EOS
is added where a model wants it; truncation keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from jaxembed.errors import UserError, brief


def load_tokenizer(folder: Path | str) -> Any:
    """The fast Hugging Face tokenizer of a folder, its chat template left out; `UserError` where there is none."""
    from transformers import AutoTokenizer  # slow to import, and not needed by --help

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{folder}: no tokenizer could be loaded ({brief(error)}); expected tokenizer.json there") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{folder}: only a slow tokenizer is there; expected tokenizer.json")
    tokenizer.chat_template = None
    return tokenizer


def ends_with_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself ends every text with EOS."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id


def append_eos(tokenizer: Any) -> None:
    """Makes the tokenizer's post-processor end every text with EOS, keeping the BOS it may put first."""
    if ends_with_eos(tokenizer):
        return
    if tokenizer.eos_token_id is None:
        raise UserError("model.append_eos is on, but the base's tokenizer has no EOS token; set model.append_eos=false")
    _frame(tokenizer, [(tokenizer.eos_token, tokenizer.eos_token_id)])


def drop_eos(tokenizer: Any) -> None:
    """Takes the EOS away that `append_eos` adds."""
    if ends_with_eos(tokenizer):
        _frame(tokenizer, [])


def _frame(tokenizer: Any, end: list[tuple[str, int]]) -> None:
    """Makes the post-processor put BOS first, where it does so now, and `end` last."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    begin = [(tokenizer.bos_token, tokenizer.bos_token_id)] if ids and ids[0] == tokenizer.bos_token_id else []
    single, pair = (" ".join([*dict(begin), middle, *dict(end)]) for middle in ("$A", "$A $B"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=begin + end)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids (int32) of each text, and the place where its pooling starts (past the prompt)."""

    ids: list[np.ndarray]
    pool_from: np.ndarray


class TextTokenizer:
    """Tokenises whole batches of texts, each with its prompt ('' for none), on all cores and without the GIL."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        eos_as_text: bool = False,
        pool_last_instruction_token: bool = False,
        echo: str = "",
    ):
        """`tokenizer` is a fast Hugging Face tokenizer; `max_length` counts special tokens. For the rest see
        `EmbeddingSpec`.
        """
        self.hf = tokenizer
        self.max_length = max_length
        self._end = tokenizer.eos_token if eos_as_text else ""
        self._pooled_instruction_tokens = int(pool_last_instruction_token)
        self._template = echo or "{text}"
        self._copies = self._template.count("{text}")
        self._special = set(tokenizer.all_special_ids)
        self._prompt_lengths: dict[str, int] = {"": 0}

    @cached_property
    def _backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(self.max_length)
        return backend

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> TokenizedTexts:
        if self._copies > 1:
            return self._echoed(texts, prompts)
        ids = [np.array(e.ids, np.int32) for e in self._backend.encode_batch_fast(self._joined(texts, prompts))]
        pool_from = np.array([self.prompt_length(prompt) for prompt in prompts], np.int64)
        return TokenizedTexts(ids, pool_from)

    def _joined(self, texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
        parts = zip(prompts, texts, strict=True)
        return [prompt + self._template.replace("{text}", text) + self._end for prompt, text in parts]

    def _echoed(self, texts: Sequence[str], prompts: Sequence[str]) -> TokenizedTexts:
        """Both copies of each text cut at the same token, and pooling from the start of the second."""
        ids, pool_from = [], []
        for text, prompt in zip(texts, prompts, strict=True):
            kept, room = text, (self.max_length - int(self.untruncated_lengths([""], [prompt])[0])) // self._copies
            while True:
                (whole,) = self._joined([kept], [prompt])
                encoded = self._uncut.encode(whole)
                if len(encoded.ids) <= self.max_length or not kept:
                    break
                spans = self._uncut.encode(text, add_special_tokens=False).offsets
                kept = text[: spans[room][0]] if 0 < room < len(spans) else ""
                room -= 1  # for the next round, where tokens at the cut came out otherwise
            second = len(whole) - len(self._end) - len(kept)
            start = next((i for i, (_, end) in enumerate(encoded.offsets) if end > second), len(encoded.ids) - 1)
            ids.append(np.array(encoded.ids[: self.max_length], np.int32))
            pool_from.append(min(start, self.max_length - 1))
        return TokenizedTexts(ids, np.array(pool_from, np.int64))

    def prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt alone, less a trailing special token: the rule of sentence-transformers' pooling.

        A prompt that ends in a space counts a token that really merges into the text's first word.
        """
        if prompt not in self._prompt_lengths:
            ids = self._backend.encode(prompt).ids
            length = len(ids) - (bool(ids) and ids[-1] in self._special)
            self._prompt_lengths[prompt] = max(0, length - self._pooled_instruction_tokens)
        return self._prompt_lengths[prompt]

    def untruncated_lengths(self, texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Tokens each text would have without `max_length`."""
        return np.array([len(e.ids) for e in self._uncut.encode_batch_fast(self._joined(texts, prompts))])

    def pieces(self, texts: Sequence[str], prompt: str) -> list[list[str]]:
        """Each text cut at token borders into pieces that are not truncated under `prompt`; short texts stay whole.

        `UserError` where the prompt leaves no room for a text.
        """
        lengths = self.untruncated_lengths(texts, [prompt] * len(texts))
        room = (self.max_length - int(self.untruncated_lengths([""], [prompt])[0])) // self._copies
        if room < 1 and (lengths > self.max_length).any():
            raise UserError(f"a prompt of {len(prompt)} characters fills the {self.max_length} tokens that the model reads")
        return [
            [text] if length <= self.max_length else self._cut(text, prompt, room)
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _cut(self, text: str, prompt: str, room: int) -> list[str]:
        spans = self._uncut.encode(text, add_special_tokens=False).offsets
        starts = sorted({spans[i][0] for i in range(0, len(spans), room)})
        found = [text[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
        longest = self.untruncated_lengths(found, [prompt] * len(found)).max()
        if longest > self.max_length and room > 1:  # tokens at the cuts came out otherwise
            return self._cut(text, prompt, room - 1)
        return found

    @cached_property
    def _uncut(self) -> Tokenizer:
        backend = Tokenizer.from_str(self._backend.to_str())
        backend.no_truncation()
        return backend
