"""Tokenize texts in the same way for training, encoding, evaluation and export.

Prompt and text are joined first, then tokenized once. BOS and EOS come from the tokenizer's own post-processor, to which EOS
is added if a model wants it. Truncation keeps both. CLS and SEP of an encoder's tokenizer count as BOS and EOS.
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

from jaxembed.config.field_lists import log_once
from jaxembed.config.fields import quote_value
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError, summarize

MAX_TEXT_CHARS = 1_000_000  # longer texts are truncated before tokenization, which takes about 100 bytes per character
# In a template: a boundary that no token crosses. It reproduces models whose own code tokenizes the parts separately.
TOKEN_BOUNDARY = "\x1f"


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence the warnings of transformers, such as those about unknown models or newly initialized weights."""
    from transformers import logging  # slow to import, and not needed by --help

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_tokenizer(folder: Path | str) -> Any:
    """Load the fast Hugging Face tokenizer of a folder, without its chat template.

    Raises:
        UserError: The folder has no tokenizer, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{folder}: cannot load a tokenizer ({summarize(error)}; expected a tokenizer.json)") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{folder}: has only a slow tokenizer (expected a tokenizer.json)")
    tokenizer.chat_template = None
    return tokenizer


def find_start_token(tokenizer: Any) -> tuple[str, int] | None:
    """Return the token that starts texts, with its id: BOS, or CLS of an encoder's tokenizer. None if there is neither."""
    return _find_added_token(tokenizer, 0, ("bos_token", "cls_token"))


def find_end_token(tokenizer: Any) -> tuple[str, int] | None:
    """Return the token that ends texts, with its id: EOS, or SEP of an encoder's tokenizer. None if there is neither."""
    return _find_added_token(tokenizer, -1, ("eos_token", "sep_token"))


