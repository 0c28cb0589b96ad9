"""In-context examples before a query and a suffix behind it: the strings, the tokens, what is drawn, what is encoded."""

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
from helpers.runs import prepare, settings
from jaxembed import Embedder, cli, encode
from jaxembed.config import PythonPackagesConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec, FewShotExample
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.schema import Example
from jaxembed.data.sources import Source, open_source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.errors import UserError
from jaxembed.hub.base import spec_from_json, write_spec
from jaxembed.hub.card import Card
from jaxembed.hub.export import encode_torch, export, load_sentence_transformer
from jaxembed.runs.train import train

# bge-en-icl's form (Li et al. 2024).
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


def presented(query: str, examples: Sequence[tuple[str, str]]) -> str:
    """A query as the release presents it."""
    shown = [f"<instruct>{TASK}\n<query>{question}\n<response>{answer}" for question, answer in examples]
    return "\n\n".join([*shown, f"<instruct>{TASK}\n<query>{query}\n<response>"])


def test_a_prompt_is_that_of_the_release() -> None:
    shots = [FewShotExample(TASK, *pair) for pair in PAIRS]
    made_of_others = dataclasses.replace(ICL, example_template="")
    for spec in (ICL, made_of_others):
        assert spec.prompt(TASK, shots) + "why" + spec.query_suffix == presented("why", PAIRS)
        assert spec.prompt(TASK) + "why" + spec.query_suffix == presented("why", [])
        assert spec.prompt("", shots) == ""
    plain = EmbeddingSpec().prompt("b", [FewShotExample("a", "q", "r")])
    assert plain == "Instruct: a\nQuery:q\nResponse:r\n\nInstruct: b\nQuery:"
    with pytest.raises(UserError, match=r"FILE: example_template must contain \{query\} and \{response\}"):
        spec_from_json({"example_template": "{query}"}, "FILE")


SUFFIX = " and so?"


def text_tokenizer(max_length: int, **options: Any) -> TextTokenizer:
    made = tiny.tokenizer(bos=True)
    append_eos(made)
    return TextTokenizer(made, max_length, **options)


@pytest.mark.parametrize("echo", ["", "{text} again: {text}"])
def test_a_suffix_is_kept_where_the_text_is_cut(echo: str) -> None:
    texts = [*tiny.TEXTS, "", "the quick brown fox " * 40, "naïve café 数学 🙂 " * 30, "x\n" * 90]
    around = (echo or "{text}").split("{text}")[1]
    for limit in (48, 61, 62, 400):
        made = text_tokenizer(limit, suffix=SUFFIX, echo=echo)
        out = made(texts, ["query:"] * len(texts))
        for text, ids in zip(texts, out.ids, strict=True):
            assert len(ids) <= limit
            assert (ids[0], ids[-1]) == (0, 1)  # BOS and EOS
            whole = made.hf.decode(ids[1:-1])
            assert whole.startswith("query:") and whole.endswith(SUFFIX)
            kept = whole.removeprefix("query:").removesuffix(SUFFIX)
            kept = kept[: (len(kept) - len(around)) // 2] if echo else kept
            assert text.startswith(kept)
            assert kept == text or len(ids) > limit - 8
        alone = [made([text], ["query:"]).ids[0].tolist() for text in texts]
        assert alone == [ids.tolist() for ids in out.ids]
        mixed = made(["a", "a", *texts], ["", "query:", *[""] * len(texts)])
        assert made.hf.decode(mixed.ids[0][1:-1]) == (echo or "{text}").replace("{text}", "a")
        if not echo:
            assert out.pool_from.tolist() == [made.prompt_lengths(["query:"])[0]] * len(texts)
            assert max(map(len, mixed.ids)) == min(limit, int(made.untruncated_lengths(texts, [""] * len(texts)).max()))


def test_a_prompt_that_fills_everything_is_cut_itself() -> None:
    made = text_tokenizer(10, suffix=SUFFIX)
    (ids,) = made(["text"], ["a prompt of many words"]).ids
    assert (len(ids), ids[0], ids[-1]) == (10, 0, 1)
    assert made.room(["a prompt of many words"])[0] < 1


def test_long_texts_come_in_pieces_each_with_the_suffix() -> None:
    made = text_tokenizer(40, suffix=SUFFIX)
    (pieces,) = made.pieces(["the quick brown fox " * 20], "query:")
    assert "".join(pieces) == "the quick brown fox " * 20
    assert (made.untruncated_lengths(pieces, ["query:"] * len(pieces)) <= 40).all()
    assert all(made.hf.decode(ids).endswith(SUFFIX + "</s>") for ids in made(pieces, ["query:"] * len(pieces)).ids)


def source(folder: Path, rows: Sequence[Any], **options: Any) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(path=str(path), **options), PythonPackagesConfig(), folder)


