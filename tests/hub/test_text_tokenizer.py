"""Tokenizers that do not fit the weights are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from helpers import tiny
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.hub.text_tokenizer import build_text_tokenizer

BASE: Any = SimpleNamespace(name="m", transformer=SimpleNamespace(vocab_size=290, max_positions=64))


def test_a_token_id_beyond_the_embedding_is_refused() -> None:
    fitting = tiny.build_tokenizer()
    assert build_text_tokenizer(fitting, EmbeddingSpec(max_length=32, append_eos=False), BASE)
    # The same number of entries, but one id is beyond them.
    state = json.loads(fitting.backend_tokenizer.to_str())
    token, _ = max(state["model"]["vocab"].items(), key=lambda entry: entry[1])
    state["model"]["vocab"][token] = 290
    gapped = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert len(gapped) == 290
    with pytest.raises(UserError, match=r"m: the tokenizer does not fit .* with the id 290; the embedding has 290\)\. Use"):
        build_text_tokenizer(gapped, EmbeddingSpec(max_length=32, append_eos=False), BASE)
