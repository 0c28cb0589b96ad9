"""In-context examples before a query, and the suffix after it: strings, tokens, draws, vectors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.runs import make_config, write_base_and_data
from helpers.sources import draw_examples, open_source_file, write_jsonl
from jaxembed import Embedder, cli, encode
from jaxembed.config.spec import EmbeddingSpec, FewShotExample
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.devices.mesh import make_all_shards
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.spec_files import parse_spec, write_spec
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

# The prompts of bge-en-icl (Li et al. 2024).
ICL = EmbeddingSpec(
    attention="causal",
    pooling="last",
    max_length=300,
    instruction_template="<instruct>{instruction}\n<query>",
    query_suffix="\n<response>",
    example_template="<instruct>{instruction}\n<query>{query}\n<response>{response}",
)
TASK = "Find the answer"
PAIRS = [("what is {response}?", "a {query} \\1"), ("naïve café", "数学 🙂")]


def format_query(query: str, examples: Sequence[tuple[str, str]]) -> str:
    """Return the model input for a query, with prompt and suffix, as bge-en-icl formats it."""
    formatted = [f"<instruct>{TASK}\n<query>{question}\n<response>{answer}" for question, answer in examples]
    return "\n\n".join([*formatted, f"<instruct>{TASK}\n<query>{query}\n<response>"])


def test_prompt_equals_that_of_bge_en_icl() -> None:
    examples = [FewShotExample(TASK, *pair) for pair in PAIRS]
    without_example_template = ICL.replace(example_template="")
    for spec in (ICL, without_example_template):
        assert spec.build_prompt(TASK, examples) + "why" + spec.query_suffix == format_query("why", PAIRS)
        assert spec.build_prompt(TASK) + "why" + spec.query_suffix == format_query("why", [])
        assert spec.build_prompt("", examples) == ""
    plain = EmbeddingSpec().build_prompt("b", [FewShotExample("a", "q", "r")])
    assert plain == "Instruct: a\nQuery:q\nResponse:r\n\nInstruct: b\nQuery:"
    with pytest.raises(UserError, match=r"FILE: example_template must contain \{query\} and \{response\}"):
        parse_spec({"example_template": "{query}"}, "FILE")


SUFFIX = " and so?"


def make_tokenizer(max_length: int, **options: Any) -> TextTokenizer:
    """Make a tokenizer with BOS and EOS; options are fields of the spec."""
    hf_tokenizer = tiny.build_tokenizer(bos=True)
    append_eos(hf_tokenizer)
    return TextTokenizer(hf_tokenizer, EmbeddingSpec(max_length=max_length, **options))


@pytest.mark.parametrize("echo", ["", "{text} again: {text}"])
def test_truncation_keeps_the_suffix(echo: str) -> None:
    texts = [*tiny.TEXTS, "", "the quick brown fox " * 40, "naïve café 数学 🙂 " * 30, "x\n" * 90]
    between = (echo or "{text}").split("{text}")[1]
    for limit in (48, 61, 62, 400):
        tokenizer = make_tokenizer(limit, query_suffix=SUFFIX, echo=echo)
        tokenized = tokenizer(texts, ["query:"] * len(texts))
        for text, ids in zip(texts, tokenized.ids, strict=True):
            assert len(ids) <= limit
            assert (ids[0], ids[-1]) == (0, 1)  # BOS and EOS
            whole = tokenizer.hf_tokenizer.decode(ids[1:-1])
            assert whole.startswith("query:") and whole.endswith(SUFFIX)
            truncated = whole.removeprefix("query:").removesuffix(SUFFIX)
            truncated = truncated[: (len(truncated) - len(between)) // 2] if echo else truncated
            assert text.startswith(truncated)
            assert truncated == text or len(ids) > limit - 8
        alone = [tokenizer([text], ["query:"]).ids[0].tolist() for text in texts]
        assert alone == [ids.tolist() for ids in tokenized.ids]
        mixed = tokenizer(["a", "a", *texts], ["", "query:", *[""] * len(texts)])
        assert tokenizer.hf_tokenizer.decode(mixed.ids[0][1:-1]) == (echo or "{text}").replace("{text}", "a")
        if not echo:
            assert tokenized.pool_start.tolist() == [tokenizer.count_prompt_tokens(["query:"])[0]] * len(texts)
            longest = int(tokenizer.count_untruncated_tokens(texts, [""] * len(texts)).max())
            assert max(map(len, mixed.ids)) == min(limit, longest)


def test_prompt_that_fills_everything_is_truncated() -> None:
    tokenizer = make_tokenizer(10, query_suffix=SUFFIX)
    (ids,) = tokenizer(["text"], ["a prompt of many words"]).ids
    assert (len(ids), ids[0], ids[-1]) == (10, 0, 1)
    assert tokenizer.max_text_tokens(["a prompt of many words"])[0] < 1


def test_split_texts_leaves_room_for_the_suffix_of_each_piece() -> None:
    tokenizer = make_tokenizer(40, query_suffix=SUFFIX)
    (pieces,) = tokenizer.split_texts(["the quick brown fox " * 20], "query:")
    assert "".join(pieces) == "the quick brown fox " * 20
    prompts = ["query:"] * len(pieces)
    assert (tokenizer.count_untruncated_tokens(pieces, prompts) <= 40).all()
    assert all(tokenizer.hf_tokenizer.decode(ids).endswith(SUFFIX + "</s>") for ids in tokenizer(pieces, prompts).ids)


def make_source(folder: Path, rows: Sequence[Any], **options: Any) -> Source:
    return open_source_file(write_jsonl(folder / "rows.jsonl", rows), instructions=["find"], **options)


# Every third row has the same query, and every fourth has its own instruction.
ROWS = [
    {"query": "same" if i % 3 == 0 else f"q{i}", "pos": [f"p{i}", f"r{i}"], "neg": [f"n{i}", f"m{i}"]}
    | ({"prompt": f"own {i}"} if i % 4 == 0 else {})
    for i in range(24)
]


@pytest.mark.parametrize("index", [0, 1])
def test_examples_are_drawn_from_other_rows(tmp_path: Path, index: int) -> None:
    source = make_source(tmp_path, ROWS, few_shot={"most": 3, "zero_shot": 0.25})
    drawn = draw_examples(source, index, 1, count=300)
    counts = np.bincount([len(example.few_shot) for example in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0.25, 0.25, 0.25, 0.25], atol=0.08)
    seen = set()
    for example in drawn:
        assert len(set(example.few_shot)) == len(example.few_shot)
        for instruction, query, response in example.few_shot:
            row = ROWS[int(response[1:])]
            assert query == row["query"] != example.query
            assert response in row["pos"]
            assert instruction == row.get("prompt", example.instruction)
            seen.add(response)
    possible = {text for row in ROWS if row["query"] != ROWS[index]["query"] for text in row["pos"]}
    assert seen == possible
    without = draw_examples(make_source(tmp_path, ROWS), index, 1, count=300)
    assert [dataclasses.replace(example, few_shot=()) for example in drawn] == without


def test_few_rows_give_few_examples(tmp_path: Path) -> None:
    three = make_source(tmp_path, ROWS[:3], few_shot={"most": 9, "zero_shot": 0.0})
    assert {len(example.few_shot) for example in draw_examples(three, 1, 1)} == {1, 2}
    one = make_source(tmp_path, ROWS[:1], few_shot={})
    assert {example.few_shot for example in draw_examples(one, 0, 1)} == {()}


def test_examples_leave_the_text_half_of_its_tokens(tmp_path: Path) -> None:
    rows = [{"query": f"q{i} " + "long " * (i % 5), "pos": [f"p{i} " + "word " * (i % 7)]} for i in range(40)]
    source = make_source(tmp_path, rows, few_shot={"most": 4, "zero_shot": 0.1})
    hf_tokenizer = tiny.build_tokenizer(bos=True)
    append_eos(hf_tokenizer)
    tokenizer = TextTokenizer(hf_tokenizer, ICL.replace(max_length=220))
    sampler = BatchSampler(sources=[source], tokenizer=tokenizer, hard_negatives=0, seed=0)
    ids = np.arange(40)
    limited = sampler.sample(3, ids)
    drawn = [source.draw(i, np.random.default_rng((0, 3, i)), 0) for i in range(40)]
    dropped = 0
    for example, whole in zip(limited, drawn, strict=True):
        count = len(example.few_shot)
        assert whole.few_shot[:count] == example.few_shot
        prompts = [ICL.build_prompt("find", whole.few_shot[:number]) for number in (count, count + 1)]
        length, with_next = tokenizer.count_prompt_tokens(prompts)
        assert length <= 110
        # The sampler counts the tokens of each part by itself, which are a few more than those of the whole prompt.
        assert count == len(whole.few_shot) or with_next > 110 - 6
        dropped += len(whole.few_shot) - count
    assert 10 < dropped < sum(len(example.few_shot) for example in drawn) - 10
    texts, prompts = sampler.list_texts(limited)
    assert prompts[::2] == [ICL.build_prompt("find", example.few_shot) for example in limited] and not any(prompts[1::2])
    assert texts[::2] == [example.query for example in limited]
    build = BatchBuilder(sampler=sampler, row_length=440, shards=make_all_shards(1))
    assert np.array_equal(build(3, ids).batch.texts.tokens, build(3, ids).batch.texts.tokens)


class TinyBgeEnIcl:
    """A tiny bge-en-icl: a causal Mistral with last-token pooling. The whole string is between BOS and EOS."""

    def __init__(self) -> None:
        self.transformer, self.tokenizer = tiny.build_torch_model("mistral"), tiny.build_tokenizer(bos=True)

    def encode(self, strings: Sequence[str]) -> np.ndarray:
        vectors = []
        for string in strings:
            ids = [*self.tokenizer(string)["input_ids"], self.tokenizer.eos_token_id]
            with torch.no_grad():
                last = self.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
            vectors.append(torch.nn.functional.normalize(last, dim=0).numpy())
        return np.stack(vectors)


@pytest.fixture(scope="module")
def icl(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder of that model, with our spec, and return its path."""
    folder, base = tmp_path_factory.mktemp("icl"), base_folder("mistral")
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 300}
    (folder / "config.json").write_text(json.dumps(config))
    write_spec(folder, ICL)
    return folder


