"""The step `cluster`: writes the cluster of each row (spherical k-means)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxembed.config.curation_models import ClusterStepConfig
from jaxembed.curation.steps.changes import RowChange
from jaxembed.curation.steps.curated_row import CuratedRow, get_texts, hash_row
from jaxembed.curation.steps.vector_spool import VectorSpool
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import FrozenEncoder
from jaxembed.search.clustering import cluster_vectors


class ClusterStep:
    """Clusters rows by the vectors of their queries or first positives. Memory grows by a vector for each row."""

    def __init__(self, config: ClusterStepConfig, folder: Path, encoder: FrozenEncoder, seed: int):
        """Start without rows.

        Args:
            config: The section of the step.
            folder: Empty folder of the vectors.
            encoder: The model.
            seed: Seed of the first centers.
        """
        self._config, self._seed = config, seed
        self._vectors = VectorSpool(folder, encoder, are_queries=config.of == "queries")
        self._row_hashes: list[int] = []

    def close(self) -> None:
        """Close the file of vectors."""
        self._vectors.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Encode a text of each row."""
        self._vectors.add([self._select_text(row) for row in rows])
        self._row_hashes += [hash_row(row.fields) for row in rows]

    def _select_text(self, row: CuratedRow) -> str:
        """Return the query or the first positive; the query if there is no positive."""
        positives = get_texts(row, "positives") if self._config.of == "positives" else []
        return [*positives, *get_texts(row, "query")][0]

    def iter_changes(self) -> Iterator[RowChange]:
        """Yield the cluster of each row. Raise `UserError` if there are fewer rows than clusters."""
        config, num_rows = self._config, len(self._row_hashes)
        if num_rows < config.clusters:
            raise UserError(f"cluster: clusters is {config.clusters}, but only {num_rows} rows are left. Lower it.")
        vectors = self._vectors.read()
        order = np.argsort(np.array(self._row_hashes, np.uint64), kind="stable")  # the order of rows must make no difference
        labels = np.empty(num_rows, np.int64)
        labels[order] = cluster_vectors(vectors[order], config.clusters, self._seed, config.iterations).labels
        for label in labels.tolist():
            yield RowChange({config.field: label})
