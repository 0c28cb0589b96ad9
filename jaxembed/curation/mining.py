"""Mine hard negatives: search candidates, filter them by rank and score, and keep their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxembed.config import MineConfig, SourceConfig
from jaxembed.config.curation_models import Ranker
from jaxembed.curation.pool import MiningPool, PoolRow
from jaxembed.curation.rules import choose_negatives, format_rule_options
from jaxembed.data.batch import EncodeInputs, EncoderInput
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.hub.cross_encoder import ScorePairs
from jaxembed.search import bm25
from jaxembed.search.fusion import fuse_rankings
from jaxembed.search.nearest import DEFAULT_MEMORY_MB, SearchResult, search

TEXTS_PER_CALL = 2048  # Texts, or pairs of them. What earlier calls computed survives a kill.
MAX_MINED_TEXT_CHARS = 100_000  # texts are truncated before they are encoded
SCORE_TOLERANCE = 1e-6  # documents with scores this close count as equal
RECALL_SAMPLE_QUERIES = 256  # sample that estimates the recall of an approximate search

ScoreIds = Callable[[np.ndarray], np.ndarray]  # (query, document) ids [P, 2] -> scores [P]


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """Options for finding and filtering candidates.

    Attributes:
        config: Rule that selects negatives among the candidates, and filter that removes positives.
        seed: Seed of the sample that estimates the recall.
        keep_negatives: Keep the negatives of the rows, before the mined ones.
        rankers: Rankings that order the candidates: vectors, bm25 and judge. Several are combined by reciprocal rank fusion.
        memory_mb: Memory of the search on each device, in MiB.
        approximate: Search with `jax.lax.approx_max_k`.
        relabel_margin: Replace the positives of a row by the best candidate if its score is this much above theirs. None: keep
            them.
    """

    config: MineConfig
    seed: int = 0
    keep_negatives: bool = False
    rankers: tuple[Ranker, ...] = ("vectors",)
    memory_mb: int = DEFAULT_MEMORY_MB
    approximate: bool = False
    relabel_margin: float | None = None


class MinedRow(NamedTuple):
    """A row with the scores of its positives, and its negatives with their scores. The last `num_mined` negatives are new.

    If `is_relabeled`, its only positive is a candidate that replaced the original positives.
    """

    row: PoolRow
    positive_scores: np.ndarray
    negatives: tuple[int, ...]
    negative_scores: np.ndarray
    num_mined: int
    is_relabeled: bool = False


class MiningResult(NamedTuple):
    """The outcome of mining.

    Attributes:
        rows: Rows of the pool that have a positive left, in its order.
        row_numbers: Position in the pool of each of `rows`.
        inconsistent_rows: Rows that lost all positives to the consistency filter.
        recall: Share of the exact nearest documents that an approximate search found for a sample of the queries, or
            None for an exact search.
    """

    rows: list[MinedRow]
    row_numbers: list[int]
    inconsistent_rows: list[PoolRow]
    recall: float | None


def embed_texts(texts: Sequence[EncoderInput], encode: EncodeInputs, width: int, description: str) -> np.ndarray:
    """Encode texts in parts, so that a cache behind `encode` keeps every finished part.

    Returns:
        Unit vectors, float32 [N, width].
    """
    vectors = np.zeros((len(texts), width), np.float32)
    with progress_bar(total=len(texts), unit="text", desc=description) as bar:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            truncated = [text._replace(text=text.text[:MAX_MINED_TEXT_CHARS]) for text in part]
            vectors[start : start + len(part)] = encode(truncated)
            bar.update(len(part))
    return vectors


def embed_pool(
    pool: MiningPool, config: SourceConfig, encode: EncodeInputs, width: int, prefix: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Encode the queries and documents of a pool. Documents have the first instruction of the source, if it applies to them.

    Args:
        pool: The texts.
        config: The source of the pool.
        encode: Encodes texts with their instructions.
        width: Width of the vectors.
        prefix: Precedes the names of the progress bars.

    Returns:
        Unit vectors of the queries, float32 [Q, width], and of the documents, float32 [N, width].
    """
    instruction = config.get_document_instruction(next(iter(config.instructions), ""))
    documents = [EncoderInput(text, "document", instruction) for text in pool.documents]
    query_vectors = embed_texts(pool.queries, encode, width, f"{prefix}queries")
    return query_vectors, embed_texts(documents, encode, width, f"{prefix}documents")


