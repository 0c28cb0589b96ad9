"""Held-out sets of every kind, their tasks in mteb, and encoders of their texts that need no model."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOPICS = ("bank", "sport", "music", "weather")
WORDS = [f"{topic}{number}" for topic in TOPICS for number in range(6)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_labeled_texts(count: int, seed: int) -> list[dict[str, str]]:
    """Make texts of three words, two of them of the text's topic, which is its label."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        topic = int(rng.integers(len(TOPICS)))
        own = [f"{TOPICS[topic]}{rng.integers(6)}" for _ in range(2)]
        rows.append({"text": f"{own[0]} {WORDS[rng.integers(len(WORDS))]} {own[1]}", "label": TOPICS[topic]})
    return rows


def make_scored_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make pairs of texts of four words whose score is the number of shared words, at most three."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        shared = int(rng.integers(4))
        words = [WORDS[i] for i in rng.choice(len(WORDS), 8 - shared, replace=False)]
        rows.append({"sentence1": " ".join(words[:4]), "sentence2": " ".join(words[4 - shared : 8 - shared]), "score": shared})
    return rows


def write_beir(folder: Path, count: int = 30, seed: int = 0) -> Path:
    """Write a BEIR folder whose queries are two of the five words of the relevant document."""
    rng = np.random.default_rng(seed)
    documents = [[WORDS[i] for i in rng.choice(len(WORDS), 5, replace=False)] for _ in range(count)]
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": " ".join(d)} for i, d in enumerate(documents)])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": " ".join(d[:2])} for i, d in enumerate(documents)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(count))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def encode_words(texts: Sequence[str], instruction: str = "", noise: float = 0.0, width: int = 32) -> np.ndarray:
    """Encode a text as the sum of fixed vectors of its words, of which `noise` is random, at unit length."""
    vectors = []
    for text in texts:
        words = [np.random.default_rng(zlib.crc32(word.encode())).normal(size=width) for word in text.split()]
        noise_vector = np.random.default_rng(zlib.crc32(f"{text} {noise}".encode())).normal(size=width)
        vectors.append(np.sum(words, axis=0) + noise * noise_vector)
    stacked = np.array(vectors, np.float32)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
