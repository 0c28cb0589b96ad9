"""Ways in which a server may treat texts differently from the folder that it serves. `diagnosis.py` tries them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from jaxembed.config.model import AttentionKind, PoolingKind
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import (
    TextTokenizer,
    TokenizedTexts,
    drop_eos,
    ends_with_eos,
    find_end_token,
    find_start_token,
    set_special_tokens,
    starts_with_bos,
)
from jaxembed.hub.embedder import Embedder
from jaxembed.model.families import TransformerConfig

SERVER_POOLINGS: tuple[PoolingKind, ...] = ("mean", "last", "first", "max", "weighted_mean")
DEFAULT_ROPE_THETA = 10_000.0
# Lengths at which servers truncate, besides those of the model and those that the server reports.
COMMON_LENGTHS = (16, 32, 64, 100, 128, 200, 256, 300, 384, 500, 512, 768, 1000, 1024, 2000, 2048, 4000, 4096, 8000, 8192)
MAX_LENGTH_RATIO = 4  # longer common lengths, relative to the model's own, are not tried
MAX_ADDED_PROMPTS = 3
COUNT_NAMES = ("none", "one", "two")  # words for the number of BOS or EOS tokens of a text


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference between a server and its folder.

    Attributes:
        setting: What differs, such as pooling.
        served: What the server does.
        expected: What the folder specifies.
    """

    setting: str
    served: str
    expected: str

    def __str__(self) -> str:
        """Return the difference as commands print it."""
        return f"{self.setting}: {self.served} instead of {self.expected}"


Changes = tuple[Change, ...]
Rewrite = Callable[[str, str], tuple[str, str]]  # (prompt, text) -> (prompt, text)


@dataclasses.dataclass(frozen=True)
class TransformerVariant:
    """A transformer and its mask."""

    changes: Changes
    transformer: TransformerConfig
    attention: AttentionKind


@dataclasses.dataclass(frozen=True)
class PoolVariant:
    """The layers after the transformer, as a spec: pooling, the pooled tokens, and the projection."""

    changes: Changes
    spec: EmbeddingSpec


@dataclasses.dataclass(frozen=True, eq=False)
class TokenVariant:
    """How a prompt and a text become tokens.

    Attributes:
        changes: Differences from the folder.
        tokenizer: The tokenizer.
        rewrite: Maps prompt and text to those that are tokenized.
    """

    changes: Changes
    tokenizer: TextTokenizer
    rewrite: Rewrite = lambda prompt, text: (prompt, text)