def test_bge_en_icl_encodes_as_published(icl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = TinyBgeEnIcl(), Embedder.load(icl)
    assert model.spec == ICL
    for examples in ([], PAIRS):
        ours = model.encode(tiny.TEXTS, instruction=TASK, examples=examples)
        theirs = reference.encode([format_query(text, examples) for text in tiny.TEXTS])
        assert np.sum(ours * theirs, axis=1).min() > 0.99999
        assert np.abs(ours[0] - ours[1]).max() > 0.02
    plain = reference.encode([format_query(text, []) for text in tiny.TEXTS])
    assert np.sum(ours * plain, axis=1).max() < 0.999, "examples must change the vectors"
    documents = model.encode(tiny.TEXTS)
    assert np.sum(documents * reference.encode(tiny.TEXTS), axis=1).min() > 0.99999

    (tmp_path / "in.txt").write_text("\n".join(tiny.TEXTS[:2]) + "\n")
    rows = [{"query": query, "response": response} for query, response in PAIRS]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: model)
    assert encode.main(make_arguments(tmp_path, instruction=TASK))["vectors"] == 2
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours[:2], atol=1e-5)
    with monkeypatch.context() as full, pytest.raises(UserError, match=r"new.npy: needs \d.* MB, but the disk has 0.0 MB left"):
        full.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=9))
        encode.main(make_arguments(tmp_path, instruction=TASK, out=str(tmp_path / "new.npy")))
    assert not list(tmp_path.glob("new*"))

    with pytest.raises(UserError, match=r"40 examples take \d+ of 300 tokens\)\. Give fewer or shorter"):
        model.encode(["x"], instruction=TASK, examples=PAIRS * 20)
    with pytest.raises(TypeError, match="examples need an instruction"):
        model.encode(["x"], examples=PAIRS)
    export(model, tmp_path / "exported", "float32", Card("icl", "base"))
    stock, prompt = load_sentence_transformer(tmp_path / "exported"), model.spec.build_prompt(TASK)
    theirs = encode_torch(stock, [text + "\n<response>" for text in tiny.TEXTS], prompt)
    np.testing.assert_allclose(theirs, model.encode(tiny.TEXTS, prompt=prompt), atol=1e-5)
    assert r"Append '\n<response>' to every text" in (tmp_path / "exported" / "README.md").read_text()


