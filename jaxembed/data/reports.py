"""What the data command tells of sources: their bad rows, their figures, their batches; and their rows in other files."""

from __future__ import annotations

import logging
import typing
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxembed.config import DataConfig, SourceConfig
from jaxembed.config.data import RowField
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.array_record import write_array_record
from jaxembed.data.jsonl import write_lines
from jaxembed.data.labels import Labels
from jaxembed.data.rows import read_all
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import Row, text_hash
from jaxembed.data.sources import SHAPES, Source, open_rows, open_source, open_sources, open_unchecked
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError
from jaxembed.files import written_whole

TOLD = 20  # bad rows of a source, and labels, that are named
MEASURED = 10_000  # rows of a source whose texts are measured, evenly spread
WRITERS = {".jsonl": write_lines, ".array_record": write_array_record}
log = logging.getLogger(__name__)
Measure = Callable[[list[str]], np.ndarray]  # the length of each text


def validate(data: DataConfig, cache: Path) -> dict[str, Any]:
    """Opens every source as training does: how many rows it has and how many examples they make; of one that training would
    refuse, how many rows are bad, and what is wrong with the first ones.
    """
    told = [_validated(source, data, cache) for source in data.sources]
    return {"sources": told, "bad_rows": sum(report["bad_rows"] for report in told)}


def _validated(source: SourceConfig, data: DataConfig, cache: Path) -> dict[str, Any]:
    try:
        return {**_counts(open_source(source, data.python_packages, cache)), "bad_rows": 0, "problems": []}
    except UserError as error:
        return {"source": _told(source), **_problems(source, data, cache, str(error))}


def _problems(source: SourceConfig, data: DataConfig, cache: Path, refusal: str) -> dict[str, Any]:
    """Every bad row of a source that is refused; where there are none, `refusal` counts as one."""
    kind: str = source.format
    rows, bad = 0, list[str]()
    try:
        kind, container = open_unchecked(source, data.python_packages, cache)
        for _, _, row in read_all(container, SHAPES[kind].check, source.columns) if container else ():
            rows += 1
            if isinstance(row, UserError):
                bad.append(str(row))
    except UserError as error:  # nothing after it can be read
        bad.append(str(error))
    bad = bad or [refusal]
    return {"format": kind, "rows": rows, "examples": 0, "bad_rows": len(bad), "problems": bad[:TOLD]}


def _counts(source: Source) -> dict[str, Any]:
    """What a source is, how many rows it has, and how many examples training draws from."""
    return {"source": _told(source.config), "format": source.format, "rows": source.rows, "examples": len(source)}


def _told(source: SourceConfig) -> str:
    return source.name or source.path


