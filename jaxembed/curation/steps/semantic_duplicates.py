"""The step `duplicates`, semantic: drops texts whose vectors are close to that of a kept text.

SemDeDup (Abbas et al. 2023, arXiv:2303.09540) drops items by the cosine of their vectors within clusters. Here the neighbors
are those of an exact search over all texts:

1. Texts are sorted by priority, then by a hash of their row.
2. A text is dropped if its cosine with a kept text before it reaches the threshold. So each dropped text has a kept one that
   is similar to it, which connected components would not guarantee, and no two kept texts are similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.curation.mining import SCORE_TOLERANCE
from jaxembed.curation.steps.curated_row import CuratedRow
from jaxembed.curation.steps.items import list_items
from jaxembed.curation.steps.vector_spool import VectorSpool
from jaxembed.data.equality import hash_exact_text, join_normalized
from jaxembed.hub.frozen_encoder import FrozenEncoder
from jaxembed.search.nearest import search

INITIAL_NEIGHBORS = 16  # neighbors of the first search; texts that may have more are searched again
NEIGHBORS_GROWTH = 4  # factor by which each further search returns more neighbors
ITEM_RECORD = np.dtype([("priority", "<u8"), ("row_hash", "<u8"), ("text", "<u8"), ("group", "<u8")])


class SemanticDuplicatesStep:
    """Keeps texts with a cosine below the threshold to every other kept text. Texts that are equal are compared once."""

    def __init__(self, config: DuplicatesStepConfig, folder: Path, encoder: FrozenEncoder, memory_mb: int):
        """Start without rows.

        Args:
            config: The section of the step.
            folder: Empty folder of the vectors.
            encoder: The model.
            memory_mb: Memory of the search in MiB, besides the vectors.
        """
        self._config, self._memory_mb = config, memory_mb
        self._vectors = VectorSpool(folder, encoder, are_queries=config.of == "queries")
        self._parts: list[np.ndarray] = []

    def close(self) -> None:
        """Close the file of vectors."""
        self._vectors.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Encode the items of rows, and record their priorities."""
        items = [(row.source, item) for row in rows for item in list_items(row, self._config)]
        if not items:
            return
        self._vectors.add([item.text for _, item in items])
        records = np.empty(len(items), ITEM_RECORD)
        records["priority"] = [item.priority for _, item in items]
        records["row_hash"] = [item.row_hash for _, item in items]
        records["text"] = [int(hash_exact_text(join_normalized(item.texts)).view("<u8")[0]) for _, item in items]
        records["group"] = [0 if self._config.across_sources else source for source, _ in items]
        self._parts.append(records)

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""
        if not self._parts:
            return np.zeros(0, bool)
        records = np.concatenate(self._parts)
        vectors = self._vectors.read()
        order = np.lexsort((np.arange(len(records)), records["row_hash"], ~records["priority"], records["group"]))
        dropped = np.ones(len(records), bool)
        # In each group, compare only the best item of each distinct text; its exact copies stay dropped.
        for members in np.split(order, np.flatnonzero(np.diff(records["group"][order])) + 1):
            unique_items = members[np.sort(np.unique(records["text"][members], return_index=True)[1])]
            dropped[unique_items] = find_similar(vectors[unique_items], self._config.min_similarity, self._memory_mb)
        return dropped


def find_similar(vectors: Float[np.ndarray, "n d"], threshold: float, memory_mb: int) -> np.ndarray:
    """Return whether the cosine of each vector with an earlier one that is not similar itself reaches the threshold, bool [N].

    Args:
        vectors: Unit vectors.
        threshold: Minimum cosine.
        memory_mb: Memory of the search in MiB.
    """
    is_similar = np.zeros(len(vectors), bool)
    neighbors = find_neighbors(vectors, threshold, memory_mb)
    for number in sorted(neighbors):
        earlier = neighbors[number]
        is_similar[number] = not is_similar[earlier].all()
    return is_similar


def find_neighbors(vectors: Float[np.ndarray, "n d"], threshold: float, memory_mb: int) -> dict[int, np.ndarray]:
    """Return, for each vector, the earlier vectors whose cosine with it reaches the threshold. The search is exact.

    A search returns a fixed number of neighbors. If all neighbors of a vector reach the threshold, it is searched again.
    """
    neighbors: dict[int, np.ndarray] = {}
    pending, count = np.arange(len(vectors)), INITIAL_NEIGHBORS
    while len(pending):
        found = search(vectors[pending], vectors, count, memory_mb=memory_mb, show_progress=True)
        is_near = found.scores >= threshold - SCORE_TOLERANCE
        is_complete = ~is_near[:, -1] | (count >= len(vectors))
        earlier = is_near & (found.indices < pending[:, None])
        for i in np.flatnonzero(is_complete & earlier.any(1)).tolist():
            neighbors[int(pending[i])] = found.indices[i][earlier[i]]
        pending, count = pending[~is_complete], count * NEIGHBORS_GROWTH
    return neighbors
