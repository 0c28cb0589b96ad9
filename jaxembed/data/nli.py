"""Natural language inference as pairs: entailed hypotheses are positives, contradicting ones are negatives."""

from __future__ import annotations

import numpy as np

from jaxembed.data.equality import hash_exact_text
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.schema import NLI_LABELS, NO_LABEL_REASON, Row, check_nli, get_nli_fields
from jaxembed.errors import UserError

ENTAILMENT, CONTRADICTION, NO_LABEL = NLI_LABELS["entailment"], NLI_LABELS["contradiction"], NLI_LABELS["-"]


def _parse_nli_row(row: Row) -> tuple[str, str, int]:
    """Return premise, hypothesis and label number."""
    (premise, hypothesis), label = get_nli_fields(row), row.get("label", NO_LABEL)
    return row[premise], row[hypothesis], NLI_LABELS[label] if isinstance(label, str) else label


def _encode_premise_and_label(row: Row) -> int:
    """Return 51 bits of the premise's hash, then 2 bits of the label. A float64 holds 53 bits exactly."""
    premise, _, label = _parse_nli_row(row)
    return (int(hash_exact_text(premise).view(np.uint64)[0]) >> 13) * 4 + label - NO_LABEL


NLI_SCHEMA = RowSchema("nli", check_nli, _encode_premise_and_label)


class NliPairRows:
    """(premise, hypothesis, label) rows as rows of pairs: one per premise, in the order of the file.

    Entailed hypotheses are positives, contradicting ones are negatives, and neutral ones are neither, as in supervised
    SimCSE (Gao et al. 2021, arXiv:2104.08821). A premise without an entailed hypothesis is dropped. Memory: 4 bytes per
    row and 16 per premise.

    Attributes:
        row_count: The number of (premise, hypothesis, label) rows.
        digest: SHA-256 of the content.
        max_positives: Maximum number of entailed hypotheses of a premise.
        drop_counts: Reason -> number of dropped rows or premises.
    """

    def __init__(self, rows: IndexedRows):
        """Group the rows, which have the `NLI_SCHEMA`, by premise.

        Raises:
            UserError: No premise has an entailed hypothesis.
        """
        self._rows, self.row_count = rows, rows.row_count
        self.digest = rows.digest
        premises, labels = np.divmod(rows.index_values.astype(np.int64), 4)
        labels += NO_LABEL
        # Sort rows by premise; the stable sort keeps the order of the file within a premise.
        order = np.argsort(premises, kind="stable")
        is_new_premise = np.diff(premises[order]) != 0
        starts = np.flatnonzero(np.concatenate([[True], is_new_premise]))
        entailed_counts = np.add.reduceat(labels[order] == ENTAILMENT, starts, dtype=np.int64)
        usable = np.flatnonzero(entailed_counts)
        if not len(usable):
            raise UserError(
                f"{rows.container.name}: no premise has an entailed hypothesis (expected rows with the label entailment or 0)"
            )
        # Restore the order of the file: sort the premises by their first rows.
        usable = usable[np.argsort(order[starts[usable]])]
        self._order = order.astype(np.int32)
        self._starts, self._ends = starts[usable], np.append(starts, len(order))[usable + 1]
        self.max_positives = int(entailed_counts.max())
        self.drop_counts = {
            **rows.drop_counts,
            NO_LABEL_REASON: int((labels == NO_LABEL).sum()),
            "premises without an entailed hypothesis": len(starts) - len(usable),
        }

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        rows = [_parse_nli_row(self._rows[int(i)]) for i in self._order[self._starts[index] : self._ends[index]]]
        positives, negatives = (
            [hypothesis for _, hypothesis, label in rows if label == kind] for kind in (ENTAILMENT, CONTRADICTION)
        )
        return {"query": rows[0][0], "pos": positives, "neg": negatives}
