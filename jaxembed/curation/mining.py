"""Hard negatives: candidates by search, filtered by rank and rule, with the scores that chose them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxembed.curation.pool import Pool, Row
from jaxembed.curation.rules import Rule
from jaxembed.data.batch import EncodeRaw, RawText
from jaxembed.devices.processes import progress
from jaxembed.errors import UserError
from jaxembed.hub.cross_encoder import ScorePairs
from jaxembed.search import bm25
from jaxembed.search.nearest import MEMORY_MB, Found, search

AT_ONCE = 2048  # texts, or pairs of them, between which a kill loses nothing
LONGEST = 100_000  # characters of a text that is encoded
ROUNDING = 1e-6  # of scores: documents this near score the same
SAMPLE = 256  # queries by which an approximate search is judged

Score = Callable[[np.ndarray], np.ndarray]  # (query, document) numbers [P, 2] -> scores [P]


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """How candidates are found and filtered. `consistency` is the rank that a positive needs, 0 for any."""

    rule: Rule
    seed: int = 0
    consistency: int = 0
    keep_negatives: bool = False
    by_bm25: bool = False
    memory_mb: int = MEMORY_MB
    approximate: bool = False


class Mined(NamedTuple):
    """A row's documents by number, with their scores; the last `mined` of the negatives are new."""

    row: Row
    positives: tuple[int, ...]
    positive_scores: np.ndarray
    negatives: tuple[int, ...]
    negative_scores: np.ndarray
    mined: int


class Result(NamedTuple):
    """`rows` are those of the pool that have a positive left. `recall` is the share of the nearest documents that an
    approximate search found for a sample of the queries.
    """

    rows: list[Mined]
    inconsistent: list[Row]
    recall: float | None


def embed(texts: Sequence[RawText], encode: EncodeRaw, width: int, told: str) -> np.ndarray:
    """Vectors [N, width] of texts, some at a time, so that a cache behind `encode` keeps each part that is done."""
    out = np.zeros((len(texts), width), np.float32)
    with progress(total=len(texts), unit="text", desc=told) as bar:
        for start in range(0, len(texts), AT_ONCE):
            part = texts[start : start + AT_ONCE]
            out[start : start + len(part)] = encode([text._replace(text=text.text[:LONGEST]) for text in part])
            bar.update(len(part))
    return out


def of_texts(score: ScorePairs, pool: Pool) -> Score:
    """Scores of pairs by their texts."""
    return lambda pairs: score([(pool.queries[q].text[:LONGEST], pool.documents[d][:LONGEST]) for q, d in pairs.tolist()])


def mine(pool: Pool, queries: np.ndarray, documents: np.ndarray, ways: MiningOptions, rescore: Score | None = None) -> Result:
    """Negatives for the rows of a pool, given the unit vectors of its queries and documents.

    `rescore` gives candidates another order and all documents other scores, as of a cross-encoder. Consistency is judged by
    the vectors (KaLM-Embedding, arXiv:2501.01028: 50; E5, arXiv:2212.03533: 2): a positive above which `consistency`
    documents score that are no positives leaves its row. `UserError` where that leaves no row.
    """

    def cosines(pairs: np.ndarray) -> np.ndarray:
        return np.einsum("pd,pd->p", queries[pairs[:, 0]], documents[pairs[:, 1]])

    rows, recall = pool.rows, None
    if ways.consistency or not ways.by_bm25:
        nearest, recall = _nearest(pool, queries, documents, ways)
    if ways.consistency:
        rows = list(_consistent(rows, nearest, cosines, ways.consistency))
    found = _by_bm25(pool, cosines, ways.rule.candidates) if ways.by_bm25 else nearest
    score = cosines if rescore is None else rescore
    kept = [row for row in rows if row.positives]
    if not kept:
        raise UserError(f"no positive is among the {ways.consistency} nearest of its query; raise --consistency-top-k")
    if rescore is not None:
        found = _rescored(found, {row.query for row in kept}, ways.rule.candidates, rescore)
    of_positives = _scores(score, [(row.query, row.positives) for row in kept], "positives")
    olds = [_own(row, pool.known[row.query]) if ways.keep_negatives else () for row in kept]
    of_olds = _scores(score, [(row.query, old) for row, old in zip(kept, olds, strict=True)], "negatives")
    mined = [
        _mined(row, scores, old, old_scores, found[row.query], ways.rule)
        for row, scores, old, old_scores in zip(kept, of_positives, olds, of_olds, strict=True)
    ]
    dropped = [before for before, row in zip(pool.rows, rows, strict=True) if not row.positives]
    return Result(mined, dropped, recall)