# Every third row asks the same, and every fourth has an instruction of its own.
ROWS = [
    {"query": "same" if i % 3 == 0 else f"q{i}", "pos": [f"p{i}", f"r{i}"], "neg": [f"n{i}", f"m{i}"]}
    | ({"prompt": f"own {i}"} if i % 4 == 0 else {})
    for i in range(24)
]


def draws(opened: Source, index: int, count: int = 300) -> list[Example]:
    return [opened.draw(index, np.random.default_rng(seed), 1) for seed in range(count)]


@pytest.mark.parametrize("index", [0, 1])
def test_examples_are_drawn_from_other_rows(tmp_path: Path, index: int) -> None:
    few = source(tmp_path, ROWS, instructions=["find"], few_shot={"most": 3, "zero_shot": 0.25})
    drawn = draws(few, index)
    counts = np.bincount([len(example.shots) for example in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0.25, 0.25, 0.25, 0.25], atol=0.08)
    seen = set()
    for example in drawn:
        assert len(set(example.shots)) == len(example.shots)
        for instruction, query, response in example.shots:
            row = ROWS[int(response[1:])]
            assert query == row["query"] != example.query
            assert response in row["pos"]
            assert instruction == row.get("prompt", example.instruction)
            seen.add(response)
    possible = {text for row in ROWS if row["query"] != ROWS[index]["query"] for text in row["pos"]}
    assert seen == possible
    without = draws(source(tmp_path, ROWS, instructions=["find"]), index)
    assert [dataclasses.replace(example, shots=()) for example in drawn] == without


def test_few_rows_give_few_examples(tmp_path: Path) -> None:
    few = source(tmp_path, ROWS[:3], instructions=["find"], few_shot={"most": 9, "zero_shot": 0.0})
    assert {len(example.shots) for example in draws(few, 1, 50)} == {1, 2}
    alone = source(tmp_path, ROWS[:1], instructions=["find"], few_shot={})
    assert {example.shots for example in draws(alone, 0, 20)} == {()}


def test_examples_leave_the_text_half_of_its_tokens(tmp_path: Path) -> None:
    rows = [{"query": f"q{i} " + "long " * (i % 5), "pos": [f"p{i} " + "word " * (i % 7)]} for i in range(40)]
    opened = source(tmp_path, rows, instructions=["find"], few_shot={"most": 4, "zero_shot": 0.1})
    tokenizer = text_tokenizer(220, suffix=ICL.query_suffix)
    build = BatchBuilder([opened], tokenizer, ICL, row_length=440, hard_negatives=0, seed=0, shards=1)
    ids = np.arange(40)
    kept = build.examples(3, ids)
    drawn = [opened.draw(i, np.random.default_rng((0, 3, i)), 0) for i in range(40)]
    dropped = 0
    for example, whole in zip(kept, drawn, strict=True):
        count = len(example.shots)
        assert whole.shots[:count] == example.shots
        length, with_next = tokenizer.prompt_lengths([ICL.prompt("find", whole.shots[: count + more]) for more in (0, 1)])
        assert length <= 110
        assert count == len(whole.shots) or with_next > 110 - 6  # counted one by one, they come out a few tokens longer
        dropped += len(whole.shots) - count
    assert 10 < dropped < sum(len(example.shots) for example in drawn) - 10
    texts, prompts = build.texts(kept)
    assert prompts[::2] == [ICL.prompt("find", example.shots) for example in kept] and not any(prompts[1::2])
    assert texts[::2] == [example.query for example in kept]
    assert np.array_equal(build(3, ids).batch.texts.tokens, build(3, ids).batch.texts.tokens)


class Icl:
    """A tiny bge-en-icl: a causal Mistral, BOS before and EOS after the whole string, the last token's state."""

    def __init__(self) -> None:
        self.decoder, self.tokenizer = tiny.torch_model("mistral"), tiny.tokenizer(bos=True)

    def encode(self, strings: Sequence[str]) -> np.ndarray:
        vectors = []
        for string in strings:
            ids = [*self.tokenizer(string)["input_ids"], self.tokenizer.eos_token_id]
            with torch.no_grad():
                last = self.decoder(torch.tensor([ids])).last_hidden_state[0, -1]
            vectors.append(torch.nn.functional.normalize(last, dim=0).numpy())
        return np.stack(vectors)


