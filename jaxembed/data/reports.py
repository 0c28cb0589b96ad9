"""Reports about training sources: their bad rows, their statistics, and their first batch."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxembed.config import DataConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.equality import hash_text, normalize_text
from jaxembed.data.labels import LabelSampler
from jaxembed.data.rows import MissingColumnError, iter_checked_rows
from jaxembed.data.schema import Row
from jaxembed.data.sources import Source, build_schema, open_source, open_source_container, open_sources
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError

MAX_LISTED = 20  # bad rows of a source, and labels, that a report lists
MAX_MEASURED_ROWS = 10_000  # evenly spread examples of a source whose texts are measured; more, if some make several pairs
# The status of a source.
USABLE, UNREACHABLE, MISSING_COLUMN, BAD_ROWS, REFUSED = "ok", "unreachable", "missing column", "bad rows", "refused"
STATUS_CHARS = len(MISSING_COLUMN)  # the longest status
log = logging.getLogger(__name__)

CountLengths = Callable[[list[str]], np.ndarray]  # N texts -> their lengths [N]


class PreviewText(NamedTuple):
    """A text of a batch: source, role, prompt, text, and its length in tokens or characters."""

    source: str
    role: str
    prompt: str
    text: str
    length: int


def validate_sources(data: DataConfig, cache: Path) -> dict[str, Any]:
    """Open every source as training does and report its rows, its examples, and its bad rows.

    Returns:
        "sources" with one report per source, and "bad_rows" with the total. A source that training refuses has at least one
        bad row. Its "problems" lists the first ones, and its "status" is their kind.
    """
    reports = [_validate_source(source, cache) for source in data.sources]
    return {"sources": reports, "bad_rows": sum(report["bad_rows"] for report in reports)}


def _validate_source(source: SourceConfig, cache: Path) -> dict[str, Any]:
    try:
        return {**_count_rows(open_source(source, cache)), "status": USABLE, "bad_rows": 0, "problems": []}
    except UserError as error:
        return {"source": _name_or_path(source), **_find_problems(source, str(error))}


def _find_problems(source: SourceConfig, refusal: str) -> dict[str, Any]:
    """Report the bad rows of a source that training refuses. If no row is bad, the refusal counts as one."""
    format_name: str = source.format
    num_rows, problems, status = 0, list[str](), UNREACHABLE
    try:
        format_name, container = open_source_container(source)
        status = REFUSED
        rows = iter_checked_rows(container, build_schema(format_name, source).check, source.columns) if container else ()
        for _, _, row in rows:
            num_rows += 1
            if isinstance(row, UserError):
                status = BAD_ROWS
                problems.append(str(row))
    except MissingColumnError as error:  # the reason for the bad rows
        status = MISSING_COLUMN
        problems.insert(0, str(error))
    except UserError as error:  # nothing after it can be read
        problems.append(str(error))
    problems = problems or [refusal]
    return {
        "format": format_name,
        "rows": num_rows,
        "examples": 0,
        "status": status,
        "bad_rows": len(problems),
        "problems": problems[:MAX_LISTED],
    }


def format_validation_table(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one line per source of `validate_sources`: its name, its status, its rows, and its first problem."""
    names = [str(report["source"]) for report in reports]
    width = max(map(len, names))
    for name, report in zip(names, reports, strict=True):
        rows = f"{report['rows']:,}" if report["rows"] else "-"
        yield f"{name:{width}}  {report['status']:{STATUS_CHARS}}  {rows:>12}  {''.join(report['problems'][:1])}".rstrip()


def _count_rows(source: Source) -> dict[str, Any]:
    """Return a source's name, its format, its rows, and the examples that training draws from."""
    return {
        "source": _name_or_path(source.config),
        "format": source.format,
        "rows": source.row_count,
        "examples": len(source),
    }


def _name_or_path(source: SourceConfig) -> str:
    return source.name or source.path


