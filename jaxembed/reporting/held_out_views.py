"""Views of a model on its held-out sets: neighbors of queries, similarities of pairs, a map, attention to latents."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxembed.evaluation.heldout import ClassificationSet, ClusteringSet, HeldOutSet, RetrievalSet, SimilaritySet
from jaxembed.hub.embedder import Embedder

log = logging.getLogger("jaxembed")

SAMPLE_SEED = 0  # two reports of a run show the same samples
MAX_SET_QUERIES = 256  # queries of a set that are searched
MAX_DOCUMENTS = 4096  # documents of a set that are searched
MAX_LISTED_QUERIES = 48  # queries of a set whose neighbors are listed
MAX_LISTED_NEIGHBORS = 10  # documents that are listed for a query
NEGATIVES_PER_QUERY = 5  # hard negatives, and random negatives, of a query in the histograms
MAX_MAP_TEXTS = 1200  # texts on the map
MAX_VIEWED_SETS = 4  # held-out sets of a run that are encoded
MAX_LABELS = 7  # labels of a set with their own color on the map
MAX_LISTED_CHARS = 500  # characters of a listed text
MAX_POINT_CHARS = 240  # characters of a text on the map
HISTOGRAM_BINS = 40
LATENT_TEXTS = 10  # texts of each of the two groups of the heat map
MAX_LATENT_COLUMNS = 160  # pairs of head and latent that the heat map shows

POSITIVES, HARD_NEGATIVES, RANDOM_NEGATIVES = "positives", "hard negatives", "random negatives"


@dataclasses.dataclass(frozen=True)
class EncodedTexts:
    """Texts of one role or label in a held-out set, with their vectors.

    Attributes:
        name: Name of the set, and of the role or label.
        texts: The texts.
        vectors: Their unit vectors, [N, D].
        prompt: The complete prompt that they were encoded with.
    """

    name: str
    texts: Sequence[str]
    vectors: np.ndarray
    prompt: str


@dataclasses.dataclass(frozen=True)
class SetView:
    """The content of a report about a held-out set.

    Attributes:
        name: Name of the set.
        note: How the texts were chosen.
        text_groups: The encoded texts, one group per role or label.
        similarities: Cosines by kind of pair.
        queries: Queries with their neighbors; empty for sets of sentence pairs.
        documents: The texts that `queries` refer to, by their index.
    """

    name: str
    note: str
    text_groups: Sequence[EncodedTexts]
    similarities: Mapping[str, np.ndarray]
    queries: Sequence[Mapping[str, Any]] = ()
    documents: Mapping[int, str] = dataclasses.field(default_factory=dict)


def view_set(held_out: HeldOutSet, embedder: Embedder) -> SetView | None:
    """Encode a sample of a held-out set, and return its view. None: a report has no view of this kind of set."""
    if isinstance(held_out, RetrievalSet):
        return _view_retrieval(held_out, embedder)
    if isinstance(held_out, SimilaritySet):
        return _view_similarity(held_out, embedder)
    if isinstance(held_out, ClassificationSet | ClusteringSet):
        return _view_labels(held_out, embedder)
    log.info("%s: a report has no view of sets of this kind", held_out.config.name)
    return None


def _view_retrieval(held_out: RetrievalSet, embedder: Embedder) -> SetView:
    """Search a sample of the documents for a sample of the queries."""
    rng, config = np.random.default_rng(SAMPLE_SEED), held_out.config
    # Sample queries with a relevant document in the corpus; keep these documents, and add others.
    answerable = [i for i, grades in enumerate(held_out.relevant) if any(row >= 0 for row in grades)]
    query_rows = sample(answerable, MAX_SET_QUERIES, rng)
    relevant_rows = {row for i in query_rows for row in held_out.relevant[i] if row >= 0}
    others = [row for row in range(len(held_out.corpus)) if row not in relevant_rows]
    document_rows = sorted({*relevant_rows, *sample(others, max(MAX_DOCUMENTS - len(relevant_rows), 0), rng)})
    columns = {row: column for column, row in enumerate(document_rows)}
    queries, documents = [held_out.queries[i] for i in query_rows], [held_out.corpus[row] for row in document_rows]
    query_prompt, document_prompt = (part.build_prompt(embedder.spec) for part in held_out.inputs)
    query_vectors = embedder.encode(queries, prompt=query_prompt)
    document_vectors = embedder.encode(documents, prompt=document_prompt)
    # The ranking of the documents for each query.
    scores = query_vectors @ document_vectors.T
    is_relevant = np.zeros(scores.shape, bool)
    for q, i in enumerate(query_rows):
        is_relevant[q, [columns[row] for row in held_out.relevant[i] if row >= 0]] = True
    order = np.argsort(-scores, axis=1, kind="stable")
    query_views = [
        describe_query(queries[q], scores[q], is_relevant[q], order[q]) for q in range(min(len(queries), MAX_LISTED_QUERIES))
    ]
    neighbor_columns = {n["document"] for query in query_views for n in query["neighbors"]}
    return SetView(
        name=config.name,
        note=f"{len(queries):,} of {len(held_out.queries):,} queries, {len(documents):,} of {len(held_out.corpus):,} documents",
        text_groups=[
            EncodedTexts(f"{config.name}: queries", queries, query_vectors, query_prompt),
            EncodedTexts(f"{config.name}: documents", documents, document_vectors, document_prompt),
        ],
        similarities=compare_pairs(scores, is_relevant, order, rng),
        queries=query_views,
        documents={column: truncate(documents[column], MAX_LISTED_CHARS) for column in sorted(neighbor_columns)},
    )


def describe_query(
    query: str, scores: Float[np.ndarray, " n"], is_relevant: Any, order: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """Return a query, the rank of its first relevant document (from 1), and its nearest documents.

    The first relevant document is always listed, with its rank.

    Args:
        query: Text of the query.
        scores: Cosine of every document.
        is_relevant: Whether each document is relevant, bool [N].
        order: Indices of the documents, best first.
    """
    rank = int(np.flatnonzero(is_relevant[order])[0]) + 1
    ranks = [*range(1, min(MAX_LISTED_NEIGHBORS, len(order)) + 1)]
    neighbors = [
        {"document": int(d := order[r - 1]), "rank": r, "score": round(float(scores[d]), 4), "relevant": bool(is_relevant[d])}
        for r in (ranks if rank in ranks else [*ranks, rank])
    ]
    return {"text": truncate(query, MAX_LISTED_CHARS), "rank": rank, "neighbors": neighbors}


def compare_pairs(
    scores: Float[np.ndarray, "q n"], is_relevant: Any, order: Int[np.ndarray, "q n"], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return the cosines of queries with relevant documents, with the nearest other ones, and with random other ones.

    Args:
        scores: Cosine of every query and document.
        is_relevant: Whether each document is relevant to each query, bool [Q, N].
        order: Indices of the documents of each query, best first.
        rng: Draws the random documents.
    """
    hard, random = [], []
    for row, relevant, ranking in zip(scores, is_relevant, order, strict=True):
        irrelevant = ranking[~relevant[ranking]]
        hard += list(row[irrelevant[:NEGATIVES_PER_QUERY]])
        random += list(row[sample(irrelevant, NEGATIVES_PER_QUERY, rng)])
    cosines = {POSITIVES: scores[is_relevant], HARD_NEGATIVES: np.array(hard), RANDOM_NEGATIVES: np.array(random)}
    return {kind: values for kind, values in cosines.items() if len(values)}