def make_arguments(folder: Path, **options: Any) -> argparse.Namespace:
    """Make the arguments of the encode command for files of a folder."""
    files = {"input": str(folder / "in.txt"), "out": str(folder / "out.npy"), "examples": str(folder / "examples.jsonl")}
    others = {"instruction": None, "prompt_name": None, "dim": None, "long_texts": "cut", "field": "text"}
    others |= {"precision": "float32", "ranges": None, "write_ranges": None, "search": None, "top": None}
    loading = {"model": "m", "checkpoint": "best", "dtype": "float32", "layers": None, "adapter": None, "fsdp": 1}
    return argparse.Namespace(**{**files, **others, **loading, **options})


def test_bad_example_files_give_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x\n")
    with pytest.raises(UserError, match="--examples: in-context examples need an instruction"):
        encode.main(make_arguments(tmp_path))
    for row, message in (
        ('{"query": "q"}', r'"response" is missing \(expected a non-empty string'),
        ('{"query": "", "response": "r"}', r"\"query\" is '' \(expected a non-empty string"),
        ("[]", r"not a JSON object .found a list"),
    ):
        (tmp_path / "examples.jsonl").write_text('{"query": "q", "response": "r"}\n' + row)
        with pytest.raises(UserError, match=f"examples.jsonl:2: {message}"):
            encode.main(make_arguments(tmp_path, instruction=TASK))
    (tmp_path / "examples.jsonl").unlink()
    with pytest.raises(UserError, match=r"examples.jsonl: no such file"):
        encode.main(make_arguments(tmp_path, instruction=TASK))


