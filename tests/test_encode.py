"""The encode command: any input is read once and whole, or refused; the output is complete or absent."""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from jaxembed import cli, encode
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data import text_input
from jaxembed.data.npy_writer import write_vectors
from jaxembed.errors import UserError
from jaxembed.search.precision import get_quantized_layout, merge_ranges, quantize_vectors

TEXTS = [f"text {i}" for i in range(10)]


class LengthEncoder:
    """Encodes a text as its length, and records the sizes of its calls."""

    spec = EmbeddingSpec(prompts={"query": "find: "})

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        if texts:
            self.calls.append(len(texts))
        return np.array([[len(text), 1] for text in texts], np.float32).reshape(-1, 2)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> LengthEncoder:
    model = LengthEncoder()
    monkeypatch.setattr(cli, "load_model", lambda *args, **options: model)
    return model


def run(source: Path | str, out: Path, *options: str) -> dict[str, Any]:
    args: argparse.Namespace = encode.make_parser().parse_args(["model", str(source), str(out), *options])
    return encode.main(args)


def lengths(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a", "a.csv", "a.txt", "pipe"])
def test_every_text_has_a_vector(tmp_path: Path, encoder: LengthEncoder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "TEXTS_PER_BATCH", 4)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "\n"
    lines = "\n".join(TEXTS) + "\n\n"
    content = {"a.csv": "text\n" + lines, "a.txt": lines}.get(name, rows)
    if name == "pipe":
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_text, args=(content,), daemon=True).start()
    else:
        (tmp_path / name).write_text(content)
    result = run(tmp_path / name, tmp_path / "out.npy")
    vectors = np.load(tmp_path / "out.npy")
    assert (result["vectors"], result["width"], vectors.shape, vectors.dtype) == (10, 2, (10, 2), np.float32)
    assert vectors[:, 0].tolist() == lengths(TEXTS)
    assert encoder.calls == [4, 4, 2]


def test_an_input_that_shrinks_leaves_no_output(
    tmp_path: Path, encoder: LengthEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(TEXTS))
    monkeypatch.setattr(cli, "load_model", lambda *args, **options: source.write_text("\n".join(TEXTS[:4])) and encoder)
    with pytest.raises(UserError, match=r"a.txt: changed while it was read \(10 texts, then 4\)"):
        run(source, tmp_path / "out.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
    np.save(tmp_path / "documents.npy", np.eye(2, dtype=np.float32))
    source.write_text("\n".join(TEXTS))
    with pytest.raises(UserError, match=r"a.txt: changed while it was read \(10 texts, then 4\)"):
        run(source, tmp_path / "out.jsonl", "--search", str(tmp_path / "documents.npy"))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["a.txt", "pipe"])
def test_an_input_without_texts_leaves_no_output(tmp_path: Path, encoder: LengthEncoder, name: str) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_text, args=("\n",), daemon=True).start()
    else:
        (tmp_path / name).write_text("\n \n")
    with pytest.raises(UserError, match=rf"{name}: has no texts\.$"):
        run(tmp_path / name, tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


def test_a_bad_line_of_a_pipe_leaves_no_output(tmp_path: Path, encoder: LengthEncoder) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = '{"text": "a"}\n{"text": 1}\n'
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(content,), daemon=True).start()
    with pytest.raises(UserError, match=r'pipe:2: no string field "text"'):
        run(tmp_path / "pipe", tmp_path / "out.npy")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_ends_with_one_line(tmp_path: Path, encoder: LengthEncoder) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "out.npy.partial").symlink_to("/dev/full")
    parts = [np.zeros((2, 2), np.float32)]
    with pytest.raises(UserError, match=r"out.npy: cannot be written \(No space left on device\)\. Free space"):
        write_vectors(tmp_path / "out.npy.partial", tmp_path / "out.npy", parts, 2, 2)


def test_long_texts_are_cut_before_they_are_encoded(
    tmp_path: Path, encoder: LengthEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_input, "MAX_TEXT_CHARS", 50)
    monkeypatch.setattr(text_input, "CHARS_PER_BATCH", 100)
    texts = ["x" * 1000, *["y" * 50] * 4, "z"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "a.txt", tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [50, 50, 50, 50, 50, 1]
    assert encoder.calls == [2, 2, 2]
    assert [message for message in caplog.messages if "cut" in message] == [
        f"{tmp_path}/a.txt: 1 texts have more than 50 characters and are truncated"
    ]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions_equal_those_of_sentence_transformers(precision: Any) -> None:
    random = np.random.default_rng(0)
    vectors, ranges = random.normal(size=(50, 20)).astype(np.float32), merge_ranges(None, random.normal(size=(9, 20)))
    vectors[3], ranges[:, 4] = 0, 0.25  # a vector without signs, and a number without a range
    ours = quantize_vectors(vectors, precision, ranges)
    theirs = quantize_embeddings(vectors, precision, ranges=ranges)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours.dtype, ours.shape[1]) == get_quantized_layout(precision, 20) and ours.dtype == theirs.dtype
    assert len(np.unique(ours)) > 20