@pytest.fixture(scope="module")
def icl(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with our spec beside the weights."""
    folder, base = tmp_path_factory.mktemp("icl"), base_folder("mistral")
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 300}
    (folder / "config.json").write_text(json.dumps(config))
    write_spec(folder, ICL)
    return folder


def test_bge_en_icl_encodes_as_published(icl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = Icl(), Embedder.load(icl)
    assert model.spec == ICL
    for examples in ([], PAIRS):
        ours = model.encode(tiny.TEXTS, instruction=TASK, examples=examples)
        theirs = reference.encode([presented(text, examples) for text in tiny.TEXTS])
        assert np.sum(ours * theirs, axis=1).min() > 0.99999
        assert np.abs(ours[0] - ours[1]).max() > 0.02
    plain = reference.encode([presented(text, []) for text in tiny.TEXTS])
    assert np.sum(ours * plain, axis=1).max() < 0.999, "examples must change the vectors"
    documents = model.encode(tiny.TEXTS)
    assert np.sum(documents * reference.encode(tiny.TEXTS), axis=1).min() > 0.99999

    (tmp_path / "in.txt").write_text("\n".join(tiny.TEXTS[:2]) + "\n")
    rows = [{"query": query, "response": response} for query, response in PAIRS]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: model)
    assert encode.main(arguments(tmp_path, instruction=TASK))["vectors"] == 2
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours[:2], atol=1e-5)
    with monkeypatch.context() as full, pytest.raises(UserError, match=r"new.npy: it takes \d.* MB, the disk has 0.0 MB left"):
        full.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=9))
        encode.main(arguments(tmp_path, instruction=TASK, out=str(tmp_path / "new.npy")))
    assert not list(tmp_path.glob("new*"))

    with pytest.raises(UserError, match=r"its examples \(40\) take \d+ of the 300 tokens .*; name fewer or shorter examples"):
        model.encode(["x"], instruction=TASK, examples=PAIRS * 20)
    with pytest.raises(TypeError, match="under an instruction"):
        model.encode(["x"], examples=PAIRS)
    export(model, tmp_path / "exported", "float32", Card("icl", "base"))
    stock, prompt = load_sentence_transformer(tmp_path / "exported"), model.spec.prompt(TASK)
    theirs = encode_torch(stock, [text + "\n<response>" for text in tiny.TEXTS], prompt)
    np.testing.assert_allclose(theirs, model.encode(tiny.TEXTS, prompt=prompt), atol=1e-5)
    assert r"put '\n<response>' behind every text" in (tmp_path / "exported" / "README.md").read_text()


def arguments(folder: Path, **options: Any) -> argparse.Namespace:
    """Those of the encode command on files of a folder."""
    files = {"input": str(folder / "in.txt"), "out": str(folder / "out.npy"), "examples": str(folder / "examples.jsonl")}
    others = {"instruction": None, "prompt_name": None, "dim": None, "long_texts": "cut", "field": "text"}
    loading = {"model": "m", "checkpoint": "best", "dtype": "float32", "layers": None, "adapter": None, "fsdp": 1}
    return argparse.Namespace(**{**files, **others, **loading, **options})


def test_bad_example_files_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x\n")
    with pytest.raises(UserError, match="--examples are presented under an instruction"):
        encode.main(arguments(tmp_path))
    for row, told in (
        ('{"query": "q"}', '"response" is missing; expected a non-empty string'),
        ('{"query": "", "response": "r"}', "\"query\" is ''; expected a non-empty string"),
        ("[]", "expected a JSON object, found a list"),
    ):
        (tmp_path / "examples.jsonl").write_text('{"query": "q", "response": "r"}\n' + row)
        with pytest.raises(UserError, match=f"examples.jsonl:2: {told}"):
            encode.main(arguments(tmp_path, instruction=TASK))
    (tmp_path / "examples.jsonl").unlink()
    with pytest.raises(UserError, match=r"examples.jsonl: no such file"):
        encode.main(arguments(tmp_path, instruction=TASK))


def test_a_whole_run_with_examples_a_suffix_and_a_projection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    root = prepare(tmp_path)
    chosen = [
        "data.sources.0.few_shot={most: 2, zero_shot: 0}", "data.max_length=128", "model.attention=causal",
        "model.pooling.kind=last", 'model.query_suffix="\\n<response>"', "model.projection.width=6", "train.batch_size=8",
        'model.instruction_template="{instruction}:"',
    ]  # fmt: skip
    result = train(settings(root, "run", *chosen, "eval.sets=[]", "train.steps=1", "mesh.data=1"))
    assert np.isfinite(result["loss"])
    model = Embedder.load(root / "run")
    assert (model.spec.query_suffix, model.model.width) == ("\n<response>", 6)
    assert model.tokenizer.hf.decode(model.tokenizer(["a"], ["p:"]).ids[0]) == "p:a\n<response></s>"
    shown = re.findall(r"  query    '\[(.*?)\]", caplog.text)
    of_example = r"Find .*?:.*?\\n<response>.*?\\n\\n"
    assert len(shown) == 2 and all(re.fullmatch(rf"({of_example})+Find [\w ]*:", prompt) for prompt in shown)
    count = re.search(r"  (\S+) in-context examples a query", caplog.text)
    assert count and 1 <= float(count[1]) <= 2