def _find_added_token(tokenizer: Any, index: int, roles: tuple[str, str]) -> tuple[str, int] | None:
    """Return the token of the first role that the tokenizer puts at `index` of its texts, else the first that is defined."""
    tokens = [(getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")) for role in roles]
    candidates = [(token, id_) for token, id_ in tokens if id_ is not None]
    ids = _encode_sample(tokenizer)
    added_tokens = [entry for entry in candidates if ids and ids[index] == entry[1]]
    return next(iter([*added_tokens, *candidates]), None)


def _encode_sample(tokenizer: Any) -> list[int]:
    """Return the tokens of a short text with its special tokens, without the padding that some files enable."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    return [id_ for id_, is_real in zip(encoding.ids, encoding.attention_mask, strict=True) if is_real]


def ends_with_eos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself ends every text with EOS, or SEP."""
    ids, end = _encode_sample(tokenizer), find_end_token(tokenizer)
    return bool(ids) and end is not None and ids[-1] == end[1]


def append_eos(tokenizer: Any) -> None:
    """Make the tokenizer's post-processor end every text with EOS, or SEP, and keep its BOS.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if ends_with_eos(tokenizer):
        return
    end = find_end_token(tokenizer)
    if end is None:
        raise UserError("model.append_eos: is on, but the base's tokenizer has no EOS token. Set model.append_eos=false.")
    _set_last_tokens(tokenizer, [end])


def drop_eos(tokenizer: Any) -> None:
    """Remove the EOS that `append_eos` adds."""
    if ends_with_eos(tokenizer):
        _set_last_tokens(tokenizer, [])


def _set_last_tokens(tokenizer: Any, last: list[tuple[str, int]]) -> None:
    """Make the post-processor append the tokens `last`, and prepend BOS if it does so now."""
    start = find_start_token(tokenizer)
    set_special_tokens(tokenizer, [start] if start is not None and starts_with_bos(tokenizer) else [], last)


def starts_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself starts every text with BOS, or CLS."""
    ids, start = _encode_sample(tokenizer), find_start_token(tokenizer)
    return bool(ids) and start is not None and ids[0] == start[1]


def set_special_tokens(tokenizer: Any, first: Sequence[tuple[str, int]], last: Sequence[tuple[str, int]]) -> None:
    """Make the post-processor put exactly these tokens around every text.

    Args:
        tokenizer: Fast Hugging Face tokenizer, which is changed.
        first: Tokens before a text, with their ids.
        last: Tokens after it, with their ids.
    """
    before, after = ([token for token, _ in tokens] for tokens in (first, last))
    single, pair = (" ".join([*before, texts, *after]) for texts in ("$A", "$A $B"))
    special_tokens = list(dict.fromkeys([*first, *last]))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of N texts.

    Attributes:
        ids: Token ids of each text, int32 [tokens].
        pool_start: Index of the first pooled token of each text, past its prompt, int64 [N].
    """

    ids: list[np.ndarray]
    pool_start: np.ndarray


class TextTokenizer:
    """Tokenizes batches of texts, each with its prompt ('' for none), on all cores and without the GIL.

    Whatever follows a text, such as its second copy (`spec.echo`) or a suffix, survives truncation: the text is truncated to
    leave room for it. Only a prompt that fills `spec.max_length` on its own cuts off everything after it.

    Attributes:
        hf_tokenizer: Fast Hugging Face tokenizer.
        spec: How texts become tokens: echo, suffix, EOS, truncation, and which tokens are pooled.
    """

    def __init__(self, hf_tokenizer: Any, spec: EmbeddingSpec):
        self.hf_tokenizer, self.spec = hf_tokenizer, spec
        self._special_ids = set(hf_tokenizer.all_special_ids)
        self._eos_text = hf_tokenizer.eos_token if spec.eos_as_text else ""
        self._copies = self._get_template("prompt").count("{text}")  # of the text in one input

    @cached_property
    def _truncating_backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(self.hf_tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(self.spec.max_length)
        return backend

    @cached_property
    def _full_backend(self) -> Tokenizer:
        """The tokenizer without truncation."""
        backend = Tokenizer.from_str(self._truncating_backend.to_str())
        backend.no_truncation()
        return backend

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> TokenizedTexts:
        """Tokenize N texts, each under its prompt."""
        truncated, encodings = self._encode_truncated([text[:MAX_TEXT_CHARS] for text in texts], prompts)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        limit = self.spec.max_length
        self._log_full_prompts([p for p, tokens in zip(prompts, ids, strict=True) if p and len(tokens) >= limit])
        if self._copies > 1:  # pool the second copy of the text
            starts = list(map(self._find_second_copy, truncated, prompts, encodings))
        elif self.spec.pool_text_tokens:  # pool as many tokens at the end as the text has on its own
            inputs = [text + self.spec.get_suffix(prompt) for text, prompt in zip(truncated, prompts, strict=True)]
            alone = self._full_backend.encode_batch_fast(inputs, add_special_tokens=False)
            starts = [max(0, len(whole_ids) - len(text)) for whole_ids, text in zip(ids, alone, strict=True)]
        else:  # pool what follows the tokens that the prompt has on its own
            return TokenizedTexts(ids, self.count_prompt_tokens(prompts))
        return TokenizedTexts(ids, np.array(starts, np.int64))

    def _log_full_prompts(self, prompts: Sequence[str]) -> None:
        """Log prompts that leave no room for a text: all texts under one of them have the same vector."""
        for prompt, room in zip(prompts, self.max_text_tokens(prompts), strict=True):
            if room < 1:
                log_once(
                    f"prompt {quote_value(prompt)}: fills the {self.spec.max_length} tokens that the model reads, so texts "
                    "under it are not read. Shorten the prompt, or raise the maximum length."
                )

    def decode_inputs(self, texts: Sequence[str], prompts: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        """Yield the input of each text as the model reads it: the part before pooling, the pooled part, and the token count."""
        tokenized = self(texts, prompts)
        for ids, start in zip(tokenized.ids, tokenized.pool_start, strict=True):
            yield self.hf_tokenizer.decode(ids[:start]), self.hf_tokenizer.decode(ids[start:]), len(ids)

    def _encode_truncated(self, texts: Sequence[str], prompts: Sequence[str]) -> tuple[list[str], list[Encoding]]:
        """Return the truncated texts, and the tokens of the whole inputs.

        Only texts with something after them are truncated as strings. For all others the backend truncates the tokens.
        """
        truncated, limits = list(texts), self._compute_max_input_tokens(prompts)
        encodings = self._encode(self._truncating_backend, texts, prompts)

        def is_too_long(i: int) -> bool:
            return bool(encodings[i].overflowing) or len(encodings[i]) > limits[i]

        # Find the texts that are too long and followed by something.
        always_followed = self._copies > 1 or self.spec.text_length > 0
        long = [i for i in range(len(truncated)) if is_too_long(i) and (always_followed or self.spec.get_suffix(prompts[i]))]
        # Find the start of their own tokens, and the number of tokens that fit.
        alone = self._full_backend.encode_batch([texts[i] for i in long], add_special_tokens=False)
        offsets = {i: encoding.offsets for i, encoding in zip(long, alone, strict=True)}
        room = dict(zip(long, self.max_text_tokens([prompts[i] for i in long]), strict=True))
        while long:
            # Truncate each text at the start of the first token that does not fit.
            for i in long:
                room[i] = min(room[i], len(offsets[i]) - 1)
                truncated[i] = texts[i][: offsets[i][room[i]][0]] if room[i] > 0 else ""
                room[i] -= 1
            # The text may tokenize differently near the cut and still be too long: try again with one token less.
            new_encodings = self._encode(self._truncating_backend, [truncated[i] for i in long], [prompts[i] for i in long])
            for i, encoding in zip(long, new_encodings, strict=True):
                encodings[i] = encoding
            long = [i for i in long if is_too_long(i) and truncated[i]]
        return truncated, encodings

    def _encode(self, backend: Tokenizer, texts: Sequence[str], prompts: Sequence[str]) -> list[Encoding]:
        """Encode the whole inputs; for echoes with the character offsets of each token."""
        inputs = list(map(self._split_input, texts, prompts))
        if all(len(parts) == 1 for parts in inputs):
            encode = backend.encode_batch_fast if self._copies == 1 else backend.encode_batch
            return list(encode([joined for (joined,) in inputs]))
        encoded_parts = iter(self._full_backend.encode_batch(list(chain.from_iterable(inputs)), add_special_tokens=False))
        return [backend.post_process(Encoding.merge(list(islice(encoded_parts, len(parts))))) for parts in inputs]

    def _split_input(self, text: str, prompt: str) -> list[str]:
        """Return the whole input of a text, split at the token boundaries of its templates."""
        *before, last = prompt.split(TOKEN_BOUNDARY)
        template = self._get_template(prompt) + self.spec.get_suffix(prompt) + self._eos_text
        first, *rest = template.split(TOKEN_BOUNDARY)
        return [*before, last + first.replace("{text}", text), *(part.replace("{text}", text) for part in rest)]

    def _get_template(self, prompt: str) -> str:
        """Return the template of a text under a prompt; that of plain texts for an empty one."""
        spec = self.spec
        return (spec.echo if prompt else spec.plain_echo or spec.echo) or "{text}"

    def _find_second_copy(self, text: str, prompt: str, encoding: Encoding) -> int:
        """Return the index of the first token of the second copy of an echo."""
        joined = "".join(self._split_input(text, prompt))
        start = len(joined) - len(self._eos_text) - len(self.spec.get_suffix(prompt)) - len(text)
        return next((i for i, (_, end) in enumerate(encoding.offsets) if end > start), len(encoding) - 1)

    def count_prompt_tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Count the tokens of each prompt on its own, without a trailing special token, int64 [N].

        This is the rule of sentence-transformers' pooling. A prompt that ends in a space counts a token that is in fact merged
        into the first word of the text.
        """

        def count(distinct: list[str]) -> Iterator[int]:
            for prompt, encoding in zip(distinct, self._truncating_backend.encode_batch_fast(distinct), strict=True):
                ends_with_special = len(encoding) > 0 and encoding.ids[-1] in self._special_ids
                num_uncounted = ends_with_special + self.spec.pool_last_instruction_token
                yield max(0, len(encoding) - num_uncounted) if prompt else 0

        return _count_once(prompts, count)

    def max_text_tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the number of tokens of a text that fit under each prompt, int64 [N].

        The number may be off by tokens that merge at the ends of the text. It is below 1 if the prompt leaves no room.
        """
        room = (self.spec.max_length - self._count_surrounding_tokens(prompts)) // self._copies
        return np.minimum(room, self.spec.text_length or room)

    def _compute_max_input_tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the maximum tokens of a text and everything around it, under each prompt."""
        if not self.spec.text_length:
            return np.full(len(prompts), self.spec.max_length)
        return np.minimum(self.spec.max_length, self._count_surrounding_tokens(prompts) + self._copies * self.spec.text_length)

    def _count_surrounding_tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Count the tokens around a text under each prompt: prompt, templates, suffix and special tokens."""
        return _count_once(prompts, lambda distinct: self.count_untruncated_tokens([""] * len(distinct), distinct))

    def count_untruncated_tokens(self, texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Count the tokens that each whole input has without truncation, int64 [N]. Texts count up to `MAX_TEXT_CHARS`."""
        shortened = [text[:MAX_TEXT_CHARS] for text in texts]
        return np.array([len(encoding) for encoding in self._encode(self._full_backend, shortened, prompts)])

    def split_texts(self, texts: Sequence[str], prompt: str) -> list[list[str]]:
        """Split each text at token boundaries into pieces that fit under a prompt. A text that fits stays whole.

        Raises:
            UserError: The prompt leaves no room for a text.
        """
        lengths = self.count_untruncated_tokens(texts, [prompt] * len(texts))
        room, limit = int(self.max_text_tokens([prompt])[0]), int(self._compute_max_input_tokens([prompt])[0])
        if room < 1 and (lengths > limit).any():
            raise UserError(
                f"prompt: {len(prompt)} characters fill the {self.spec.max_length} tokens that the model reads. "
                "Shorten the prompt."
            )
        return [
            [text] if length <= limit else self._split_text(text, prompt, room)
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _split_text(self, text: str, prompt: str, piece_tokens: int) -> list[str]:
        offsets = self._full_backend.encode(text, add_special_tokens=False).offsets
        starts = sorted({offsets[i][0] for i in range(0, len(offsets), piece_tokens)})
        pieces = [text[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
        longest = self.count_untruncated_tokens(pieces, [prompt] * len(pieces)).max()
        if longest > self._compute_max_input_tokens([prompt])[0] and piece_tokens > 1:
            # Pieces may tokenize differently near the cuts: try again with one token less.
            return self._split_text(text, prompt, piece_tokens - 1)
        return pieces


def _count_once(prompts: Sequence[str], count: Callable[[list[str]], Iterable[int]]) -> np.ndarray:
    """Return the count of each prompt, int64 [N], with equal prompts counted once."""
    distinct = list(dict.fromkeys(prompts))
    counts = dict(zip(distinct, count(distinct), strict=True))
    return np.array([counts[prompt] for prompt in prompts], np.int64)
