"""Steps that search the documents of an input: retrieval of candidates for a query, and round-trip filtering of queries."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxembed.config.synthesis_steps import BM25, RetrieveStepConfig, RoundTripStepConfig
from jaxembed.data.beir import join_title_and_text
from jaxembed.data.equality import normalize_text
from jaxembed.data.schema import check_passage
from jaxembed.errors import UserError
from jaxembed.search.bm25 import Bm25Index
from jaxembed.synthesis.drafts import Draft, fill_template
from jaxembed.synthesis.inputs import InputRows
from jaxembed.synthesis.steps import Step, TaskContext

if TYPE_CHECKING:
    from jaxembed.hub.embedder import Embedder

QUERIES_PER_CALL = 64  # queries encoded in one batch
CANDIDATES_FIELD = "candidates"  # field of a draft: the indices of the retrieved documents
NOT_FOUND = "its query does not find its document"


class DocumentIndex:
    """The documents of an input, searched by BM25 or by the vectors of a model. The index is built at the first search.

    Attributes:
        documents: Rows of the input.
        texts: Title and text of each document.
    """

    def __init__(self, input_name: str, documents: InputRows, retriever: str):
        """Check the documents.

        Args:
            input_name: Name of the input.
            documents: Its rows.
            retriever: bm25, or a MODEL.

        Raises:
            UserError: A row has no text.
        """
        for row_number, document in enumerate(documents, 1):
            if problem := check_passage(document):
                raise UserError(f"inputs.{input_name}: row {row_number}: {problem}. Rows that are searched need a text.")
        self.documents, self._retriever = documents, retriever
        self.texts = [join_title_and_text(document) for document in documents]

    def search(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """Return the indices of the k nearest documents of each query, nearest first.

        BM25 leaves out documents that have no term in common with the query.
        """
        if self._retriever == BM25:
            ranked = zip(*self._bm25.search(queries, k), strict=True)
            return [[int(i) for i, score in zip(indices, scores, strict=True) if score > 0] for indices, scores in ranked]
        from jaxembed.search.nearest import search

        return search(self._encode(queries, "query"), self._vectors, k).indices.tolist()

    @functools.cached_property
    def _bm25(self) -> Bm25Index:
        return Bm25Index(self.texts)

    @functools.cached_property
    def _embedder(self) -> Embedder:
        from jaxembed.hub.embedder import Embedder

        return Embedder.load(self._retriever)

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        return self._encode(self.texts, "document", show_progress=True)

    def _encode(self, texts: Sequence[str], prompt_name: str, show_progress: bool = False) -> np.ndarray:
        """Return the vectors of texts, with the model's stored prompt of that name if it has one."""
        embedder = self._embedder
        name = prompt_name if prompt_name in embedder.spec.prompts else None
        return embedder.encode(texts, prompt_name=name, show_progress=show_progress)


class RetrieveStep(Step):
    """Adds the indices of the documents nearest to a query to a draft, as the field `candidates`."""

    def __init__(self, config: RetrieveStepConfig, context: TaskContext, index: DocumentIndex):
        """Start without drafts."""
        super().__init__(config)
        self._config, self._context, self._index = config, context, index

    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts with candidates."""
        config = self._config
        for draft, candidates in search_drafts(self.iter_inputs(drafts), config.query, self._index, config.k, self._context):
            yield self.count_output(draft.add_fields(self.name, {CANDIDATES_FIELD: candidates}))


class RoundTripStep(Step):
    """Keeps the drafts whose query retrieves the document that it was written for, or one with an equal text."""

    def __init__(self, config: RoundTripStepConfig, context: TaskContext, index: DocumentIndex):
        """Start without drafts."""
        super().__init__(config)
        self._config, self._context, self._index = config, context, index

    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts whose query retrieves their document."""
        config, texts = self._config, self._index.texts
        for draft, found in search_drafts(self.iter_inputs(drafts), config.query, self._index, config.k, self._context):
            source = draft.source_index
            if source in found or normalize_text(texts[source]) in {normalize_text(texts[i]) for i in found}:
                yield self.count_output(draft)
            else:
                self.counts.dropped[NOT_FOUND] += 1


def search_drafts(
    drafts: Iterator[Draft], query: str, index: DocumentIndex, k: int, context: TaskContext
) -> Iterator[tuple[Draft, list[int]]]:
    """Yield each draft with the indices of the documents nearest to its query. Queries are searched in batches."""
    while batch := list(itertools.islice(drafts, min(context.get_max_in_progress(), QUERIES_PER_CALL))):
        yield from zip(batch, index.search([fill_template(query, draft) for draft in batch], k), strict=True)
