"""Build the tokenizer of a model out of its base's tokenizer and its spec."""

from __future__ import annotations

from typing import Any

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError
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
    if len(hf_tokenizer) > base.decoder.vocab_size:
        raise UserError(
            f"{base.name}: the tokenizer does not fit the weights ({len(hf_tokenizer)} entries; the embedding has "
            f"{base.decoder.vocab_size}). Use the tokenizer that belongs to the weights."
        )
    if spec.max_length > base.decoder.max_positions:
        raise UserError(
            f"data.max_length: {spec.max_length} is too long ({base.name} has {base.decoder.max_positions} positions). "
            "Lower it."
        )
    if spec.append_eos:
        append_eos(hf_tokenizer)
    if spec.eos_as_text and hf_tokenizer.eos_token is None:
        raise UserError(f"{base.name}: the tokenizer has no EOS token, but the spec ends texts with one (eos_as_text).")
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
