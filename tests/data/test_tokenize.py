"""From texts to tokens: EOS, truncation, and where pooling starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.base.modules.transformer import Transformer
from tokenizers import processors
from transformers import AutoTokenizer

from helpers import tiny
from jaxembed.data.tokenize import TextTokenizer, append_eos, ends_with_eos, load_tokenizer
from jaxembed.errors import UserError

Folder = Callable[[str], Path]
BOS, EOS = 0, 1
TEXTS = [*tiny.TEXTS, "", " ", "\n", "x" * 200, "e\u0301 \u2028 \x00 👩\u200d💻", "</s> <pad>"]
PROMPTS = ["query:", "query: ", "Instruct: find the café\nQuery:", "Instruct: x\nQuery: ", "", " ", "a", "数学", "ends</s>"]


def tokenizer(bos: bool, eos: bool = True) -> Any:
    made = tiny.tokenizer(bos)
    if eos:
        append_eos(made)
    return made


@pytest.mark.parametrize("bos", [False, True])
def test_eos_is_appended_once(bos: bool) -> None:
    made = tokenizer(bos)
    assert ends_with_eos(made)
    append_eos(made)
    plain = tiny.tokenizer(bos=False)
    for text, ids in zip(TEXTS, TextTokenizer(made, 512)(TEXTS, [""] * len(TEXTS)).ids, strict=True):
        assert ids.tolist() == [BOS] * bos + plain(text)["input_ids"] + [EOS]


def test_a_tokenizer_that_ends_texts_with_eos_is_left_as_it_is() -> None:
    made = tiny.tokenizer()
    own = processors.TemplateProcessing(single="<s> <pad> $A </s>", special_tokens=[("<s>", 0), ("<pad>", 2), ("</s>", 1)])
    made.backend_tokenizer.post_processor = own
    before = made("short")["input_ids"]
    append_eos(made)
    assert made("short")["input_ids"] == before == [0, 2, *tiny.tokenizer()("short")["input_ids"], 1]


def test_without_eos_an_empty_text_has_no_tokens() -> None:
    made = tokenizer(bos=False, eos=False)
    assert not ends_with_eos(made)
    assert [ids.tolist() for ids in TextTokenizer(made, 8)(["", "a"], ["", ""]).ids] == [[], made("a")["input_ids"]]


def test_long_texts_come_in_pieces_that_are_not_truncated() -> None:
    made = TextTokenizer(tokenizer(bos=True), 16)
    texts = [*TEXTS, "naïve café 数学 🙂 " * 30, "word " * 100]
    for prompt in ("", "query: "):
        for text, pieces in zip(texts, made.pieces(texts, prompt), strict=True):
            assert "".join(pieces) == text
            assert (made.untruncated_lengths(pieces, [prompt] * len(pieces)) <= 16).all()
            assert len(pieces) == 1 or made.untruncated_lengths([text], [prompt])[0] > 16
    with pytest.raises(UserError, match="a prompt of 300 characters fills the 16 tokens"):
        made.pieces(["x" * 50], "prompt" * 50)


ECHO = "Say: {text}\nAgain: {text}"


@pytest.mark.parametrize("prompt", ["", "Instruct: find\nQuery: "])
def test_an_echo_cuts_both_copies_alike_and_pools_the_second(prompt: str) -> None:
    made = tokenizer(bos=True)
    limit = 64
    echoed = TextTokenizer(made, limit, echo=ECHO)
    texts = [*TEXTS[:4], "", "the quick brown fox " * 40, "naïve café 数学 🙂 " * 30]
    out = echoed(texts, [prompt] * len(texts))
    for text, ids, start in zip(texts, out.ids, out.pool_from, strict=True):
        assert len(ids) <= limit
        assert (ids[0], ids[-1]) == (BOS, EOS)
        first, second = made.decode(ids[1:-1]).removeprefix(f"{prompt}Say: ").rsplit("\nAgain: ", 1)
        assert first == second
        assert text.startswith(second.rstrip("\ufffd"))
        assert second == text or len(ids) > limit - 12
        assert made.decode(ids[start:-1]).strip() == second.strip()


def test_eos_without_a_token_for_it_is_refused() -> None:
    made = tiny.tokenizer()
    made.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token; set model.append_eos=false"):
        append_eos(made)


@pytest.mark.parametrize("bos", [False, True])
def test_truncation_keeps_both_ends(bos: bool) -> None:
    long = tiny.TEXTS[4]
    whole = TextTokenizer(tokenizer(bos), 512)([long], [""]).ids[0].tolist()
    for length in (2 + bos, 7, len(whole) - 1, len(whole), len(whole) + 1):
        cut = TextTokenizer(tokenizer(bos), length)([long], [""]).ids[0].tolist()
        assert cut == (whole if length >= len(whole) else [*whole[: length - 1], EOS])


def test_the_prompt_is_joined_before_tokenising() -> None:
    made = TextTokenizer(tokenizer(bos=True), 512)
    joined = made(["guitar"], ["a man is playing a "]).ids[0]
    assert joined.tolist() == made(["a man is playing a guitar"], [""]).ids[0].tolist()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_pooling_starts_where_sentence_transformers_puts_it(tmp_path: Path, bos: bool, eos: bool) -> None:
    tiny.folder(tmp_path, "qwen3")
    made = tokenizer(bos, eos)
    made.save_pretrained(tmp_path)
    for length in (512, 6):
        theirs = Transformer(str(tmp_path), max_seq_length=length)
        ours = TextTokenizer(load_tokenizer(tmp_path), length)
        for prompt in filter(None, PROMPTS):
            assert ours.prompt_lengths([prompt])[0] == theirs._get_prompt_length(prompt), prompt
            ids = ours(TEXTS, [prompt] * len(TEXTS)).ids
            for text, mine in zip(TEXTS, ids, strict=True):
                assert mine.tolist() == theirs.preprocess([text], prompt=prompt)["input_ids"][0].tolist()


def test_pooling_of_each_text_starts_after_its_own_prompt() -> None:
    made = TextTokenizer(tokenizer(bos=True), 512)
    prompts = ["", "query: ", "", "a longer prompt"]
    starts = made(["x"] * 4, prompts).pool_from.tolist()
    assert starts == [made.prompt_lengths([prompt])[0] for prompt in prompts]
    assert starts[0] == starts[2] == 0 < starts[1] < starts[3]


def test_a_batch_tokenises_like_its_texts_alone() -> None:
    made = TextTokenizer(tokenizer(bos=True), 20)
    batch = made(TEXTS, ["p: "] * len(TEXTS)).ids
    assert all((made([text], ["p: "]).ids[0] == ids).all() for text, ids in zip(TEXTS, batch, strict=True))
    assert {ids.dtype.name for ids in batch} == {"int32"}


def test_lengths_before_truncation() -> None:
    made = TextTokenizer(tokenizer(bos=True), 4)
    whole = TextTokenizer(tokenizer(bos=True), 512)(TEXTS, ["p: "] * len(TEXTS)).ids
    assert made.untruncated_lengths(TEXTS, ["p: "] * len(TEXTS)).tolist() == [len(ids) for ids in whole]
    assert max(len(ids) for ids in made(TEXTS, [""] * len(TEXTS)).ids) == 4


def test_the_saved_tokenizer_appends_eos_in_any_library(tmp_path: Path) -> None:
    made = tokenizer(bos=True)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("short")["input_ids"] == [BOS, *tiny.tokenizer()("short")["input_ids"], EOS]


def test_a_chat_template_is_left_out(tmp_path: Path) -> None:
    tiny.tokenizer(chat_template="{{ messages }}").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is not None
    assert load_tokenizer(tmp_path).chat_template is None


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer could be loaded .*; expected tokenizer.json there"):
        load_tokenizer(tmp_path)
