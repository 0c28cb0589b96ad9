"""The step `mine`: negatives by search, the consistency filter, and better positives, by the miner of `jaxembed mine`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxembed.config.curation_models import MineStepConfig
from jaxembed.curation.mining import (
    MinedRow,
    MiningOptions,
    check_first_rank,
    embed_texts,
    make_id_scorer,
    mine_negatives,
)
from jaxembed.curation.pool import MiningPool, build_pool, read_corpus
from jaxembed.curation.report import to_output_row
from jaxembed.curation.steps.changes import UNCHANGED, RowChange
from jaxembed.curation.steps.curated_row import CuratedRow, get_texts
from jaxembed.data.batch import EncoderInput
from jaxembed.data.schema import Row
from jaxembed.hub.cross_encoder import ScorePairs
from jaxembed.hub.frozen_encoder import FrozenEncoder

RELABELED_POSITIVES, MINED_NEGATIVES = "positives: replaced by a better document", "negatives: mined"


class MinerModels(NamedTuple):
    """The models of a step: the one whose vectors find candidates, and the one that scores them, or None."""

    encoder: FrozenEncoder
    score_pairs: ScorePairs | None


def select_texts(curated: CuratedRow) -> Row:
    """Return the fields of a pair that mining reads."""
    texts = {"pos": get_texts(curated, "positives"), "neg": get_texts(curated, "negatives")}
    return {"query": curated.fields["query"], "prompt": curated.fields.get("prompt"), **texts}


class MineStep:
    """Collects rows of pairs in memory, then mines each source separately. Rows of other formats stay as they are."""

    def __init__(
        self, config: MineStepConfig, source_names: Sequence[str], models: MinerModels, options: MiningOptions, cache: Path
    ):
        """Start without rows.

        Args:
            config: The section of the step.
            source_names: Names of all sources.
            models: The models.
            options: How candidates are found and filtered.
            cache: Folder for the row indexes of a corpus.
        """
        self._config, self._source_names, self._models = config, source_names, models
        self._options, self._cache = options, cache
        self._rows: list[tuple[int, Row | None]] = []  # source and pair; None for rows that are not mined

    def close(self) -> None:
        """Do nothing: the step has no open files."""

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the texts of rows."""
        for curated in rows:
            is_mined = curated.format == "pairs" and self._config.applies_to(self._source_names[curated.source])
            self._rows.append((curated.source, select_texts(curated) if is_mined else None))

    def iter_changes(self) -> Iterator[RowChange]:
        """Yield the change of each row. See `changes.ChangingStep`."""
        for source, entries in itertools.groupby(self._rows, key=lambda entry: entry[0]):
            rows = [row for _, row in entries]
            yield from self._mine(rows, self._source_names[source]) if any(rows) else [UNCHANGED] * len(rows)

    def _mine(self, rows: Sequence[Row | None], source_name: str) -> Iterator[RowChange]:
        """Yield the changes of the rows of one source."""
        corpus = read_corpus(self._config.corpus, self._cache) if self._config.corpus else None
        pairs = [row for row in rows if row is not None]
        pool = build_pool(pairs, corpus, self._options.seed, self._config.instruction)
        if self._config.negatives:
            check_first_rank(pool, self._config, f"Name more documents with corpus, or leave {source_name} out of sources.")
        encoder, score_pairs = self._models
        query_vectors = embed_texts(pool.queries, encoder.encode, encoder.width, f"{source_name}: queries")
        documents = [EncoderInput(text, "document", "") for text in pool.documents]
        document_vectors = embed_texts(documents, encoder.encode, encoder.width, "documents")
        rescore = make_id_scorer(score_pairs, pool) if score_pairs else None
        result = mine_negatives(pool, query_vectors, document_vectors, self._options, rescore)
        mined_rows = dict(zip(result.row_numbers, result.rows, strict=True))
        row_numbers = itertools.count()
        for row in rows:
            yield UNCHANGED if row is None else self._make_change(pool, next(row_numbers), mined_rows)

    def _make_change(self, pool: MiningPool, row_number: int, mined_rows: dict[int, MinedRow]) -> RowChange:
        """Return the change of the row with a number in a pool."""
        drop_reason = f"positives: not among the {self._config.consistency_top_k} nearest documents"
        if (mined := mined_rows.get(row_number)) is None:
            return RowChange(None, (drop_reason,))
        num_dropped = 0 if mined.is_relabeled else len(pool.rows[row_number].positives) - len(mined.row.positives)
        output = to_output_row(pool, mined)
        fields = {key: output[key] for key in ("pos", "neg", "pos_scores", "neg_scores")}
        reasons = [drop_reason] * num_dropped
        reasons += [RELABELED_POSITIVES] * mined.is_relabeled + [MINED_NEGATIVES] * bool(mined.num_mined)
        return RowChange(fields, tuple(reasons))