def make_id_scorer(score_pairs: ScorePairs, pool: MiningPool) -> ScoreIds:
    """Wrap a function that scores pairs of texts so that it scores pairs of ids of a pool."""

    def score_ids(ids: np.ndarray) -> np.ndarray:
        pairs = [(pool.queries[query].text, pool.documents[document]) for query, document in ids.tolist()]
        return score_pairs([(query[:MAX_MINED_TEXT_CHARS], document[:MAX_MINED_TEXT_CHARS]) for query, document in pairs])

    return score_ids


def mine_negatives(
    pool: MiningPool,
    query_vectors: np.ndarray,
    document_vectors: np.ndarray,
    options: MiningOptions,
    rescore: ScoreIds | None = None,
) -> MiningResult:
    """Mine negatives for the rows of a pool.

    The consistency filter removes a positive if `consistency_top_k` documents that are not positives score higher
    (KaLM-Embedding, arXiv:2501.01028: 50. E5, arXiv:2212.03533: 2). It always uses the vectors. It may leave no row.

    Args:
        pool: Rows, queries and documents.
        query_vectors: Unit vectors of the queries [Q, D].
        document_vectors: Unit vectors of the documents [N, D].
        options: How candidates are found and filtered.
        rescore: Scores that replace the cosines, such as those of a cross-encoder. They reorder the candidates.
    """

    def compute_cosines(ids: np.ndarray) -> np.ndarray:
        return np.einsum("pd,pd->p", query_vectors[ids[:, 0]], document_vectors[ids[:, 1]])

    # Search, unless only BM25 finds the candidates and nothing else needs the nearest documents.
    recall: float | None = None
    nearest: list[SearchResult] = []
    top_k = options.config.consistency_top_k
    if top_k or "vectors" in options.rankers:
        nearest, recall = _find_nearest(pool, query_vectors, document_vectors, options)

    # Remove positives that the model does not find.
    rows = pool.rows
    if top_k:
        rows = list(_remove_inconsistent(rows, nearest, compute_cosines, top_k))
    row_numbers = [number for number, row in enumerate(rows) if row.positives]
    kept_rows = [rows[number] for number in row_numbers]
    inconsistent_rows = [before for before, row in zip(pool.rows, rows, strict=True) if not row.positives]
    if not kept_rows:
        return MiningResult([], [], inconsistent_rows, recall)

    # Candidates, each with the score that the rule compares.
    depth = options.config.last_rank
    rankings = list(_iter_rankings(pool, nearest, options))
    candidates = nearest
    if "bm25" in options.rankers:
        fused = [fuse_rankings(query_rankings)[:depth] for query_rankings in zip(*rankings, strict=True)]
        scores = _score_documents(compute_cosines, list(enumerate(fused)), "candidates")
        candidates = [SearchResult(*found) for found in zip(fused, scores, strict=True)]
    score = rescore or compute_cosines
    if rescore is not None:
        candidates = _rerank(candidates, {row.query for row in kept_rows}, depth, rescore)
    if "judge" in options.rankers:
        candidates = [_fuse_order(found, ranked) for found, *ranked in zip(candidates, *rankings, strict=True)]

    # Scores of the positives, better positives, and scores of the negatives that the rows keep.
    positive_scores = _score_documents(score, [(row.query, row.positives) for row in kept_rows], "positives")
    is_relabeled = [False] * len(kept_rows)
    if options.relabel_margin is not None:
        relabeled = _relabel(kept_rows, positive_scores, candidates, options.relabel_margin)
        kept_rows, positive_scores, is_relabeled = map(list, zip(*relabeled, strict=True))
    kept_negatives = [
        tuple(document for document in row.negatives if document not in {*pool.excluded_documents[row.query], *row.positives})
        if options.keep_negatives
        else ()
        for row in kept_rows
    ]
    queries = [row.query for row in kept_rows]
    kept_scores = _score_documents(score, list(zip(queries, kept_negatives, strict=True)), "negatives")

    # Apply the rule.
    per_row = zip(kept_rows, positive_scores, kept_negatives, kept_scores, is_relabeled, strict=True)
    mined_rows = [
        _mine_row(row, pos_scores, negatives, neg_scores, candidates[row.query], options.config)._replace(is_relabeled=better)
        for row, pos_scores, negatives, neg_scores, better in per_row
    ]
    return MiningResult(mined_rows, row_numbers, inconsistent_rows, recall)


