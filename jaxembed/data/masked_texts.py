"""Texts with masked tokens: masked next-token prediction (LLM2Vec) and masked diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.config import MaskedPredictionConfig
from jaxembed.data.schema import Row
from jaxembed.data.token_batch import NOT_PREDICTED, TokenText
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError

# The rule of BERT (Devlin et al. 2018, section 3.1): of the predicted tokens, the share that is masked, and the share that is
# masked or replaced.
BERT_MASKED_SHARE, BERT_CHANGED_SHARE = 0.8, 0.9


class MaskedTextReader:
    """Tokenizes texts and masks some of their tokens (BehnamGhader et al. 2024, arXiv:2404.05961, section 2.1).

    Each token that is not special is predicted with the probability `mask_rate`, independently of the others. The first token
    of a text is never predicted from the previous token, because there is none.
    """

    def __init__(self, config: MaskedPredictionConfig, tokenizer: TextTokenizer, key: str):
        """Find the mask token.

        Args:
            config: Rate and rule.
            tokenizer: Tokenizes the texts.
            key: Key of the objective in the config, for errors.

        Raises:
            UserError: The tokenizer has no such token.
        """
        self._config, self._tokenizer = config, tokenizer
        self._mask_id = find_mask_token(config.mask_token, tokenizer.hf_tokenizer, key)
        self._special_ids = np.array([*tokenizer.hf_tokenizer.all_special_ids, self._mask_id])
        self._vocab_size = len(tokenizer.hf_tokenizer)

    def __call__(self, rows: Sequence[Row], rngs: Sequence[np.random.Generator]) -> list[TokenText]:
        """Return the tokens of texts, with masks drawn by a generator for each."""
        ids = self._tokenizer([row["text"] for row in rows], [""] * len(rows)).ids
        return [self.mask(tokens, rng) for tokens, rng in zip(ids, rngs, strict=True)]

    def mask(self, tokens: np.ndarray, rng: np.random.Generator) -> TokenText:
        """Mask the tokens of one text, int32 [T]."""
        config = self._config
        # Choose the tokens to predict.
        rate = config.mask_rate if config.max_mask_rate is None else rng.uniform(config.mask_rate, config.max_mask_rate)
        can_be_predicted = ~np.isin(tokens, self._special_ids)
        if config.predict_from == "previous":
            can_be_predicted[:1] = False
        is_predicted = can_be_predicted & (rng.random(len(tokens)) < rate)
        # Mask or replace them in the input.
        draws, random_ids = rng.random(len(tokens)), rng.integers(self._vocab_size, size=len(tokens))
        mask_share, change_share = (1.0, 1.0) if config.mask_rule == "all" else (BERT_MASKED_SHARE, BERT_CHANGED_SHARE)
        inputs = np.where(is_predicted & (draws < change_share), random_ids, tokens)
        inputs = np.where(is_predicted & (draws < mask_share), self._mask_id, inputs).astype(np.int32)
        # Assign each one to the hidden state that predicts it.
        targets = np.where(is_predicted, tokens, NOT_PREDICTED).astype(np.int32)
        if config.predict_from == "previous":
            targets = np.append(targets[1:], np.int32(NOT_PREDICTED)).astype(np.int32)
        if config.token_weight == "inverse_rate":
            return TokenText(inputs, targets, weight=1 / rate, size=float(can_be_predicted.sum()))
        return TokenText(inputs, targets, size=float(is_predicted.sum()))


def find_mask_token(name: str | None, hf_tokenizer: Any, key: str) -> int:
    """Return the id of the token that replaces masked tokens.

    Args:
        name: The token, or None: the tokenizer's mask token, otherwise "_", otherwise its unknown token.
        hf_tokenizer: Fast Hugging Face tokenizer.
        key: Key of the objective in the config, for errors.

    Raises:
        UserError: The tokenizer has no such token.
    """
    vocabulary = hf_tokenizer.get_vocab()
    names = [name] if name is not None else [hf_tokenizer.mask_token, "_", hf_tokenizer.unk_token]
    mask_token = next((token for token in names if token in vocabulary), None)
    if mask_token is None:
        problem = "the base's tokenizer has no mask token, no '_' and no unknown token" if name is None else (
            f"is {name!r}, which is not a token of the base's tokenizer"
        )  # fmt: skip
        raise UserError(f"{key}.mask_token: {problem} (expected one of its tokens, such as '_'). Name another token.")
    return int(vocabulary[mask_token])
