"""What the data command tells of sources: their bad rows, their figures, their batches; and their rows in other files."""

from __future__ import annotations

import typing
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxembed.config import DataConfig, RowField, SourceConfig
from jaxembed.data.array_record import write_array_record
from jaxembed.data.beir import BeirPairs
from jaxembed.data.documents import Documents
from jaxembed.data.drawers import each
from jaxembed.data.jsonl import write_lines
from jaxembed.data.rows import Rows, read_all
from jaxembed.data.schema import Row, text_hash
from jaxembed.data.sources import SHAPES, open_rows, open_source, open_sources, open_unchecked
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError
from jaxembed.files import written_whole
from jaxembed.spec import EmbeddingSpec

TOLD = 20  # bad rows of a source, and labels, that are named
MEASURED = 10_000  # rows of a source whose texts are measured, evenly spread
WRITERS = {".jsonl": write_lines, ".array_record": write_array_record}
Measure = Callable[[list[str]], np.ndarray]  # the length of each text


def validate(data: DataConfig, cache: Path) -> dict[str, Any]:
    """Reads every row of every source: how many there are, how many are bad, and what is wrong with the first ones."""
    told = [_validated(source, data, cache) for source in data.sources]
    return {"sources": told, "bad_rows": sum(report["bad_rows"] for report in told)}


def _validated(source: SourceConfig, data: DataConfig, cache: Path) -> dict[str, Any]:
    kind: str = source.format
    rows, bad = 0, list[str]()
    try:
        kind, container = open_unchecked(source, data.python_packages, cache)
        if container is None:
            rows = len(BeirPairs(Path(source.path)))
        for _, _, row in read_all(container, SHAPES[kind].check, source.columns) if container else ():
            rows += 1
            if isinstance(row, UserError):
                bad.append(str(row))
    except UserError as error:  # nothing after it can be read
        bad.append(str(error))
    return {"source": source.path, "format": kind, "rows": rows, "bad_rows": len(bad), "problems": bad[:TOLD]}


def stats(data: DataConfig, cache: Path, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Figures of every source and of the texts that each two share; lengths are of texts alone, without instructions.

    Holds 8 bytes of every query, text and pair in memory.
    """

    def measure(texts: list[str]) -> np.ndarray:
        if tokenizer is None:
            return np.array([len(text) for text in texts])
        return tokenizer.untruncated_lengths(texts, [""] * len(texts))

    reports, hashes = [], []
    for source in data.sources:
        kind, rows = open_rows(source, data.python_packages, cache)
        read = Documents(rows, source).as_pairs() if isinstance(rows, Rows) and kind == "documents" else each(rows)
        told = tqdm(read, f"reading {source.path}", len(rows), unit="row", delay=2, leave=False)
        report, of_source = _figures(told, len(rows), measure)
        report |= _label_figures(rows) if isinstance(rows, Rows) and kind == "labels" else {}
        reports.append({"source": source.path, "format": kind, "rows": len(rows), **report})
        hashes.append(of_source)
    shared = [
        {
            "sources": [a["source"], b["source"]],
            **{name: len(np.intersect1d(of_a[name], of_b[name], assume_unique=True)) for name in of_a},
        }
        for (a, of_a), (b, of_b) in combinations(zip(reports, hashes, strict=True), 2)
    ]
    return {"lengths_in": "tokens" if tokenizer else "characters", "sources": reports, "shared": shared}


def _figures(rows: Iterable[Row], count: int, measure: Measure) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The figures of a source, and the distinct hashes of its queries and of all its texts."""
    queries, texts, pairs = array("Q"), array("Q"), array("Q")
    found: dict[str, list[str]] = {"query": [], "positive": [], "negative": []}
    counts = {"positives": array("I"), "negatives": array("I")}
    every = -(-count // MEASURED)
    for i, row in enumerate(rows):
        query, positives, negatives = row_texts(row)
        queries.append(_hash(query))
        texts.extend(map(_hash, (query, *positives, *negatives)))
        pairs.extend(_hash(f"{query}\0{positive}") for positive in positives)
        counts["positives"].append(len(positives))
        counts["negatives"].append(len(negatives))
        if i % every == 0:
            for role, of_role in zip(found, ((query,), positives, negatives), strict=True):
                found[role].extend(of_role)
    distinct = {name: np.unique(np.frombuffer(seen, np.uint64)) for name, seen in (("queries", queries), ("texts", texts))}
    figures: dict[str, Any] = {
        "duplicate_queries": len(queries) - len(distinct["queries"]),
        "duplicate_pairs": len(pairs) - len(np.unique(np.frombuffer(pairs, np.uint64))) if pairs else 0,
        "a_row": {name: _spread(np.frombuffer(of_rows, np.uint32)) for name, of_rows in counts.items()},
        "lengths": {role: _spread(measure(of_role)) for role, of_role in found.items() if of_role},
    }
    return figures, distinct


def _label_figures(rows: Rows) -> dict[str, Any]:
    ranked = sorted(zip(rows.names, rows.counts, strict=True), key=lambda of_label: -of_label[1])
    return {"labels": len(ranked), "largest_labels": dict(ranked[:TOLD])}


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(values.mean()), 2), "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95, method="higher")), "most": float(values.max()),
    }  # fmt: skip


