"""Conversations: their rows, how they are written, which tokens are predicted, and what other objectives make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.sources import draw_examples, open_source_file, write_jsonl
from jaxembed.config import CausalLMConfig, parse_config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.chat import check_chat
from jaxembed.data.chat_texts import ChatReader
from jaxembed.data.token_batch import NOT_PREDICTED, TokenText
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError

USER, ANSWER = {"role": "user", "content": "Who plays?"}, {"role": "assistant", "content": " A man plays. "}
CHAT = [
    {"role": "system", "content": "Be kind."},
    USER,
    ANSWER,
    {"role": "user", "content": "What?"},
    {**ANSWER, "content": "é"},
]
WRITTEN = (
    "<s><|system|>\nBe kind.\n<|user|>\nWho plays?\n<|assistant|>\nA man plays.</s>\n<|user|>\nWhat?\n<|assistant|>\né</s>"
)


def make_reader(max_length: int = 128, eos: bool = True, **keys: Any) -> ChatReader:
    hf_tokenizer = tiny.build_tokenizer(bos=True)
    append_eos(hf_tokenizer)  # as for vectors; conversations end with their own EOS
    if not eos:
        hf_tokenizer.eos_token = None
    tokenizer = TextTokenizer(hf_tokenizer, EmbeddingSpec(max_length=max_length))
    return ChatReader(CausalLMConfig(**keys), tokenizer, "objectives.0")


def read(messages: Any, **keys: Any) -> TokenText:
    return make_reader(**keys)([{"messages": messages}], [np.random.default_rng(0)])[0]


def decode(ids: np.ndarray) -> str:
    return str(tiny.build_tokenizer().decode(ids))


def test_answers_and_their_ends_are_predicted() -> None:
    text = read(CHAT)
    assert decode(text.tokens) == WRITTEN
    predicted = text.targets != NOT_PREDICTED
    assert decode(text.targets[predicted]) == "A man plays.</s>é</s>"
    assert (text.targets[predicted] == text.tokens[1:][predicted[:-1]]).all()  # each from the token before it
    assert (text.context, text.weight, text.size) == (0, 1, predicted.sum())


def test_the_labels_are_those_of_gritlm() -> None:
    """Its collator tokenizes the whole text, and masks as many tokens as the prompt has by itself."""
    tokenizer, prompt = tiny.build_tokenizer(), "<s><|user|>\nWho plays?\n<|assistant|>\n"
    ids = tokenizer(f"{prompt}A man plays.</s>", add_special_tokens=False)["input_ids"]
    labels = [-100] * len(tokenizer.tokenize(prompt)) + ids[len(tokenizer.tokenize(prompt)) :]
    text = read([USER, ANSWER])
    assert text.tokens.tolist() == ids
    assert [NOT_PREDICTED if label == -100 else label for label in labels[1:]] == text.targets[:-1].tolist()


def test_a_prefix_lm_predicts_the_last_answer_alone() -> None:
    text = read(CHAT, attention="prefix_lm")
    assert decode(text.tokens[text.context :]) == "é</s>" == decode(text.targets[text.targets != NOT_PREDICTED])


def test_templates_and_ends() -> None:
    keys = {
        "user_template": "[INST] {text} [/INST]", "assistant_template": "{text}", "answer_end": "<end>", "turn_separator": "",
    }  # fmt: skip
    text = read([USER, ANSWER, *CHAT[3:]], **keys)
    assert decode(text.tokens) == "<s>[INST] Who plays? [/INST]A man plays.<end>[INST] What? [/INST]é<end>"
    assert decode(text.targets[text.targets != NOT_PREDICTED]) == "A man plays.<end>é<end>"


def test_long_conversations_are_cut() -> None:
    whole, cut = read(CHAT), read(CHAT, max_length=40)
    assert (cut.tokens == whole.tokens[:40]).all() and (cut.targets[:-1] == whole.targets[:39]).all()
    no_answer = read(CHAT, max_length=10)
    assert no_answer.size == 0 and (no_answer.targets == NOT_PREDICTED).all()
    assert read(CHAT, max_length=10, average="texts").size == 1
    assert read(CHAT, max_length=10, attention="prefix_lm").context == 10


def test_a_prompt_and_its_response_are_a_conversation() -> None:
    row = {"prompt": USER["content"], "response": ANSWER["content"]}
    (text,) = make_reader()([row], [np.random.default_rng(0)])
    assert (text.tokens == read([USER, ANSWER]).tokens).all()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "hello"}, '"messages" is \'hello\' (expected a list of {"role": "user", "content": "..."})'),
        ({"messages": ["hello"]}, "\"messages\" contains 'hello' (expected {"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 has the role null (expected one of system, user, assistant)"),
        ({"messages": [{"role": "user"}]}, "message 1 has the content null (expected a string)"),
        ({"messages": [ANSWER, USER]}, '"messages" has no answer (expected a message of the user, then one of the assistant)'),
        ({"prompt": "p"}, '"response" is missing (expected a non-empty string)'),
    ],
)
def test_bad_rows(row: Any, problem: str) -> None:
    assert str(check_chat(row)).startswith(problem)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"^objectives\.0\.answer_end: the base's tokenizer has no EOS .* Set answer_end\."):
        make_reader(eos=False)
    assert make_reader(eos=False, answer_end="x") is not None
    for key, template in (("user_template", "no place"), ("assistant_template", "{text} after")):
        tree = {
            "model": {"base": "b"},
            "objectives": [{"name": "causal_lm", key: template}],
            "data": {"sources": [{"path": "p"}]},
        }
        with pytest.raises(UserError, match=f"{key}: is '{template}' \\(expected a template with {{text}}"):
            parse_config(tree, "test")


def test_sources_find_their_format_filter_rows_and_make_pairs(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": [USER, {**ANSWER, "content": "x" * 99}]}]
    source = open_source_file(write_jsonl(tmp_path / "chats.jsonl", rows), max_chars=50)
    assert (source.format, len(source), source.row_count) == ("chat", 1, 2)
    assert source.read_row(0) == rows[0]
    (example,) = draw_examples(source, 0, 0, count=1)
    assert (example.query, example.positive) == ("Who plays?", " A man plays. ")
    assert list(source.iter_pairs()) == [{"query": "Who plays?", "pos": [" A man plays. "]}]
