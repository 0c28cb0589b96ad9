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

from jaxembed import cli, encode
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError

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
    monkeypatch.setattr(encode, "TEXTS_PER_BATCH", 4)
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
        encode.write_vectors(tmp_path / "out.npy.partial", tmp_path / "out.npy", parts, 2, 2)


def test_long_texts_are_cut_before_they_are_encoded(
    tmp_path: Path, encoder: LengthEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encode, "MAX_TEXT_CHARS", 50)
    monkeypatch.setattr(encode, "CHARS_PER_BATCH", 100)
    texts = ["x" * 1000, *["y" * 50] * 4, "z"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "a.txt", tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [50, 50, 50, 50, 50, 1]
    assert encoder.calls == [2, 2, 2]
    assert [message for message in caplog.messages if "cut" in message] == [
        f"{tmp_path}/a.txt: 1 texts have more than 50 characters and are cut there"
    ]
