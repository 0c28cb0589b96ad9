"""The report of a mining run: output rows, counts, histograms and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.config import MineConfig
from jaxembed.config.mining import STAGE_KEYS
from jaxembed.curation.mining import MAX_MINED_TEXT_CHARS, MinedRow, MiningOptions, MiningResult
from jaxembed.curation.pool import MiningPool, PoolRow
from jaxembed.curation.rules import format_rule_options

NUM_BINS = 20
SAMPLES_PER_KIND = 5  # rows of each kind
MAX_SAMPLE_TEXT_CHARS = 300  # characters of each text of a sample


def count_outcomes(pool: MiningPool, result: MiningResult, config: MineConfig) -> dict[str, Any]:
    """Return the counts of a mining run.

    A row is short if fewer candidates passed the rule than it requests. If no candidate of any row did, the counts have a
    warning.
    """
    num_mined = np.array([row.num_mined for row in result.rows], np.int64)
    num_positives = sum(len(mined.row.positives) for mined in result.rows)
    texts = [*pool.documents, *(query.text for query in pool.queries)]
    counts = {
        "rows": len(pool.rows),
        "written": len(result.rows),
        "dropped": {
            **{reason: count for reason, count in pool.drop_counts.items() if count},
            "inconsistent": len(result.inconsistent_rows),
        },
        "positives": num_positives,
        "inconsistent_positives": sum(len(row.positives) for row in pool.rows) - num_positives,
        "queries": len(pool.queries),
        "corpus": pool.corpus_size,
        "blank_documents": pool.num_blank_documents,
        "cut_texts": sum(len(text) > MAX_MINED_TEXT_CHARS for text in texts),
        "negatives": int(num_mined.sum()),
        "short_rows": int((num_mined < config.negatives).sum()),
        "missing_negatives": int((config.negatives - num_mined).sum()),
        "rows_without_negatives": sum(not row.negatives for row in result.rows),
    }
    if result.recall is not None:
        counts["recall"] = round(result.recall, 6)
    if not num_mined.any():
        counts["warning"] = f"nothing was mined: no query has a candidate that passes {format_rule_options(config)}"
    return counts


def describe_options(options: MiningOptions) -> dict[str, Any]:
    """Return the options as they are recorded in the report. The keys are a stored format and keep their names."""
    rule = options.config.model_dump(mode="json", exclude={"consistency_top_k", *STAGE_KEYS})
    return {
        "rule": {("name" if key == "rule" else key): value for key, value in rule.items()},
        "seed": options.seed,
        "consistency": options.config.consistency_top_k,
        "keep_negatives": options.keep_negatives,
        "by_bm25": options.rankers == ("bm25",),
        "rankers": list(options.rankers),
        "memory_mb": options.memory_mb,
        "approximate": options.approximate,
    }


def collect_scores_and_samples(pool: MiningPool, result: MiningResult) -> dict[str, Any]:
    """Return histograms of the written scores, and rows that were kept and dropped, spread evenly over the input."""
    scores = {
        "positive": np.concatenate([np.zeros(0), *(row.positive_scores for row in result.rows)]),
        "negative": np.concatenate([np.zeros(0), *(row.negative_scores for row in result.rows)]),
    }
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), NUM_BINS)
    counts = {kind: np.histogram(kind_scores, edges)[0].tolist() for kind, kind_scores in scores.items()}
    kept = [_truncate_texts(to_output_row(pool, row)) for row in _pick_evenly(result.rows)]
    dropped = [_truncate_texts(_restore_texts(pool, row)) for row in _pick_evenly(result.inconsistent_rows)]
    return {"scores": {"edges": edges.round(6).tolist(), **counts}, "samples": {"kept": kept, "inconsistent": dropped}}


def to_output_row(pool: MiningPool, mined: MinedRow) -> dict[str, Any]:
    """Return a mined row as a row of pairs, with the scores of its texts."""
    scores = {"pos_scores": mined.positive_scores, "neg_scores": mined.negative_scores}
    return {
        **_restore_texts(pool, mined.row),
        "neg": [pool.documents[document] for document in mined.negatives],
        **{key: np.round(values.astype(float), 6).tolist() for key, values in scores.items()},
    }


def _restore_texts(pool: MiningPool, row: PoolRow) -> dict[str, Any]:
    query = pool.queries[row.query]
    prompt = {"prompt": query.instruction} if query.instruction else {}
    return {"query": query.text, **prompt, "pos": [pool.documents[document] for document in row.positives]}


def _pick_evenly(rows: Sequence[Any]) -> list[Any]:
    indices = np.unique(np.linspace(0, len(rows) - 1, SAMPLES_PER_KIND).astype(int)) if rows else ()
    return [rows[i] for i in indices]


def _truncate_texts(row: dict[str, Any]) -> dict[str, Any]:
    def truncate(value: Any) -> Any:
        if isinstance(value, list):
            return [truncate(entry) for entry in value]
        return value[:MAX_SAMPLE_TEXT_CHARS] if isinstance(value, str) else value

    return {key: truncate(value) for key, value in row.items()}
