"""Training sources in small JSONL files, and examples drawn from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.schema import Example
from jaxembed.data.sources import Source, open_source

PAIR_ROWS = [
    {"query": "q0", "pos": ["p0", "p1", "p0"], "neg": ["n0", "p1", "n1", "n2", "n0"]},
    {"query": "q1", "pos": ["p2"]},
    {"query": "q2", "pos": ["p3"], "neg": [], "prompt": "its own"},
]
LABEL_ROWS = [{"text": f"text {i}", "label": ["sport", "science", "world"][i % 3]} for i in range(12)]
SCORED_ROWS = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": float(i)} for i in range(6)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Write one JSON value per line and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def open_source_file(path: Path, **options: Any) -> Source:
    """Open a training source with these keys of its config."""
    return open_source(SourceConfig(path=str(path), **options), path.parent)


def draw_examples(source: Source, index: int, negatives: int, count: int = 40) -> list[Example]:
    """Draw the example at `index` of a source `count` times, each with another seed."""
    return [source.draw(index, np.random.default_rng(seed), negatives) for seed in range(count)]