def compute_stats(data: DataConfig, cache: Path, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Compute statistics of the examples that training draws from, and of the texts that each pair of sources shares.

    A text of a source of labels counts with one positive and one negative. Lengths are those of texts without instructions.
    Memory grows by 8 bytes for every query, text and pair.

    Args:
        data: The sources.
        cache: Folder for the row indexes.
        tokenizer: Counts tokens. None: lengths are in characters.
    """

    def count_lengths(texts: list[str]) -> np.ndarray:
        if tokenizer is None:
            return np.array([len(text) for text in texts])
        return tokenizer.count_untruncated_tokens(texts, [""] * len(texts))

    # The statistics of each source.
    reports, hashes = [], []
    for source in open_sources(data, cache):
        report, sampler = _count_rows(source), source.sampler
        if drop_counts := {reason: count for reason, count in sampler.drop_counts.items() if count}:
            report["left_out"] = drop_counts
        rows = tqdm(source.iter_pairs(max_texts=1), f"reading {report['source']}", unit="row", delay=2, leave=False)
        source_stats, source_hashes = _summarize_rows(rows, len(source), count_lengths)
        label_stats = _summarize_labels(sampler) if isinstance(sampler, LabelSampler) else {}
        reports.append({**report, **source_stats, **label_stats})
        hashes.append(source_hashes)
    # The numbers of texts that two sources share.
    shared = [
        {
            "sources": [a["source"], b["source"]],
            **{kind: len(np.intersect1d(a_hashes[kind], b_hashes[kind], assume_unique=True)) for kind in a_hashes},
        }
        for (a, a_hashes), (b, b_hashes) in combinations(zip(reports, hashes, strict=True), 2)
    ]
    return {"lengths_in": "tokens" if tokenizer else "characters", "sources": reports, "shared": shared}


def _summarize_rows(
    rows: Iterable[Row], num_examples: int, count_lengths: CountLengths
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the statistics of a source, and the distinct hashes of its queries and of all its texts."""
    query_hashes, text_hashes, pair_hashes = array("Q"), array("Q"), array("Q")
    num_per_row = {"positives": array("I"), "negatives": array("I")}
    texts_by_role: dict[str, list[str]] = {"query": [], "positive": [], "negative": []}
    step = -(-num_examples // MAX_MEASURED_ROWS)
    for i, row in enumerate(rows):
        query, positives, negatives = row["query"], row["pos"], row.get("neg") or []
        query_hashes.append(_hash(query))
        text_hashes.extend(map(_hash, (query, *positives, *negatives)))
        pair_hashes.extend(_hash(f"{normalize_text(query)}\0{normalize_text(positive)}") for positive in positives)
        num_per_row["positives"].append(len(positives))
        num_per_row["negatives"].append(len(negatives))
        if i % step == 0:
            for role, texts in zip(texts_by_role, ((query,), positives, negatives), strict=True):
                texts_by_role[role].extend(texts)
    queries, texts, pairs = (np.unique(np.asarray(hashes)) for hashes in (query_hashes, text_hashes, pair_hashes))
    stats: dict[str, Any] = {
        "duplicate_queries": len(query_hashes) - len(queries),
        "duplicate_pairs": len(pair_hashes) - len(pairs),
        "a_row": {kind: _summarize(np.asarray(counts)) for kind, counts in num_per_row.items()},
        "lengths": {role: _summarize(count_lengths(texts)) for role, texts in texts_by_role.items() if texts},
    }
    return stats, {"queries": queries, "texts": texts}


def _summarize_labels(sampler: LabelSampler) -> dict[str, Any]:
    return {
        "label_documents": "labels" if sampler.label_texts else "examples",
        "labels": len(sampler.rows_per_label),
        "largest_labels": dict(sampler.rows_per_label.most_common(MAX_LISTED)),
    }


def _summarize(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(values.mean()), 2), "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95, method="higher")), "most": float(values.max()),
    }  # fmt: skip


def _hash(text: str) -> int:
    return int(hash_text(text).view(np.uint64)[0])


def preview_batch(
    data: DataConfig, cache: Path, batch_size: int, seed: int, spec: EmbeddingSpec, tokenizer: TextTokenizer | None
) -> Iterator[PreviewText]:
    """Yield every text of the first training batch.

    Args:
        data: The sources, and how batches are drawn.
        cache: Folder for the row indexes.
        batch_size: Queries of the batch.
        seed: Training seed.
        spec: How texts become inputs.
        tokenizer: Truncates texts and counts tokens. None: texts are complete, and lengths are in characters.
    """
    # These import JAX, which the other reports do not need.
    from jaxembed.config.fields import MAX_INTEGER
    from jaxembed.data.batch_plan import BatchPlan
    from jaxembed.data.batch_sampler import BatchSampler, assign_roles
    from jaxembed.data.bpe import BYTE_TOKENS, train_tokenizer

    sources = open_sources(data, cache)
    if batch_size > (num_examples := sum(map(len, sources))):
        log.warning("--batch-size: the sources have only %s examples (found %s); all are shown", num_examples, batch_size)
    plan = BatchPlan(sources, min(batch_size, num_examples), seed, 0, data.batching, data.mixture)
    sampler = BatchSampler(
        sources=sources,
        tokenizer=tokenizer or TextTokenizer(train_tokenizer([], BYTE_TOKENS + 2), spec.replace(max_length=MAX_INTEGER)),
        hard_negatives=data.hard_negatives,
        seed=seed,
        no_duplicates=data.batching.no_duplicates,
    )
    source_indices, _ = sampler.index.locate(plan[0])
    for source_index, example in zip(source_indices, sampler.sample(0, plan[0]), strict=True):
        texts, prompts = sampler.list_texts([example])
        lengths = (len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
        inputs = tokenizer.decode_inputs(texts, prompts) if tokenizer else zip(prompts, texts, lengths, strict=True)
        for role, (prompt, text, length) in zip(assign_roles(texts), inputs, strict=True):
            yield PreviewText(sources[source_index].name, role, prompt, text, length)