def check_first_rank(pool: MiningPool, config: MineConfig, advice: str) -> None:
    """Raise `UserError` if the first rank lies beyond the last candidate. `advice` says what to do."""
    if pool.max_candidates < config.first_rank:
        raise UserError(
            f"{format_rule_options(config)}: negatives start at rank {config.first_rank}, but a query has at most "
            f"{pool.max_candidates} candidates among {pool.corpus_size} documents. {advice}"
        )


def check_rows_left(result: MiningResult, config: MineConfig, key: str) -> None:
    """Raise `UserError` if the consistency filter has left no row. `key` names its setting."""
    if not result.rows:
        top_k = config.consistency_top_k
        raise UserError(f"{key}: no positive is among the {top_k} nearest documents of its query. Raise it.")


def _mine_row(
    row: PoolRow,
    positive_scores: np.ndarray,
    kept_negatives: tuple[int, ...],
    kept_scores: np.ndarray,
    candidates: SearchResult,
    config: MineConfig,
) -> MinedRow:
    """Append the negatives that the rule chooses to those that the row keeps."""
    is_new = ~np.isin(candidates.indices, [*kept_negatives, *row.positives])
    documents, scores = candidates.indices[is_new], candidates.scores[is_new]
    rng = np.random.default_rng(row.draw_seed)
    chosen = choose_negatives(config, scores, float(positive_scores.min()), rng)
    negatives = (*kept_negatives, *documents[chosen].tolist())
    return MinedRow(row, positive_scores, negatives, np.concatenate([kept_scores, scores[chosen]]), len(chosen))


def _find_nearest(
    pool: MiningPool, query_vectors: np.ndarray, document_vectors: np.ndarray, options: MiningOptions
) -> tuple[list[SearchResult], float | None]:
    """Return the nearest corpus documents of each query that may be negatives, and the recall of an approximate search."""
    depth = max(options.config.last_rank, options.config.consistency_top_k)
    corpus, k = document_vectors[: pool.corpus_size], _compute_search_depth(pool, depth)
    found = search(query_vectors, corpus, k, memory_mb=options.memory_mb, approximate=options.approximate, show_progress=True)
    recall = None
    if options.approximate:
        sample = np.random.default_rng(options.seed).permutation(len(query_vectors))[:RECALL_SAMPLE_QUERIES]
        exact = search(query_vectors[sample], corpus, k, memory_mb=options.memory_mb)
        shares = [np.isin(a, b).mean() for a, b in zip(exact.indices, found.indices[sample], strict=True)]
        recall = float(np.mean(shares))
    per_query = zip(found.indices, found.scores, pool.excluded_documents, strict=True)
    return [_remove_excluded(SearchResult(ids, scores), excluded, depth) for ids, scores, excluded in per_query], recall


def _iter_rankings(pool: MiningPool, nearest: list[SearchResult], options: MiningOptions) -> Iterator[list[np.ndarray]]:
    """Yield the candidates of each query, best first, by vectors and by BM25, as the options request."""
    depth = options.config.last_rank
    if "vectors" in options.rankers:
        yield [found.indices[:depth] for found in nearest]
    if "bm25" in options.rankers:
        yield _rank_by_bm25(pool, depth)


def _rank_by_bm25(pool: MiningPool, depth: int) -> list[np.ndarray]:
    """Return the best documents of each query by BM25 that may be negatives, best first.

    Documents without a term of the query are left out.
    """
    queries = [query.text for query in pool.queries]
    index = bm25.Bm25Index(pool.documents[: pool.corpus_size])
    per_query = zip(*index.search(queries, _compute_search_depth(pool, depth)), pool.excluded_documents, strict=True)
    found = ((SearchResult(ids[scores > 0], scores[scores > 0]), excluded) for ids, scores, excluded in per_query)
    return [_remove_excluded(result, excluded, depth).indices for result, excluded in found]


