"""BM25, the lexical baseline for trained embedders."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.search.terms import make_term_splitter

# A baseline should be hard to beat, so every choice here and in `make_term_splitter` is the best of those tried on
# docstring -> function retrieval, scored on the same texts. Gains of nDCG@10: 0.055 without stop words, 0.02 without
# endings, 0.005 with b = 0.9.
K1, B = 1.2, 0.9
NUM_CANDIDATES = 20  # best-scoring documents whose similarity is computed


def rank_documents(corpus: Sequence[str], queries: Sequence[str], k: int) -> np.ndarray:
    """Rank the documents of a corpus for each query by BM25 (Lucene's variant). Needs bm25s and regex.

    Texts are compared by their terms (`make_term_splitter`).

    Returns:
        Indices of the k best documents of each query, best first, int64 [Q, min(k, len(corpus))].

    Raises:
        UserError: bm25s is not installed.
    """
    return Bm25Index(corpus).search(queries, k)[0]


class Bm25Index:
    """A BM25 index of a corpus (Lucene's variant). Needs bm25s and regex."""

    def __init__(self, corpus: Sequence[str]):
        """Index the documents. Raise `UserError` if bm25s is not installed."""
        self._index = _make_index()
        self._list_terms = make_term_splitter()
        self._size = len(corpus)
        terms = [self._list_terms(text) for text in corpus]
        self._has_terms = any(terms)
        if self._has_terms:
            self._index.index(terms, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return indices and scores of the k best documents of each query, best first, int64 and float32 [Q, min(k, N)]."""
        k = min(k, self._size)
        if not self._has_terms:
            return np.tile(np.arange(k), (len(queries), 1)), np.zeros((len(queries), k), np.float32)
        query_terms = [self._list_terms(query) for query in queries]
        best, scores = self._index.retrieve(query_terms, k=k, show_progress=False)
        return best.astype(np.int64), np.asarray(scores, np.float32)


def _make_index() -> Any:
    """Return an empty index. Raise `UserError` if bm25s is not installed."""
    check_bm25_installed()
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets a lower level
    return bm25s.BM25(method="lucene", k1=K1, b=B)


class Bm25Similarity:
    """Similarity of texts to the documents of a corpus, from 0 to 1, by the weights that BM25 gives to their terms.

    BM25 alone is not symmetric: a long text that contains all words of a short document scores as high as the document itself.
    So for each of the two texts, the score of the shared terms is divided by the score of all its terms. The similarity is the
    smaller quotient: 1 for texts with equal terms. Needs bm25s and regex.
    """

    def __init__(self, corpus: Sequence[str]):
        """Index the documents. Raise `UserError` if bm25s is not installed."""
        self._index = _make_index()
        self._list_terms = make_term_splitter()
        self._counts = [Counter(self._list_terms(text)) for text in corpus]
        self._frequencies = Counter(term for counts in self._counts for term in counts)
        self._mean_length = max(sum(map(Counter.total, self._counts)) / max(len(corpus), 1), 1.0)
        if self._frequencies:
            self._index.index([list(counts.elements()) for counts in self._counts], show_progress=False)

    def find_most_similar(self, text: str) -> tuple[int, float]:
        """Return the index of the document that is most similar to a text, and the similarity; (-1, 0.0) without one."""
        counts = Counter(self._list_terms(text))
        known_terms = [term for term in counts if term in self._frequencies]
        if not known_terms:
            return -1, 0.0
        scores = self._index.get_scores(known_terms)
        candidates = np.argsort(-scores, kind="stable")[:NUM_CANDIDATES].tolist()
        weights = self._weigh(counts)
        similarities = [(self._compare(weights, self._weigh(self._counts[index])), -index) for index in candidates]
        similarity, negative_index = max(similarities)
        return -negative_index, similarity

    def _weigh(self, counts: Counter[str]) -> dict[str, float]:
        """Return the BM25 weight of each term of a text, given its term counts."""
        length = 1 - B + B * counts.total() / self._mean_length
        return {term: self._inverse_frequency(term) * count / (count + K1 * length) for term, count in counts.items()}

    def _inverse_frequency(self, term: str) -> float:
        frequency = self._frequencies[term]
        return math.log(1 + (len(self._counts) - frequency + 0.5) / (frequency + 0.5))

    def _compare(self, first: dict[str, float], second: dict[str, float]) -> float:
        shared_terms = [term for term in first if term in second]
        totals = [math.fsum(weights.values()) for weights in (first, second)]
        return min(math.fsum(w[term] for term in shared_terms) / t for w, t in zip((first, second), totals, strict=True) if t)


def check_bm25_installed() -> None:
    """Raise `UserError` if bm25s is not installed. It is a part of the optional dependencies for evaluation."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        raise UserError("BM25: bm25s is not installed. Run pip install '.[eval]'.") from None
