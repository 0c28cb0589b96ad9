"""Masked texts: which tokens are predicted, what the model reads instead of them, and from where they are predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers import tiny
from jaxembed.config import MaskedPredictionConfig, parse_config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.masked_texts import MaskedTextReader, find_mask_token
from jaxembed.data.token_batch import NOT_PREDICTED
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError

BLANK = 65  # "_" in the tokenizer of `tiny`
EOS = 1
TOKENS = np.array([0, *range(100, 198), EOS], np.int32)  # <s> and </s> around 98 tokens


def make_reader(**keys: Any) -> MaskedTextReader:
    hf_tokenizer = tiny.build_tokenizer(bos=True)
    append_eos(hf_tokenizer)
    return MaskedTextReader(MaskedPredictionConfig(**keys), TextTokenizer(hf_tokenizer, EmbeddingSpec()), "objectives.0")


def mask_many(reader: MaskedTextReader, texts: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model reads, and the targets, of many draws of one text: [texts, T] each."""
    masked = [reader.mask(TOKENS, np.random.default_rng(i)) for i in range(texts)]
    return np.stack([text.tokens for text in masked]), np.stack([text.targets for text in masked])


def test_llm2vec_masks_with_a_blank() -> None:
    assert tiny.build_tokenizer().convert_ids_to_tokens(BLANK) == "_"
    assert find_mask_token(None, tiny.build_tokenizer(), "objectives.0") == BLANK
    assert find_mask_token(None, tiny.build_wordpiece_tokenizer(), "objectives.0") == 4  # [MASK]


def test_rates_and_replacements_of_bert() -> None:
    read, targets = mask_many(make_reader(mask_rate=0.2))
    predicted = np.roll(targets, 1, axis=1) != NOT_PREDICTED  # each token is predicted from the one before it
    assert predicted[:, 1:-1].mean() == pytest.approx(0.2, abs=0.01)
    assert not predicted[:, [0, -1]].any()  # special tokens
    assert (np.roll(targets, 1, axis=1)[predicted] == np.broadcast_to(TOKENS, read.shape)[predicted]).all()
    assert (read == TOKENS)[~predicted].all()
    shares = [(read == BLANK)[predicted].mean(), (read == TOKENS)[predicted].mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)  # the other 10% are random


def test_the_rule_that_always_masks() -> None:
    read, targets = mask_many(make_reader(mask_rate=0.8, mask_rule="all"))
    predicted = np.roll(targets, 1, axis=1) != NOT_PREDICTED
    assert predicted[:, 1:-1].mean() == pytest.approx(0.8, abs=0.01)
    assert (read[predicted] == BLANK).all()


def test_tokens_predicted_from_their_own_state() -> None:
    _, targets = mask_many(make_reader(mask_rate=1.0, predict_from="same"), texts=1)
    assert targets[0].tolist() == [NOT_PREDICTED, *TOKENS[1:-1], NOT_PREDICTED]


def test_masked_diffusion_draws_a_rate_and_weights_with_its_inverse() -> None:
    reader = make_reader(mask_rate=0.01, max_mask_rate=1.0, mask_rule="all", token_weight="inverse_rate")
    masked = [reader.mask(TOKENS, np.random.default_rng(i)) for i in range(400)]
    shares = np.array([np.mean(text.targets != NOT_PREDICTED) for text in masked])
    assert shares.std() > 0.25  # a uniform distribution has 0.29
    assert {text.size for text in masked} == {98.0}
    # The weighted number of predictions has the number of tokens as its mean: the bound is unbiased.
    weighted = [text.weight * np.sum(text.targets != NOT_PREDICTED) for text in masked]
    assert np.mean(weighted) == pytest.approx(98, rel=0.05)


def test_draws_depend_only_on_the_generator() -> None:
    reader = make_reader()
    first, again, other = (reader.mask(TOKENS, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.tokens == again.tokens).all() and (first.targets != other.targets).any()


def test_a_mask_token_that_the_tokenizer_lacks() -> None:
    message = r"objectives.0.mask_token: is '\[MASK\]', which is not a token of the base's tokenizer \(expected one of"
    with pytest.raises(UserError, match=message):
        make_reader(mask_token="[MASK]")


def test_rates_in_the_wrong_order() -> None:
    objective = {"name": "mntp", "mask_rate": 0.5, "max_mask_rate": 0.2}
    tree = {"model": {"base": "b"}, "data": {"sources": [{"path": "p"}]}, "objectives": [objective]}
    with pytest.raises(UserError, match=r"objectives.0: max_mask_rate is 0.2, less than mask_rate, 0.5. Swap them."):
        parse_config(tree, "config")