def _mined(
    row: Row, positive_scores: np.ndarray, old: tuple[int, ...], old_scores: np.ndarray, found: Found, rule: Rule
) -> Mined:
    """A row with its own negatives and, behind them, those that the rule takes of the candidates."""
    new = ~np.isin(found.rows, old)
    rows, scores = found.rows[new], found.scores[new]
    chosen = rule.choose(scores, float(positive_scores.min()), np.random.default_rng(row.draw))
    negatives = (*old, *rows[chosen].tolist())
    return Mined(row, row.positives, positive_scores, negatives, np.concatenate([old_scores, scores[chosen]]), len(chosen))


def _nearest(pool: Pool, queries: np.ndarray, documents: np.ndarray, ways: MiningOptions) -> tuple[list[Found], float | None]:
    """Each query's nearest documents of the corpus that may be negatives, and the recall of an approximate search."""
    depth, corpus = max(ways.rule.candidates, ways.consistency), documents[: pool.searched]
    k = _reach(pool, depth)
    found = search(queries, corpus, k, memory_mb=ways.memory_mb, approximate=ways.approximate, show_progress=True)
    recall = None
    if ways.approximate:
        sample = np.random.default_rng(ways.seed).permutation(len(queries))[:SAMPLE]
        exact = search(queries[sample], corpus, k, memory_mb=ways.memory_mb)
        shares = [np.isin(a, b).mean() for a, b in zip(exact.rows, found.rows[sample], strict=True)]
        recall = float(np.mean(shares))
    return [_allowed(Found(*of_query), known, depth) for *of_query, known in zip(*found, pool.known, strict=True)], recall


def _by_bm25(pool: Pool, score: Score, depth: int) -> list[Found]:
    """Each query's best documents by BM25 that may be negatives, in its order, with the scores of `score`."""
    ranked = bm25.rank(pool.documents[: pool.searched], [query.text for query in pool.queries], _reach(pool, depth))
    places = np.arange(ranked.shape[1])
    allowed = [_allowed(Found(rows, places), known, depth).rows for rows, known in zip(ranked, pool.known, strict=True)]
    return [Found(*both) for both in zip(allowed, _scores(score, list(enumerate(allowed)), "candidates"), strict=True)]


def _reach(pool: Pool, depth: int) -> int:
    """How many documents to ask for, so that `depth` are left without those known to answer a query, or nearly as many."""
    return depth + min(depth, max(map(len, pool.known)))


def _allowed(found: Found, known: set[int], depth: int) -> Found:
    allowed = ~np.isin(found.rows, list(known))
    return Found(found.rows[allowed][:depth], found.scores[allowed][:depth])


def _rescored(found: list[Found], wanted: set[int], most: int, score: Score) -> list[Found]:
    """The first candidates of the wanted queries in the order of other scores."""
    found = [Found(*(x[: most if query in wanted else 0] for x in of_query)) for query, of_query in enumerate(found)]
    scores = _scores(score, [(query, of_query.rows) for query, of_query in enumerate(found)], "candidates")
    orders = [np.argsort(-of_query, kind="stable") for of_query in scores]
    return [Found(f.rows[order], s[order]) for f, s, order in zip(found, scores, orders, strict=True)]


def _consistent(rows: Sequence[Row], nearest: list[Found], score: Score, most: int) -> Iterator[Row]:
    """The rows without the positives above which `most` other documents score."""
    scores = _scores(score, [(row.query, row.positives) for row in rows], "positives")
    for row, of_row in zip(rows, scores, strict=True):
        above = (nearest[row.query].scores > of_row[:, None] + ROUNDING).sum(axis=1)
        yield row._replace(positives=tuple(p for p, count in zip(row.positives, above, strict=True) if count < most))


def _own(row: Row, known: set[int]) -> tuple[int, ...]:
    return tuple(number for number in row.negatives if number not in known)


def _scores(score: Score, asked: Sequence[tuple[int, Sequence[int] | np.ndarray]], told: str) -> list[np.ndarray]:
    """The scores of the documents of each (query, documents)."""
    counts = [len(documents) for _, documents in asked]
    pairs = np.zeros((sum(counts), 2), np.int64)
    pairs[:, 0] = np.repeat([query for query, _ in asked], counts)
    pairs[:, 1] = np.concatenate([np.asarray(documents, np.int64) for _, documents in asked])
    scores = np.zeros(len(pairs), np.float32)
    with progress(total=len(pairs), unit="pair", desc=f"scores of {told}", disable=len(pairs) <= AT_ONCE) as bar:
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            scores[start : start + len(part)] = score(part)
            bar.update(len(part))
    return np.split(scores, np.cumsum(counts)[:-1])