def _compute_search_depth(pool: MiningPool, depth: int) -> int:
    """Return the number of documents to search, so that about `depth` remain after excluded ones are removed."""
    return depth + min(depth, max(map(len, pool.excluded_documents)))


def _remove_excluded(found: SearchResult, excluded: set[int], depth: int) -> SearchResult:
    is_allowed = ~np.isin(found.indices, list(excluded))
    return SearchResult(found.indices[is_allowed][:depth], found.scores[is_allowed][:depth])


def _rerank(candidates: list[SearchResult], queries: set[int], depth: int, score: ScoreIds) -> list[SearchResult]:
    """Reorder the first `depth` candidates by other scores. Queries that are not in `queries` lose their candidates."""
    candidate_ids = [found.indices[: depth if query in queries else 0] for query, found in enumerate(candidates)]
    scores = _score_documents(score, list(enumerate(candidate_ids)), "candidates")
    orders = [np.argsort(-query_scores, kind="stable") for query_scores in scores]
    per_query = zip(candidate_ids, scores, orders, strict=True)
    return [SearchResult(ids[order], query_scores[order]) for ids, query_scores, order in per_query]


def _fuse_order(judged: SearchResult, rankings: Sequence[np.ndarray]) -> SearchResult:
    """Reorder the candidates by reciprocal rank fusion of the judge's ranking and all others."""
    fused = fuse_rankings([judged.indices, *rankings])
    scores = dict(zip(judged.indices.tolist(), judged.scores.tolist(), strict=True))
    documents = [document for document in fused.tolist() if document in scores]
    return SearchResult(np.array(documents, np.int64), np.array([scores[document] for document in documents], np.float32))


def _relabel(
    rows: Sequence[PoolRow], positive_scores: Sequence[np.ndarray], candidates: list[SearchResult], margin: float
) -> Iterator[tuple[PoolRow, np.ndarray, bool]]:
    """Yield each row, the scores of its positives, and whether a better candidate replaced the positives.

    Gecko (Lee et al. 2024, arXiv:2403.20327) takes the best-ranked passage as the positive.
    """
    for row, scores in zip(rows, positive_scores, strict=True):
        found = candidates[row.query]
        best = int(found.scores.argmax()) if len(found.scores) else -1
        if best >= 0 and found.scores[best] > scores.max() + margin:
            yield row._replace(positives=(int(found.indices[best]),)), found.scores[best : best + 1], True
        else:
            yield row, scores, False


def _remove_inconsistent(
    rows: Sequence[PoolRow], nearest: list[SearchResult], score: ScoreIds, top_k: int
) -> Iterator[PoolRow]:
    """Iterate over the rows, without the positives that score lower than `top_k` other documents."""
    scores = _score_documents(score, [(row.query, row.positives) for row in rows], "positives")
    for row, row_scores in zip(rows, scores, strict=True):
        num_above = (nearest[row.query].scores > row_scores[:, None] + SCORE_TOLERANCE).sum(axis=1)
        consistent = tuple(p for p, count in zip(row.positives, num_above, strict=True) if count < top_k)
        yield row._replace(positives=consistent)


def _score_documents(
    score: ScoreIds, documents_per_query: Sequence[tuple[int, Sequence[int] | np.ndarray]], description: str
) -> list[np.ndarray]:
    """Return the scores of the documents of each (query, documents) entry, computed in parts."""
    counts = [len(documents) for _, documents in documents_per_query]
    ids = np.zeros((sum(counts), 2), np.int64)
    ids[:, 0] = np.repeat([query for query, _ in documents_per_query], counts)
    ids[:, 1] = np.concatenate([np.asarray(documents, np.int64) for _, documents in documents_per_query])
    scores = np.zeros(len(ids), np.float32)
    is_short = len(ids) <= TEXTS_PER_CALL
    with progress_bar(total=len(ids), unit="pair", desc=f"scores of {description}", disable=is_short) as bar:
        for start in range(0, len(ids), TEXTS_PER_CALL):
            part = ids[start : start + TEXTS_PER_CALL]
            scores[start : start + len(part)] = score(part)
            bar.update(len(part))
    return np.split(scores, np.cumsum(counts)[:-1])
