"""The one way from texts to tokens, used by training, encoding, evaluation and export.

Prompt and text are joined, then tokenised once. BOS and EOS come from the tokenizer's own post-processor, to which EOS
is added where a model wants it; truncation keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from jaxembed.errors import UserError, brief

BORDER = "\x1f"  # in a template: a place that no token crosses, as where a model's own code tokenises its pieces apart


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings, as of models that it does not know or of weights that it draws."""
    from transformers import logging  # slow to import, and not needed by --help

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_tokenizer(folder: Path | str) -> Any:
    """The fast Hugging Face tokenizer of a folder, its chat template left out; `UserError` where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
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
    """Tokenises whole batches of texts, each with its prompt ('' for none), on all cores and without the GIL.

    What follows a text, a second copy of it or a suffix, is kept whole: the text is cut to leave room. Only where a prompt
    fills `max_length` by itself is everything after that cut off.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        eos_as_text: bool = False,
        pool_last_instruction_token: bool = False,
        pool_text_tokens: bool = False,
        echo: str = "",
        plain_echo: str = "",
        suffix: str = "",
        text_length: int = 0,
    ):
        """`tokenizer` is a fast Hugging Face tokenizer; `max_length` counts special tokens; `suffix` follows the texts that
        have a prompt. For the rest see `EmbeddingSpec`.
        """
        self.hf = tokenizer
        self.max_length = max_length
        self._end = tokenizer.eos_token if eos_as_text else ""
        self._pooled_instruction_tokens = int(pool_last_instruction_token)
        self._pool_text_tokens = pool_text_tokens
        self._template, self._plain_template = echo or "{text}", plain_echo or echo or "{text}"
        self._copies = self._template.count("{text}")
        self._suffix, self._text_length = suffix, text_length
        self._special = set(tokenizer.all_special_ids)

    @cached_property
    def _backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(self.max_length)
        return backend

    @cached_property
    def _uncut(self) -> Tokenizer:
        backend = Tokenizer.from_str(self._backend.to_str())
        backend.no_truncation()
        return backend

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> TokenizedTexts:
        kept, encoded = self._fitted(texts, prompts)
        ids = [np.array(e.ids, np.int32) for e in encoded]
        if self._copies > 1:
            return TokenizedTexts(ids, np.array(list(map(self._second_copy, kept, prompts, encoded)), np.int64))
        if not self._pool_text_tokens:
            return TokenizedTexts(ids, self.prompt_lengths(prompts))
        alone = [text + self._tail(prompt) for text, prompt in zip(kept, prompts, strict=True)]
        own = self._uncut.encode_batch_fast(alone, add_special_tokens=False)
        return TokenizedTexts(ids, np.array([max(0, len(a) - len(b)) for a, b in zip(ids, own, strict=True)], np.int64))

    def read_back(self, texts: Sequence[str], prompts: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        """What the model sees of each text, decoded: up to where pooling starts, from there on; and the tokens of both."""
        tokenized = self(texts, prompts)
        for ids, pool_from in zip(tokenized.ids, tokenized.pool_from, strict=True):
            yield self.hf.decode(ids[:pool_from]), self.hf.decode(ids[pool_from:]), len(ids)

    def _fitted(self, texts: Sequence[str], prompts: Sequence[str]) -> tuple[list[str], list[Encoding]]:
        """The texts, cut at one of their tokens where something follows that has to fit, and the tokens of everything."""
        kept, encoded, limits = list(texts), self._encoded(self._backend, texts, prompts), self._limits(prompts)

        def is_cut(i: int) -> bool:
            return bool(encoded[i].overflowing) or len(encoded[i]) > limits[i]

        followed = self._copies > 1 or self._text_length > 0
        over = [i for i in range(len(kept)) if is_cut(i) and (followed or self._tail(prompts[i]))]
        alone = self._uncut.encode_batch([texts[i] for i in over], add_special_tokens=False)
        spans = {i: e.offsets for i, e in zip(over, alone, strict=True)}
        room = dict(zip(over, self.room([prompts[i] for i in over]), strict=True))
        while over:
            for i in over:
                room[i] = min(room[i], len(spans[i]) - 1)
                kept[i] = texts[i][: spans[i][room[i]][0]] if room[i] > 0 else ""
                room[i] -= 1  # for the next round, where tokens at the cut came out otherwise
            again = self._encoded(self._backend, [kept[i] for i in over], [prompts[i] for i in over])
            for i, e in zip(over, again, strict=True):
                encoded[i] = e
            over = [i for i in over if is_cut(i) and kept[i]]
        return kept, encoded

    def _encoded(self, backend: Tokenizer, texts: Sequence[str], prompts: Sequence[str]) -> list[Encoding]:
        """The texts with all that stands around them; for echoes with the place of each token."""
        pieces = list(map(self._pieces, texts, prompts))
        if all(len(of_text) == 1 for of_text in pieces):
            encode = backend.encode_batch_fast if self._copies == 1 else backend.encode_batch
            return list(encode([joined for (joined,) in pieces]))
        apart = iter(self._uncut.encode_batch(list(chain.from_iterable(pieces)), add_special_tokens=False))
        return [backend.post_process(Encoding.merge(list(islice(apart, len(of_text))))) for of_text in pieces]

    def _pieces(self, text: str, prompt: str) -> list[str]:
        """What stands before, in and behind a text, cut at the borders of templates."""
        *before, last = prompt.split(BORDER)
        first, *rest = ((self._template if prompt else self._plain_template) + self._tail(prompt) + self._end).split(BORDER)
        return [*before, last + first.replace("{text}", text), *(piece.replace("{text}", text) for piece in rest)]

    def _tail(self, prompt: str) -> str:
        """What follows a text under a prompt."""
        return self._suffix if prompt else ""

    def _second_copy(self, text: str, prompt: str, encoded: Encoding) -> int:
        """The token that an echo's second copy starts with."""
        whole = "".join(self._pieces(text, prompt))
        start = len(whole) - len(self._end) - len(self._tail(prompt)) - len(text)
        return next((i for i, (_, end) in enumerate(encoded.offsets) if end > start), len(encoded) - 1)

    def prompt_lengths(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokens of each prompt alone, less a trailing special token: the rule of sentence-transformers' pooling.

        A prompt that ends in a space counts a token that really merges into the text's first word.
        """

        def count(distinct: list[str]) -> Iterator[int]:
            for prompt, encoded in zip(distinct, self._backend.encode_batch_fast(distinct), strict=True):
                ends_special = len(encoded) > 0 and encoded.ids[-1] in self._special
                yield max(0, len(encoded) - ends_special - self._pooled_instruction_tokens) if prompt else 0

        return _of_each(prompts, count)

    def room(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokens that a text may have under each prompt without being cut, give or take those that merge at its ends."""
        left = (self.max_length - self._around(prompts)) // self._copies
        return np.minimum(left, self._text_length or left)

    def _limits(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokens that a text and all that stands around it may have."""
        if not self._text_length:
            return np.full(len(prompts), self.max_length)
        return np.minimum(self.max_length, self._around(prompts) + self._copies * self._text_length)

    def _around(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokens that stand around a text under each prompt."""
        return _of_each(prompts, lambda distinct: self.untruncated_lengths([""] * len(distinct), distinct))

    def untruncated_lengths(self, texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Tokens each text would have without `max_length`."""
        return np.array([len(e) for e in self._encoded(self._uncut, texts, prompts)])

    def pieces(self, texts: Sequence[str], prompt: str) -> list[list[str]]:
        """Each text cut at token borders into pieces that are not truncated under `prompt`; short texts stay whole.

        `UserError` where the prompt leaves no room for a text.
        """
        lengths = self.untruncated_lengths(texts, [prompt] * len(texts))
        room, limit = int(self.room([prompt])[0]), int(self._limits([prompt])[0])
        if room < 1 and (lengths > limit).any():
            raise UserError(f"a prompt of {len(prompt)} characters fills the {self.max_length} tokens that the model reads")
        return [
            [text] if length <= limit else self._cut(text, prompt, room) for text, length in zip(texts, lengths, strict=True)
        ]

    def _cut(self, text: str, prompt: str, room: int) -> list[str]:
        spans = self._uncut.encode(text, add_special_tokens=False).offsets
        starts = sorted({spans[i][0] for i in range(0, len(spans), room)})
        found = [text[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
        longest = self.untruncated_lengths(found, [prompt] * len(found)).max()
        if longest > self._limits([prompt])[0] and room > 1:  # tokens at the cuts came out otherwise
            return self._cut(text, prompt, room - 1)
        return found


def _of_each(prompts: Sequence[str], count: Callable[[list[str]], Iterable[int]]) -> np.ndarray:
    """A number of each prompt, counted once for those that are equal."""
    distinct = list(dict.fromkeys(prompts))
    counted = dict(zip(distinct, count(distinct), strict=True))
    return np.array([counted[prompt] for prompt in prompts], np.int64)