def test_whole_run_with_few_shot_suffix_and_projection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    root = write_base_and_data(tmp_path)
    overrides = [
        "data.sources.0.few_shot={most: 2, zero_shot: 0}", "data.max_length=128", "model.attention=causal",
        "model.pooling.kind=last", 'model.query_suffix="\\n<response>"', "model.projection.width=6", "train.batch_size=8",
        'model.instruction_template="{instruction}:"',
    ]  # fmt: skip
    result = train(make_config(root, "run", *overrides, "eval.sets=[]", "train.steps=1", "mesh.data=1"))
    assert np.isfinite(result["loss"])
    model = Embedder.load(root / "run")
    assert (model.spec.query_suffix, model.model.width) == ("\n<response>", 6)
    assert model.tokenizer.hf_tokenizer.decode(model.tokenizer(["a"], ["p:"]).ids[0]) == "p:a\n<response></s>"
    prompts = re.findall(r"  query    '\[(.*?)\]", caplog.text)
    example = r"Find .*?:.*?\\n<response>.*?\\n\\n"
    assert len(prompts) == 2 and all(re.fullmatch(rf"({example})+Find [\w ]*:", prompt) for prompt in prompts)
    count = re.search(r"  (\S+) in-context examples per query", caplog.text)
    assert count and 1 <= float(count[1]) <= 2