def test_ranges_of_some_texts_quantize_others(tmp_path: Path, encoder: LengthEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "TEXTS_PER_BATCH", 2)
    ranges = tmp_path / "ranges.npy"
    (tmp_path / "a.txt").write_text("\n".join(["x" * n for n in (1, 256, 7)]))
    run(tmp_path / "a.txt", tmp_path / "a.npy", "--write-ranges", str(ranges))
    assert np.load(ranges).tolist() == [[1, 1], [256, 1]]
    result = run(tmp_path / "a.txt", tmp_path / "b.npy", "--precision", "uint8", "--ranges", str(ranges))
    assert np.load(tmp_path / "b.npy").tolist() == [[0, 0], [255, 0], [6, 0]] and result["precision"] == "uint8"
    run(tmp_path / "a.txt", tmp_path / "c.npy", "--precision", "ubinary")
    assert np.load(tmp_path / "c.npy").tolist() == [[192]] * 3  # two numbers above 0


def test_errors_of_ranges(tmp_path: Path, encoder: LengthEncoder) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    source, out, bad = tmp_path / "a.txt", tmp_path / "out.npy", tmp_path / "bad.npy"
    np.save(bad, np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match=r"--precision int8: needs ranges \(found neither --ranges nor model/quantization_rang"):
        run(source, out, "--precision", "int8")
    with pytest.raises(UserError, match=r"bad\.npy: not the ranges of these vectors \(found float32 \[2, 3\]; expected finite"):
        run(source, out, "--precision", "int8", "--ranges", str(bad))
    with pytest.raises(UserError, match=r"a\.txt: not a \.npy file"):
        run(source, out, "--precision", "int8", "--ranges", str(source))
    with pytest.raises(UserError, match=r"--ranges: is for --precision int8 and uint8 \(found binary\)"):
        run(source, out, "--precision", "binary", "--ranges", str(bad))
    with pytest.raises(UserError, match=r"--write-ranges .*out\.npy: is the same file as OUT"):
        run(source, out, "--write-ranges", str(out))
    assert not out.exists()


@pytest.mark.parametrize("precision", ["float32", "ubinary"])
def test_search_finds_the_rows_of_a_file_that_encode_wrote(tmp_path: Path, encoder: LengthEncoder, precision: str) -> None:
    """A text is nearest to the document whose direction is most like its own: that of its own length."""
    (tmp_path / "documents.txt").write_text("".join("x" * n + "\n" for n in (1, 40, 3)))
    (tmp_path / "queries.txt").write_text("yyy\n" + "y" * 50)
    run(tmp_path / "documents.txt", tmp_path / "documents.npy", "--precision", precision)
    options = ("--precision", precision, "--search", str(tmp_path / "documents.npy"), "--top", "2")
    result = run(tmp_path / "queries.txt", tmp_path / "found.jsonl", *options)
    assert result == {
        "out": str(tmp_path / "found.jsonl"), "texts": 2, "documents": 3, "precision": precision,
    }  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [len(row["rows"]) for row in found] == [2, 2]
    queries = np.array([[3, 1], [50, 1]])
    documents = np.array([[1, 1], [40, 1], [3, 1]]) if precision == "float32" else np.ones((3, 2)) / np.sqrt(2)
    for row, scores in zip(found, queries @ documents.T, strict=True):
        np.testing.assert_allclose(row["scores"], scores[row["rows"]], rtol=1e-6)
        np.testing.assert_allclose(row["scores"], np.sort(scores)[::-1][:2], rtol=1e-6)


def test_search_refuses_what_it_cannot_read(tmp_path: Path, encoder: LengthEncoder) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.npy").write_text("no vectors")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "empty.npy").write_text("")
    np.savez(tmp_path / "archive.npz", a=np.zeros((3, 2), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan, np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 2), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((3, 5), np.float32))
    for name in ("bad.npy", "zip.npy", "empty.npy", "archive.npz"):
        options = ("--precision", "int8", "--ranges", str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name}: not a .npy file"):
            run(tmp_path / "a.txt", tmp_path / "out.npy", *options)
        with pytest.raises(UserError, match=f"--search .*{name}: not a .npy file"):
            run(tmp_path / "a.txt", tmp_path / "out.jsonl", "--search", str(tmp_path / name))
    out, search = tmp_path / "out.jsonl", ("--search", str(tmp_path / "wide.npy"))
    for options, message in (
        (("--search", str(tmp_path / "absent.npy")), "--search: no such file .*absent.npy"),
        (("--search", str(tmp_path / "none.npy")), "--search .*none.npy: has no vectors"),
        (("--search", str(tmp_path / "nan.npy")), "--search .*nan.npy: has numbers that are not finite"),
        (search, "wide.npy: its vectors are float32 of 5 columns .expected float32 of 2: float32 vectors of 2 numbers"),
        ((*search, "--write-ranges", str(tmp_path / "r.npy")), "--search: finds documents and writes no vectors"),
        (("--top", "3"), "--top: says how many documents to find"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a.txt", out, *options)
    with pytest.raises(UserError, match=r"out.npy: expected an output that ends in .jsonl"):
        run(tmp_path / "a.txt", tmp_path / "out.npy", *search)
    assert not out.exists()