def _hash(text: str) -> int:
    return int(text_hash(text).view(np.uint64)[0])


def row_texts(row: Row) -> tuple[str, list[str], list[str]]:
    """The query, positives and negatives that a row of any shape holds; a label is its text's positive."""
    query = next(row[name] for name in ("query", "sentence1", "text") if name in row)
    positives = row.get("pos") or [str(row[name]) for name in ("sentence2", "label") if name in row]
    return query, positives, row.get("neg") or []


def preview(
    data: DataConfig, cache: Path, batch_size: int, seed: int, spec: EmbeddingSpec, tokenizer: TextTokenizer | None
) -> Iterator[tuple[str, str, str, str, int]]:
    """Of every text of the first batch that training would see: source, role, prompt, text, and its tokens.

    Without a tokenizer the text is whole and its characters are counted.
    """
    from jaxembed.data.batch import BatchBuilder, roles  # imports JAX, which the other commands do without
    from jaxembed.data.bpe import BYTES, train_tokenizer
    from jaxembed.data.mixture import ExampleIndex, Plan
    from jaxembed.fields import LARGEST

    sources = open_sources(data, cache)
    plan = Plan(sources, min(batch_size, sum(map(len, sources))), seed, 0, data.batching, data.mixture)
    build = BatchBuilder(
        sources, tokenizer or TextTokenizer(train_tokenizer([], BYTES + 2), LARGEST), spec,
        row_length=data.row_length or data.max_length, hard_negatives=data.hard_negatives, seed=seed, shards=1,
        distinct=data.batching.no_duplicates,
    )  # fmt: skip
    of_source, _ = ExampleIndex(sources).locate(plan[0])
    for source, example in zip(of_source, build.examples(0, plan[0]), strict=True):
        texts, prompts = build.texts([example])
        seen = tokenizer.read_back(texts, prompts) if tokenizer else zip(prompts, texts, map(len, texts), strict=True)
        for role, (prompt, text, length) in zip(roles(texts), seen, strict=True):
            yield sources[source].name, role, prompt, text, length


def convert(source: SourceConfig, data: DataConfig, cache: Path, targets: Sequence[Path], pairs: bool = False) -> int:
    """Writes the rows of a source, under our names of their fields, evenly into files; returns how many there are.

    With `pairs` they are those of the main format that its examples make.
    """
    if pairs:
        drawer = open_source(source, data.python_packages, cache).drawer
        count, rows = sum(1 for _ in drawer.as_pairs()), drawer.as_pairs()
    else:
        opened = open_rows(source, data.python_packages, cache)[1]
        count, rows = len(opened), each(opened)
    ends = [count * (i + 1) // len(targets) for i in range(len(targets))]
    try:
        with ExitStack() as all_whole:
            partial = [all_whole.enter_context(written_whole(target)) for target in targets]
            for target, unfinished, start, end in zip(targets, partial, [0, *ends], ends, strict=False):
                written = tqdm(islice(rows, end - start), f"writing {target}", end - start, unit="row", delay=2, leave=False)
                WRITERS[target.suffix](unfinished, map(_fields, written))
    except OSError as error:
        raise UserError(f"{targets[0]}: cannot be written ({error.strerror or error})") from None
    return count


def _fields(row: Row) -> Mapping[str, Any]:
    return {name: row[name] for name in typing.get_args(RowField) if name in row}