def _view_similarity(held_out: SimilaritySet, embedder: Embedder) -> SetView:
    """Compare the sentences of a sample of the pairs. A pair of sentences from different pairs is random."""
    rng, config = np.random.default_rng(SAMPLE_SEED), held_out.config
    rows = sample(range(len(held_out.first)), MAX_DOCUMENTS // 2, rng)
    first, second = ([side[i] for i in rows] for side in (held_out.first, held_out.second))
    prompt = held_out.inputs[0].build_prompt(embedder.spec)
    first_vectors, second_vectors = (embedder.encode(texts, prompt=prompt) for texts in (first, second))
    cosines, grades = np.sum(first_vectors * second_vectors, axis=1), held_out.scores[rows]
    middle = (grades.min() + grades.max()) / 2
    kinds = {
        f"pairs with a score above {middle:g}": cosines[grades > middle],
        f"pairs with a score up to {middle:g}": cosines[grades <= middle],
        "random pairs": np.sum(first_vectors * np.roll(second_vectors, 1, axis=0), axis=1),
    }
    return SetView(
        name=config.name,
        note=f"{len(rows):,} of {len(held_out.first):,} pairs",
        text_groups=[EncodedTexts(config.name, [*first, *second], np.concatenate([first_vectors, second_vectors]), prompt)],
        similarities={kind: values for kind, values in kinds.items() if len(values)},
    )


def _view_labels(held_out: ClassificationSet | ClusteringSet, embedder: Embedder) -> SetView:
    """Compare random pairs of texts, with the same label or with different ones."""
    rng, config = np.random.default_rng(SAMPLE_SEED), held_out.config
    rows = sample(range(len(held_out.texts)), MAX_MAP_TEXTS, rng)
    texts, labels = [held_out.texts[i] for i in rows], held_out.labels[rows]
    prompt = held_out.inputs[0].build_prompt(embedder.spec)
    vectors = embedder.encode(texts, prompt=prompt)
    # One group of texts for each of the most frequent labels, and one for the others.
    names, counts = np.unique(labels, return_counts=True)
    shown_labels = names[np.argsort(-counts, kind="stable")[:MAX_LABELS]]
    groups = {f"{config.name}: label {label}": np.flatnonzero(labels == label) for label in shown_labels}
    groups[f"{config.name}: other labels"] = np.flatnonzero(~np.isin(labels, shown_labels))
    # The cosines of random pairs.
    other = rng.permutation(len(texts))
    cosines, is_same = np.sum(vectors * vectors[other], axis=1), labels == labels[other]
    is_pair = other != np.arange(len(texts))
    kinds = {"pairs with the same label": cosines[is_pair & is_same], "pairs with other labels": cosines[is_pair & ~is_same]}
    return SetView(
        name=config.name,
        note=f"{len(rows):,} of {len(held_out.texts):,} texts",
        text_groups=[
            EncodedTexts(name, [texts[i] for i in members], vectors[members], prompt)
            for name, members in groups.items()
            if len(members)
        ],
        similarities={kind: values for kind, values in kinds.items() if len(values)},
    )


def sample(items: Any, count: int, rng: np.random.Generator) -> list[Any]:
    """Return at most `count` of the items, in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def truncate(text: str, max_chars: int) -> str:
    """Return a text of at most `max_chars` characters."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def make_histogram_rows(similarities: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return a histogram with equal bins for all kinds of pairs: rows of kind, start, end and share of the kind's pairs."""
    values = np.concatenate(list(similarities.values()))
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1e-6, HISTOGRAM_BINS + 1)
    rows = []
    for kind, cosines in similarities.items():
        counts, _ = np.histogram(cosines, edges)
        rows += [
            {"kind": kind, "start": float(start), "end": float(end), "share": float(count / len(cosines)), "pairs": int(count)}
            for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    return rows


def project_texts(text_groups: Sequence[EncodedTexts]) -> tuple[list[dict[str, Any]], float]:
    """Project a sample of texts onto the two principal axes of their vectors.

    Args:
        text_groups: The texts, each group in its own color. The same number is sampled from each, if it has that many.

    Returns:
        Points of x, y, source and text, and the share of the variance that the two axes explain.
    """
    rng = np.random.default_rng(SAMPLE_SEED)
    samples = [(group, sample(range(len(group.texts)), MAX_MAP_TEXTS // len(text_groups), rng)) for group in text_groups]
    vectors = np.concatenate([group.vectors[rows] for group, rows in samples]).astype(np.float64)
    centered = vectors - vectors.mean(axis=0)
    _, scales, axes = np.linalg.svd(centered, full_matrices=False)
    coordinates = centered @ axes[:2].T
    coordinates = np.pad(coordinates, ((0, 0), (0, 2 - coordinates.shape[1])))
    variance = float((scales[:2] ** 2).sum() / max((scales**2).sum(), 1e-12))
    names = [(group.name, truncate(group.texts[row], MAX_POINT_CHARS)) for group, rows in samples for row in rows]
    points = [
        {"x": round(float(x), 4), "y": round(float(y), 4), "source": name, "text": text}
        for (x, y), (name, text) in zip(coordinates, names, strict=True)
    ]
    return points, variance


def compute_latent_attention(text_groups: Sequence[EncodedTexts], embedder: Embedder) -> tuple[list[dict[str, Any]], str]:
    """Return the attention of some texts to the latents (NV-Embed, Lee et al. 2024, appendix C).

    Args:
        text_groups: The texts. Only the first two groups are used.
        embedder: A model with latent attention.

    Returns:
        Cells of text, source, head, latent and weight, and a note on which columns are shown: those pairs of head and latent
        whose weight differs most between the texts.
    """
    samples = [(group, list(group.texts[:LATENT_TEXTS])) for group in text_groups[:2]]
    weights = np.concatenate([embedder.latent_weights(texts, prompt=group.prompt) for group, texts in samples])
    heads, latents = weights.shape[1:]
    columns = weights.reshape(len(weights), -1)
    shown_columns = np.sort(np.argsort(-columns.std(axis=0), kind="stable")[:MAX_LATENT_COLUMNS])
    rows = [(group.name, text) for group, texts in samples for text in texts]
    cells = [
        {
            "row": f"{i + 1:02} {source.rpartition(': ')[2]}",
            "source": source, "text": truncate(text, MAX_POINT_CHARS), "column": position,
            "head": int(column // latents) + 1, "latent": int(column % latents) + 1,
            "weight": round(float(columns[i, column]), 6),
        }
        for i, (source, text) in enumerate(rows)
        for position, column in enumerate(shown_columns)
    ]  # fmt: skip
    total, num_shown = heads * latents, len(shown_columns)
    quantity = f"all {total:,}" if num_shown == total else f"the {num_shown:,} of {total:,}"
    criterion = "" if num_shown == total else " whose weight differs most between the texts"
    return cells, f"Columns: {quantity} pairs of head and latent{criterion} ({heads} heads, {latents} latents)."
