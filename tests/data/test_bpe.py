"""The trained BPE tokenizer: its pre-tokens, its round trip, and that Hugging Face loads the same one."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxembed.data.bpe import PRETOKEN_PATTERN, WORD_PATTERN, train_tokenizer
from jaxembed.errors import UserError

CODE = "def parse_HTTPHeader(snakeCase_v2=10):\n    return XMLParser.café(größe)\n"
TEXTS = [CODE, "Return the parser of an HTTP header.", "x = parse_header(y)  # parse the header"] * 3
ODD_TEXTS = [
    "",
    " ",
    "\n\n\t x  ",
    "__init__",
    "你好 ünï e\u0301 👩\u200d💻 \u2028 \x00\x7f",
    "<|endoftext|>a<|pad|>",
    "don't 3.14 ,.;",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


def list_words(text: str) -> list[str]:
    return re.findall(WORD_PATTERN, text)


@pytest.mark.parametrize("text", [*TEXTS[:3], *ODD_TEXTS])
def test_each_pretoken_holds_at_most_one_word(text: str) -> None:
    split = pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), "isolated")
    pretokens = [pretoken for pretoken, _ in split.pre_tokenize_str(text)]
    assert "".join(pretokens) == text
    assert [word for pretoken in pretokens for word in list_words(pretoken)] == list_words(text)
    assert max([len(list_words(pretoken)) for pretoken in pretokens], default=0) <= 1


def test_no_token_crosses_a_word_boundary_inside_an_identifier() -> None:
    tokens = train_tokenizer(["fooBar foo_bar foo2bar FOOBar"] * 100, 500).get_vocab()
    assert {"foo", "Ġfoo", "Bar", "FOO", "bar"} - set(tokens) == {"FOO"}  # only " FOO" occurs, with its space
    plain = [token.lstrip("Ġ") for token in tokens if "|" not in token]
    assert not [token for token in plain if token.isascii() and len(list_words(token)) > 1]


@pytest.mark.parametrize("text", [*TEXTS[:3], *ODD_TEXTS])
def test_decoding_restores_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_deterministic_and_limits_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()
    assert len(train_tokenizer(TEXTS, 300)) == 300
    with pytest.raises(UserError, match=r"vocab_size: 100 is too small \(expected at least 258"):
        train_tokenizer(TEXTS, 100)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer("parse")["input_ids"] == tokenizer("parse", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("model_type", [None, "mistral", "llama", "qwen3"])
def test_auto_tokenizer_gives_the_same_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None) -> None:
    save_with_config(tokenizer, tmp_path, model_type)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS + ODD_TEXTS] == [
        tokenizer(text)["input_ids"] for text in TEXTS + ODD_TEXTS
    ]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_generic_class_gives_the_same_ids_beside_a_qwen2_config(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_with_config(tokenizer, tmp_path, "qwen2")
    expected = tokenizer(CODE)["input_ids"]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(CODE)["input_ids"] == expected


def save_with_config(tokenizer: PreTrainedTokenizerFast, folder: Path, model_type: str | None) -> None:
    tokenizer.save_pretrained(folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
