"""Build the tokenizer of a model from its base's tokenizer and its spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxembed.config.fields import quote_value
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError
from jaxembed.files import SURROGATE
from jaxembed.hub.base import Base


def build_text_tokenizer(hf_tokenizer: Any, spec: EmbeddingSpec, base: Base) -> TextTokenizer:
    """Return the tokenizer of a model.

    Args:
        hf_tokenizer: Fast Hugging Face tokenizer. If the spec wants EOS, its post-processor is changed to append it.
        spec: How texts become tokens.
        base: The base, whose vocabulary and positions limit the tokens.

    Raises:
        UserError: The tokenizer or the spec does not fit the base.
    """
    # The ids may have gaps, so the largest one counts, not their number.
    token, largest_id = max(hf_tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if largest_id >= base.transformer.vocab_size:
        raise UserError(
            f"{base.name}: the tokenizer does not fit the weights ({len(hf_tokenizer)} entries, {token!r} with the id "
            f"{largest_id}; the embedding has {base.transformer.vocab_size}). Use the tokenizer that belongs to the weights."
        )
    if spec.max_length > base.transformer.max_positions:
        raise UserError(
            f"data.max_length: {spec.max_length} is too long ({base.name} has {base.transformer.max_positions} positions). "
            "Lower it."
        )
    if spec.append_eos:
        append_eos(hf_tokenizer)
    if spec.eos_as_text and hf_tokenizer.eos_token is None:
        raise UserError(
            f"{base.name}: the tokenizer has no EOS token, but the spec ends texts with one (eos_as_text). Use another base."
        )
    special_tokens = hf_tokenizer.num_special_tokens_to_add()
    if spec.max_length <= special_tokens:
        raise UserError(
            f"data.max_length: {spec.max_length} leaves no room for a text ({special_tokens} are special tokens). Raise it."
        )
    if spec.echo and spec.include_instruction:
        raise UserError(
            "model.echo: only the second copy of a text is pooled, not the instruction. "
            "Set model.pooling.include_instruction=false."
        )
    return TextTokenizer(hf_tokenizer, spec)


def check_texts(texts: Any) -> None:
    """Check that the argument of `encode` is a sequence of strings.

    Raises:
        TypeError: The message names the first wrong item and its index.
    """
    expected = "expected a list of strings"
    if isinstance(texts, str | bytes):
        raise TypeError(f"encode: texts is a single {type(texts).__name__}; {expected}")
    if hasattr(texts, "columns") or isinstance(texts, Mapping | set | frozenset):
        raise TypeError(f"encode: texts is a {type(texts).__name__}; {expected}, such as one of its columns as a list")
    if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise TypeError(f"encode: texts is a {type(texts).__name__}; {expected}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"encode: texts[{index}] is {quote_value(text)} ({type(text).__name__}); expected a string")
        if not text.isascii() and SURROGATE.search(text):
            raise TypeError(f"encode: texts[{index}] is {quote_value(text)}, with a lone surrogate; expected Unicode text")