def stats(data: DataConfig, cache: Path, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Figures of the examples of every source that training draws from, and of the texts that each two share.

    Of labels one positive and one negative of a text stand for all. Lengths are of texts alone, without instructions. Holds 8
    bytes of every query, text and pair in memory.
    """

    def measure(texts: list[str]) -> np.ndarray:
        if tokenizer is None:
            return np.array([len(text) for text in texts])
        return tokenizer.untruncated_lengths(texts, [""] * len(texts))

    reports, hashes = [], []
    for source in open_sources(data, cache):
        report, sampler = _counts(source), source.sampler
        if left_out := {reason: count for reason, count in sampler.dropped.items() if count}:
            report["left_out"] = left_out
        rows = tqdm(source.as_pairs(most=1), f"reading {report['source']}", unit="row", delay=2, leave=False)
        figures, of_source = _figures(rows, len(source), measure)
        reports.append({**report, **figures, **(_label_figures(sampler) if isinstance(sampler, Labels) else {})})
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
        query, positives, negatives = row["query"], row["pos"], row.get("neg") or []
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


def _label_figures(sampler: Labels) -> dict[str, Any]:
    documents = "labels" if sampler.label_texts else "examples"
    return {"label_documents": documents, "labels": len(sampler.sizes), "largest_labels": dict(sampler.sizes.most_common(TOLD))}


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(values.mean()), 2), "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95, method="higher")), "most": float(values.max()),
    }  # fmt: skip


def _hash(text: str) -> int:
    return int(text_hash(text).view(np.uint64)[0])


def preview(
    data: DataConfig, cache: Path, batch_size: int, seed: int, spec: EmbeddingSpec, tokenizer: TextTokenizer | None
) -> Iterator[tuple[str, str, str, str, int]]:
    """Of every text of the first batch that training would see: source, role, prompt, text, and its tokens.

    Without a tokenizer the text is whole, and its characters and those of its prompt are counted.
    """
    from jaxembed.config.fields import LARGEST
    from jaxembed.data.batch import BatchBuilder, roles  # imports JAX, which the other commands do without
    from jaxembed.data.batch_plan import BatchPlan, ExampleIndex
    from jaxembed.data.bpe import BYTES, train_tokenizer

    sources = open_sources(data, cache)
    if batch_size > (examples := sum(map(len, sources))):
        log.warning("a batch of %s is asked for, but the sources hold %s examples: it has these", batch_size, examples)
    plan = BatchPlan(sources, min(batch_size, examples), seed, 0, data.batching, data.mixture)
    build = BatchBuilder(
        sources, tokenizer or TextTokenizer(train_tokenizer([], BYTES + 2), LARGEST), spec,
        row_length=data.row_length or data.max_length, hard_negatives=data.hard_negatives, seed=seed, shards=1,
        distinct=data.batching.no_duplicates,
    )  # fmt: skip
    of_source, _ = ExampleIndex(sources).locate(plan[0])
    for source, example in zip(of_source, build.examples(0, plan[0]), strict=True):
        texts, prompts = build.texts([example])
        characters = (len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
        seen = tokenizer.read_back(texts, prompts) if tokenizer else zip(prompts, texts, characters, strict=True)
        for role, (prompt, text, length) in zip(roles(texts), seen, strict=True):
            yield sources[source].name, role, prompt, text, length


def convert(data: DataConfig, cache: Path, targets: Sequence[Sequence[Path]], pairs: bool = False) -> int:
    """Writes the rows of every source, under our names of their fields, evenly into its files; returns how many there are.

    With `pairs` they are those of the main format that its examples make, as they are of documents always. All sources are
    opened before anything is written, and all files are whole or none is there.
    """
    opened = _examples(data, cache) if pairs else [_rows(source, data, cache) for source in data.sources]
    with ExitStack() as all_whole:
        for of_source, (count, rows) in zip(targets, opened, strict=True):
            ends = [count * (i + 1) // len(of_source) for i in range(len(of_source))]
            for target, start, end in zip(of_source, [0, *ends], ends, strict=False):
                written = tqdm(islice(rows, end - start), f"writing {target}", end - start, unit="row", delay=2, leave=False)
                try:
                    unfinished = all_whole.enter_context(written_whole(target))
                    WRITERS[target.suffix](unfinished, map(_fields, written))
                except OSError as error:
                    raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    return sum(count for count, _ in opened)


Counted = tuple[int, Iterator[Row]]


def _examples(data: DataConfig, cache: Path) -> list[Counted]:
    """What the examples of every source make in the main format."""
    return [(sum(1 for _ in source.as_pairs()), source.as_pairs()) for source in open_sources(data, cache)]


def _rows(source: SourceConfig, data: DataConfig, cache: Path) -> Counted:
    """The rows of a source as they are; of documents, whose fields are not ours, the pairs."""
    kind, rows = open_rows(source, data.python_packages, cache)
    if kind == "documents":
        return _examples(data.model_copy(update={"sources": (source,)}), cache)[0]
    return len(rows), iter_rows(rows)


def _fields(row: Row) -> Mapping[str, Any]:
    return {name: row[name] for name in typing.get_args(RowField) if name in row}
