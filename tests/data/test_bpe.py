"""The tokenizer: its pieces, its round trip, and that Hugging Face loads back the same one."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxembed.data.bpe import PIECE, train_tokenizer, words
from jaxembed.errors import UserError

CODE = "def parse_HTTPHeader(snakeCase_v2=10):\n    return XMLParser.café(größe)\n"
TEXTS = [CODE, "Return the parser of an HTTP header.", "x = parse_header(y)  # parse the header"] * 3
ODD = [
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


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("snake_case", "snake case"),
        ("__camelCase", "camel case"),
        ("PascalCase", "pascal case"),
        ("parseHTTPHeader_v2", "parse http header v 2"),
        ("HTTP", "http"),
        ("nDCG10at", "n dcg 10 at"),
        ("Größe.naïve", "größe naïve"),
    ],
)
def test_words_split_identifiers(identifier: str, expected: str) -> None:
    assert words(identifier) == expected.split()


@pytest.mark.parametrize("text", [*TEXTS[:3], *ODD])
def test_pieces_of_the_tokenizer_hold_the_same_words(text: str) -> None:
    pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(PIECE), "isolated").pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in words(piece)] == words(text)
    assert max([len(words(piece)) for piece in pieces], default=0) <= 1


def test_no_token_crosses_a_border_inside_an_identifier() -> None:
    tokens = train_tokenizer(["fooBar foo_bar foo2bar FOOBar"] * 100, 500).get_vocab()
    assert {"foo", "Ġfoo", "Bar", "FOO", "bar"} - set(tokens) == {"FOO"}  # " FOO" stands after a space
    assert not [token for token in tokens if len(words(token.lstrip("Ġ"))) > 1 and token.isascii() and "|" not in token]


@pytest.mark.parametrize("text", [*TEXTS[:3], *ODD])
def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_deterministic_and_keeps_to_its_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()
    assert len(train_tokenizer(TEXTS, 300)) == 300
    with pytest.raises(UserError, match="vocab_size is 100"):
        train_tokenizer(TEXTS, 100)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer("parse")["input_ids"] == tokenizer("parse", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("model_type", [None, "mistral", "llama", "qwen3"])
def test_auto_tokenizer_loads_the_same_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None) -> None:
    save(tokenizer, tmp_path, model_type)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS + ODD] == [tokenizer(text)["input_ids"] for text in TEXTS + ODD]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_beside_a_qwen2_config_only_the_generic_class_loads_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save(tokenizer, tmp_path, "qwen2")
    expected = tokenizer(CODE)["input_ids"]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(CODE)["input_ids"] == expected


def save(tokenizer: PreTrainedTokenizerFast, folder: Path, model_type: str | None) -> None:
    tokenizer.save_pretrained(folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