class LastTokensTokenizer(TextTokenizer):
    """Truncates a long input at its start, BOS included, instead of its end."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> TokenizedTexts:
        """Tokenize N texts, each under its prompt."""
        inputs = [np.array(encoding.ids, np.int32) for encoding in self._encode(self._full_backend, texts, prompts)]
        num_dropped = np.maximum([len(ids) - self.spec.max_length for ids in inputs], 0)
        pool_start = np.maximum(self.count_prompt_tokens(prompts) - num_dropped, 0)
        shortened = [self._drop(ids, count) for ids, count in zip(inputs, num_dropped, strict=True)]
        return TokenizedTexts(shortened, pool_start)

    def _drop(self, ids: np.ndarray, count: int) -> np.ndarray:
        return ids[count:]


class LastTextTokensTokenizer(LastTokensTokenizer):
    """Truncates a long input at its start, after BOS."""

    def _drop(self, ids: np.ndarray, count: int) -> np.ndarray:
        return np.concatenate([ids[:1], ids[1 + count :]])


def list_transformer_variants(embedder: Embedder) -> list[TransformerVariant]:
    """Return the unchanged transformer of a model, and variants with one difference each: mask, positions, windows, GELU."""
    transformer, attention = embedder.model.transformer, embedder.spec.attention
    variants = [TransformerVariant((), transformer, attention)]

    def add(setting: str, served: str, expected: str, mask: AttentionKind = attention, **fields: object) -> None:
        changed_config = dataclasses.replace(transformer, **fields)  # type: ignore[arg-type]
        variants.append(TransformerVariant((Change(setting, served, expected),), changed_config, mask))

    other: AttentionKind = "bidirectional" if attention == "causal" else "causal"
    add("attention", other, attention, other)
    if any(transformer.windows):
        add(
            "sliding window",
            "none",
            f"{next(filter(None, transformer.windows))} tokens",
            # Not None: layers without a window may have another rotary base.
            windows=tuple(window and 2 * transformer.max_positions for window in transformer.windows),
        )
    if transformer.rope_scaling:
        kind = dict(transformer.rope_scaling).get("rope_type", "scaled")
        add("RoPE scaling", "none", str(kind), rope_scaling=())
    if transformer.rope_theta != DEFAULT_ROPE_THETA:
        add("RoPE base", f"{DEFAULT_ROPE_THETA:g}", f"{transformer.rope_theta:g}", rope_theta=DEFAULT_ROPE_THETA)
    if transformer.activation == "gelu":
        add("GELU", "its tanh approximation", "exact", activation="gelu_tanh")
    return variants


def list_pool_variants(embedder: Embedder, width: int, dim: int | None = None) -> list[PoolVariant]:
    """Return every combination of poolings, pooled tokens and projections that gives vectors of at least `width` dimensions.

    The first one is the model's own, unless its vectors are shorter.

    Args:
        embedder: The model.
        width: Width of the server's vectors.
        dim: Width that was requested from the server. Default: the model's.
    """
    spec, transformer_width = embedder.spec, embedder.model.transformer.width
    variants = []
    poolings = dict.fromkeys([spec.pooling, *SERVER_POOLINGS])
    projections = dict.fromkeys([spec.projection, 0])
    choices = itertools.product(projections, (spec.include_instruction, not spec.include_instruction), poolings)
    for projection, include_instruction, pooling in choices:
        if (full_width := projection or transformer_width) < width:
            continue
        changes = []
        if pooling != spec.pooling:
            changes.append(Change("pooling", pooling, spec.pooling))
        if include_instruction != spec.include_instruction:
            changes.append(Change("instruction", *_order_words(["pooled", "not pooled"], include_instruction)))
        if projection != spec.projection:
            changes.append(Change("projection", "none", f"to {spec.projection} dimensions"))
        if width != (dim or full_width):
            changes.append(Change("width", f"the first {width} dimensions", f"{dim or full_width}"))
        choice = {"pooling": pooling, "include_instruction": include_instruction, "projection": projection}
        variants.append(PoolVariant(tuple(changes), spec.replace(**choice)))
    return variants


def _order_words(words: list[str], is_first_served: bool) -> list[str]:
    """Return two words in the order (served, expected)."""
    return words if is_first_served else words[::-1]


def list_token_variants(embedder: Embedder) -> list[TokenVariant]:
    """Return the unchanged tokenization of a model, and variants with other special tokens, prompts and characters."""
    unchanged = TokenVariant((), embedder.tokenizer)
    return [unchanged, *_iter_special_token_variants(unchanged), *_iter_text_variants(unchanged, embedder.spec)]


def _iter_special_token_variants(unchanged: TokenVariant) -> Iterator[TokenVariant]:
    """Yield variants in which BOS or EOS is missing or added once more, in every combination."""
    tokenizer, spec = unchanged.tokenizer.hf_tokenizer, unchanged.tokenizer.spec
    bos, eos = find_start_token(tokenizer), find_end_token(tokenizer)
    own_counts = int(starts_with_bos(tokenizer)), int(ends_with_eos(tokenizer))
    counts_by_token = [
        [own_count, *({0, 1, own_count + 1} - {own_count})] if token is not None else [0]
        for token, own_count in zip((bos, eos), own_counts, strict=True)
    ]
    for counts in itertools.product(*counts_by_token):
        if counts == own_counts:
            continue
        changes = tuple(
            Change(name, COUNT_NAMES[count], COUNT_NAMES[own_count])
            for name, count, own_count in zip(("BOS", "EOS"), counts, own_counts, strict=True)
            if count != own_count
        )
        changed_tokenizer = copy.deepcopy(tokenizer)
        first, last = ([token] * count if token else [] for token, count in zip((bos, eos), counts, strict=True))
        set_special_tokens(changed_tokenizer, first, last)
        yield TokenVariant(changes, TextTokenizer(changed_tokenizer, spec))


def _iter_text_variants(unchanged: TokenVariant, spec: EmbeddingSpec) -> Iterator[TokenVariant]:
    """Yield other prompts, and other characters of prompt and text."""
    named_prompts = {prompt: name for name, prompt in reversed(spec.prompts.items()) if prompt}
    if spec.plain_prompt:
        named_prompts.setdefault(spec.plain_prompt, "plain texts")

    def vary(setting: str, served: str, expected: str, rewrite: Rewrite) -> TokenVariant:
        return TokenVariant((Change(setting, served, expected),), unchanged.tokenizer, rewrite)

    yield vary("prompt", "none", "the one that is sent", lambda _, text: ("", text))
    for added_prompt, name in list(named_prompts.items())[:MAX_ADDED_PROMPTS]:
        yield vary(
            "prompt",
            f"the stored prompt {name!r} before the one that is sent",
            "only the one that is sent",
            partial(_add_prompt, added_prompt),
        )
    yield vary("line breaks", "spaces", "line breaks", lambda p, t: (p.replace("\n", " "), t.replace("\n", " ")))
    yield vary("letters", "lowercase", "as they are sent", lambda prompt, text: (prompt.lower(), text.lower()))


def _add_prompt(added_prompt: str, prompt: str, text: str) -> tuple[str, str]:
    return added_prompt + prompt, text


def iter_truncation_variants(
    tokens: TokenVariant, longest_input: int, max_positions: int, server_lengths: Sequence[int]
) -> Iterator[TokenVariant]:
    """Yield variants of a tokenization that truncate at another length, cut off EOS, truncate at the start, or do not truncate.

    Args:
        tokens: The tokenization to vary.
        longest_input: Tokens of the longest input.
        max_positions: Longest input of the transformer in tokens.
        server_lengths: Limits that the server reports.
    """
    tokenizer, spec = tokens.tokenizer.hf_tokenizer, tokens.tokenizer.spec
    own_length, special_tokens, has_eos = spec.max_length, tokenizer.num_special_tokens_to_add(), ends_with_eos(tokenizer)
    # The lengths to try. Servers may count special tokens differently, so limits are tried with small offsets.
    near_lengths = [length + offset for length in (own_length, *server_lengths) for offset in (0, -1, 1, -2, 2)]
    common = [length for length in COMMON_LENGTHS if length <= MAX_LENGTH_RATIO * own_length]
    lengths = [n for n in dict.fromkeys([*near_lengths, *common]) if special_tokens < n <= max_positions and n < longest_input]
    without_eos = copy.deepcopy(tokenizer)
    drop_eos(without_eos)

    def vary(served: str, changed_tokenizer: TextTokenizer) -> TokenVariant:
        change = Change("truncation", served, f"to the first {own_length} tokens" + ", EOS included" * has_eos)
        return TokenVariant((*tokens.changes, change), changed_tokenizer, tokens.rewrite)

    for length in lengths:
        at_length = spec.replace(max_length=length)
        if length != own_length:
            yield vary(f"to the first {length} tokens", TextTokenizer(tokenizer, at_length))
        if length in near_lengths:
            yield vary(f"to the last {length} tokens", LastTokensTokenizer(tokenizer, at_length))
        if length in near_lengths and starts_with_bos(tokenizer):
            yield vary(f"to BOS and the last {length - 1} tokens", LastTextTokensTokenizer(tokenizer, at_length))
        if length in near_lengths and has_eos:
            changed_tokenizer = TextTokenizer(without_eos, at_length.replace(eos_as_text=True))
            yield vary(f"to the first {length} tokens, EOS cut off", changed_tokenizer)
    if own_length < longest_input <= max_positions:
        yield vary("none", TextTokenizer(tokenizer, spec.replace(max_length=longest_input)))
