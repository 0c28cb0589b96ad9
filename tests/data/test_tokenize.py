"""Tokenization: EOS, truncation, and where pooling starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.base.modules.transformer import Transformer
from tokenizers import processors
from transformers import AutoTokenizer

from helpers import tiny
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import TextTokenizer, append_eos, ends_with_eos, load_tokenizer
from jaxembed.errors import UserError

Folder = Callable[[str], Path]
BOS, EOS = 0, 1
TEXTS = [*tiny.TEXTS, "", " ", "\n", "x" * 200, "e\u0301 \u2028 \x00 👩\u200d💻", "</s> <pad>"]
PROMPTS = ["query:", "query: ", "Instruct: find the café\nQuery:", "Instruct: x\nQuery: ", "", " ", "a", "数学", "ends</s>"]


def make_hf_tokenizer(bos: bool, eos: bool = True) -> Any:
    hf_tokenizer = tiny.build_tokenizer(bos)
    if eos:
        append_eos(hf_tokenizer)
    return hf_tokenizer


def make_tokenizer(max_length: int, *, bos: bool = True, **options: Any) -> TextTokenizer:
    """Make a tokenizer with EOS; options are fields of the spec."""
    return TextTokenizer(make_hf_tokenizer(bos), EmbeddingSpec(max_length=max_length, **options))


@pytest.mark.parametrize("bos", [False, True])
def test_eos_is_appended_once(bos: bool) -> None:
    hf_tokenizer = make_hf_tokenizer(bos)
    assert ends_with_eos(hf_tokenizer)
    append_eos(hf_tokenizer)
    plain = tiny.build_tokenizer(bos=False)
    tokenized = TextTokenizer(hf_tokenizer, EmbeddingSpec())(TEXTS, [""] * len(TEXTS))
    for text, ids in zip(TEXTS, tokenized.ids, strict=True):
        assert ids.tolist() == [BOS] * bos + plain(text)["input_ids"] + [EOS]


def test_tokenizer_that_ends_texts_with_eos_stays_unchanged() -> None:
    hf_tokenizer = tiny.build_tokenizer()
    own = processors.TemplateProcessing(single="<s> <pad> $A </s>", special_tokens=[("<s>", 0), ("<pad>", 2), ("</s>", 1)])
    hf_tokenizer.backend_tokenizer.post_processor = own
    before = hf_tokenizer("short")["input_ids"]
    append_eos(hf_tokenizer)
    assert hf_tokenizer("short")["input_ids"] == before == [0, 2, *tiny.build_tokenizer()("short")["input_ids"], 1]


def test_empty_text_without_eos_has_no_tokens() -> None:
    hf_tokenizer = make_hf_tokenizer(bos=False, eos=False)
    assert not ends_with_eos(hf_tokenizer)
    tokenized = TextTokenizer(hf_tokenizer, EmbeddingSpec(max_length=8))(["", "a"], ["", ""])
    assert [ids.tolist() for ids in tokenized.ids] == [[], hf_tokenizer("a")["input_ids"]]


def test_split_texts_gives_pieces_that_are_not_truncated() -> None:
    tokenizer = make_tokenizer(16)
    texts = [*TEXTS, "naïve café 数学 🙂 " * 30, "word " * 100]
    for prompt in ("", "query: "):
        for text, pieces in zip(texts, tokenizer.split_texts(texts, prompt), strict=True):
            assert "".join(pieces) == text
            assert (tokenizer.count_untruncated_tokens(pieces, [prompt] * len(pieces)) <= 16).all()
            assert len(pieces) == 1 or tokenizer.count_untruncated_tokens([text], [prompt])[0] > 16
    with pytest.raises(UserError, match="prompt: 300 characters fill the 16 tokens"):
        tokenizer.split_texts(["x" * 50], "prompt" * 50)


ECHO = "Say: {text}\nAgain: {text}"


@pytest.mark.parametrize("prompt", ["", "Instruct: find\nQuery: "])
def test_echo_truncates_both_copies_alike_and_pools_the_second(prompt: str) -> None:
    limit = 64
    tokenizer = make_tokenizer(limit, echo=ECHO)
    decode = tokenizer.hf_tokenizer.decode
    texts = [*TEXTS[:4], "", "the quick brown fox " * 40, "naïve café 数学 🙂 " * 30]
    tokenized = tokenizer(texts, [prompt] * len(texts))
    for text, ids, start in zip(texts, tokenized.ids, tokenized.pool_start, strict=True):
        assert len(ids) <= limit
        assert (ids[0], ids[-1]) == (BOS, EOS)
        first, second = decode(ids[1:-1]).removeprefix(f"{prompt}Say: ").rsplit("\nAgain: ", 1)
        assert first == second
        assert text.startswith(second.rstrip("\ufffd"))
        assert second == text or len(ids) > limit - 12
        assert decode(ids[start:-1]).strip() == second.strip()


def test_append_eos_without_an_eos_token_is_refused() -> None:
    hf_tokenizer = tiny.build_tokenizer()
    hf_tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token\. Set model\.append_eos=false"):
        append_eos(hf_tokenizer)


@pytest.mark.parametrize("bos", [False, True])
def test_truncation_keeps_both_ends(bos: bool) -> None:
    long = tiny.TEXTS[4]
    whole = make_tokenizer(512, bos=bos)([long], [""]).ids[0].tolist()
    for length in (2 + bos, 7, len(whole) - 1, len(whole), len(whole) + 1):
        truncated = make_tokenizer(length, bos=bos)([long], [""]).ids[0].tolist()
        assert truncated == (whole if length >= len(whole) else [*whole[: length - 1], EOS])


def test_a_prompt_that_leaves_no_room_for_texts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(12)
    tokenizer(tiny.TEXTS, ["a: "] * len(tiny.TEXTS))
    assert not caplog.messages
    inputs = tokenizer(tiny.TEXTS, ["Given a question, retrieve "] * len(tiny.TEXTS)).ids
    assert len({tuple(ids.tolist()) for ids in inputs}) == 1
    assert caplog.messages == [
        "prompt 'Given a question, retrieve ': fills the 12 tokens that the model reads, so texts under it are not read. "
        "Shorten the prompt, or raise the maximum length."
    ]


def test_prompt_is_joined_before_tokenization() -> None:
    tokenizer = make_tokenizer(512)
    joined = tokenizer(["guitar"], ["a man is playing a "]).ids[0]
    assert joined.tolist() == tokenizer(["a man is playing a guitar"], [""]).ids[0].tolist()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_pooling_starts_where_sentence_transformers_puts_it(tmp_path: Path, bos: bool, eos: bool) -> None:
    tiny.write_folder(tmp_path, "qwen3")
    make_hf_tokenizer(bos, eos).save_pretrained(tmp_path)
    for length in (512, 6):
        theirs = Transformer(str(tmp_path), max_seq_length=length)
        ours = TextTokenizer(load_tokenizer(tmp_path), EmbeddingSpec(max_length=length))
        for prompt in filter(None, PROMPTS):
            assert ours.count_prompt_tokens([prompt])[0] == theirs._get_prompt_length(prompt), prompt
            tokenized = ours(TEXTS, [prompt] * len(TEXTS))
            for text, ids in zip(TEXTS, tokenized.ids, strict=True):
                assert ids.tolist() == theirs.preprocess([text], prompt=prompt)["input_ids"][0].tolist()


def test_pooling_of_each_text_starts_after_its_own_prompt() -> None:
    tokenizer = make_tokenizer(512)
    prompts = ["", "query: ", "", "a longer prompt"]
    starts = tokenizer(["x"] * 4, prompts).pool_start.tolist()
    assert starts == [tokenizer.count_prompt_tokens([prompt])[0] for prompt in prompts]
    assert starts[0] == starts[2] == 0 < starts[1] < starts[3]


def test_batch_is_tokenized_like_its_texts_alone() -> None:
    tokenizer = make_tokenizer(20)
    batch = tokenizer(TEXTS, ["p: "] * len(TEXTS)).ids
    assert all((tokenizer([text], ["p: "]).ids[0] == ids).all() for text, ids in zip(TEXTS, batch, strict=True))
    assert {ids.dtype.name for ids in batch} == {"int32"}


def test_untruncated_tokens_are_those_of_a_longer_limit() -> None:
    tokenizer = make_tokenizer(4)
    whole = make_tokenizer(512)(TEXTS, ["p: "] * len(TEXTS)).ids
    assert tokenizer.count_untruncated_tokens(TEXTS, ["p: "] * len(TEXTS)).tolist() == [len(ids) for ids in whole]
    assert max(len(ids) for ids in tokenizer(TEXTS, [""] * len(TEXTS)).ids) == 4


def test_saved_tokenizer_appends_eos_in_other_libraries(tmp_path: Path) -> None:
    make_hf_tokenizer(bos=True).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("short")["input_ids"] == [BOS, *tiny.build_tokenizer()("short")["input_ids"], EOS]


def test_chat_template_is_removed(tmp_path: Path) -> None:
    tiny.build_tokenizer(chat_template="{{ messages }}").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is not None
    assert load_tokenizer(tmp_path).chat_template is None


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load a tokenizer \(.*; expected a tokenizer\.json"):
        load_tokenizer(tmp_path)
