"""A mining pool with known vectors: texts that share a number have similar vectors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.sources import write_jsonl
from jaxembed.config import MineConfig, SourceConfig
from jaxembed.curation.mining import MiningOptions, MiningResult, ScoreIds, mine_negatives
from jaxembed.curation.pool import MiningPool, open_mining_source, read_pool
from jaxembed.curation.report import to_output_row
from jaxembed.data.batch import EncoderInput
from jaxembed.data.sources import Source

# Code that kills the process of a command at the fifth call of the model, with 8 texts a call.
KILL_WHILE_ENCODING = """
import os, signal
from jaxembed.curation import mining
from jaxembed.hub.frozen_encoder import FrozenEncoder
mining.TEXTS_PER_CALL, encode, calls = 8, FrozenEncoder.encode, []
def encode_or_die(self, texts):
    calls.append(texts)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)
FrozenEncoder.encode = encode_or_die
"""
DEPTH = 40
RULE = {"negatives": 4, "depth": DEPTH, "window": (5, 12), "max_score": 0.2, "margin": 0.1, "share": 0.8}


def open_file(path: Path, cache: Path) -> Source:
    """Open a file as the source of a mining run."""
    return open_mining_source(SourceConfig(path=str(path)), cache)


def make_pool(
    folder: Path, rows: Sequence[Mapping[str, Any]], corpus: Sequence[str] | None = None, seed: int = 0
) -> MiningPool:
    """Write rows to a file and read the pool of that file and a corpus."""
    return read_pool(open_file(write_jsonl(folder / "pairs.jsonl", rows), folder), corpus, seed)


@functools.cache
def draw_vector(text: str) -> np.ndarray:
    """Return the unit vector of a text. Texts with the same number, such as a query and its positive, are similar."""
    rng = np.random.default_rng(list(text.strip().encode()))
    number = int("".join(filter(str.isdigit, text)) or 0)
    mixed = rng.normal(size=6) + np.random.default_rng(number).normal(size=6)
    return (mixed / np.linalg.norm(mixed)).astype(np.float32)


def draw_vectors(texts: Sequence[str]) -> np.ndarray:
    """Return the unit vectors [N, 6] of texts."""
    return np.stack([draw_vector(text) for text in texts])


class StubEncoder:
    """The part of a frozen encoder that curation uses, with `draw_vectors`. `inputs` are the texts that it encoded."""

    identity, width = {"name": "stub"}, 6

    def __init__(self) -> None:
        self.inputs: list[EncoderInput] = []

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        """Return the vectors of texts."""
        self.inputs += texts
        return draw_vectors([text.text for text in texts])


def mine_pool(pool: MiningPool, rescore: ScoreIds | None = None, rule: str = "top_k", **options: Any) -> MiningResult:
    """Mine negatives with `RULE`, changed by options that are keys of the section `mine`, and other mining options."""
    keys = {key: options.pop(key) for key in list(options) if key in MineConfig.model_fields}
    queries, documents = draw_vectors([query.text for query in pool.queries]), draw_vectors(pool.documents)
    config = MineConfig.model_validate({"rule": rule, **RULE, **keys})
    return mine_negatives(pool, queries, documents, MiningOptions(config, **options), rescore)


def rows_by_query(pool: MiningPool, result: MiningResult) -> dict[str, dict[str, Any]]:
    """Return the output rows by query."""
    return {row["query"]: row for row in (to_output_row(pool, mined) for mined in result.rows)}
