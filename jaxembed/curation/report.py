"""What mining did: counts, histograms and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.curation.mining import LONGEST, Mined, Result
from jaxembed.curation.pool import Pool, Row
from jaxembed.curation.rules import Rule

BINS = 20
SAMPLES, SHOWN = 5, 300  # of each kind, and characters of a text


def summary(pool: Pool, result: Result, rule: Rule) -> dict[str, Any]:
    """Counts. A row is short where fewer candidates than wanted passed the rule."""
    found = np.array([row.mined for row in result.rows], np.int64)
    return {
        "rows": len(pool.rows),
        "written": len(result.rows),
        "dropped": {**{reason: n for reason, n in pool.dropped.items() if n}, "inconsistent": len(result.inconsistent)},
        "positives": sum(len(row.positives) for row in result.rows),
        "inconsistent_positives": sum(len(row.positives) for row in pool.rows) - sum(len(row.positives) for row in result.rows),
        "queries": len(pool.queries),
        "corpus": pool.searched,
        "blank_documents": pool.blank,
        "cut_texts": sum(len(text) > LONGEST for text in [*pool.documents, *(query.text for query in pool.queries)]),
        "negatives": int(found.sum()),
        "short_rows": int((found < rule.negatives).sum()),
        "missing_negatives": int((rule.negatives - found).sum()),
        "rows_without_negatives": sum(not row.negatives for row in result.rows),
        **({} if result.recall is None else {"recall": round(result.recall, 6)}),
        **({} if found.any() else {"warning": f"nothing was mined: no query has a candidate that passes {rule.limit}"}),
    }


def details(pool: Pool, result: Result) -> dict[str, Any]:
    """Histograms of the scores that were written, and rows that were kept and dropped, spread over the input."""
    scores = {
        "positive": np.concatenate([np.zeros(0), *(row.positive_scores for row in result.rows)]),
        "negative": np.concatenate([np.zeros(0), *(row.negative_scores for row in result.rows)]),
    }
    everything = np.concatenate(list(scores.values()))
    edges = np.histogram_bin_edges(everything, BINS)
    counts = {name: np.histogram(of_kind, edges)[0].tolist() for name, of_kind in scores.items()}
    kept = [_shown(line(pool, row)) for row in _spread(result.rows)]
    dropped = [_shown(_texts(pool, row)) for row in _spread(result.inconsistent)]
    return {"scores": {"edges": edges.round(6).tolist(), **counts}, "samples": {"kept": kept, "inconsistent": dropped}}


def line(pool: Pool, mined: Mined) -> dict[str, Any]:
    """A row in the main format."""
    texts = _texts(pool, mined.row._replace(positives=mined.positives))
    negatives = [pool.documents[number] for number in mined.negatives]
    scores = {"pos_scores": mined.positive_scores, "neg_scores": mined.negative_scores}
    return {**texts, "neg": negatives, **{name: np.round(x.astype(float), 6).tolist() for name, x in scores.items()}}


def _texts(pool: Pool, row: Row) -> dict[str, Any]:
    query = pool.queries[row.query]
    prompt = {"prompt": query.instruction} if query.instruction else {}
    return {"query": query.text, **prompt, "pos": [pool.documents[number] for number in row.positives]}


def _spread(rows: Sequence[Any]) -> list[Any]:
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SAMPLES).astype(int))] if rows else []


def _shown(texts: dict[str, Any]) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        return [cut(text) for text in value] if isinstance(value, list) else value[:SHOWN] if isinstance(value, str) else value

    return {name: cut(value) for name, value in texts.items()}
