"""Natural language inference as pairs: what a premise entails answers it, what contradicts it does not."""

from __future__ import annotations

import numpy as np

from jaxembed.data.rows import Rows, RowSchema
from jaxembed.data.schema import NLI_LABELS, Row, check_nli, nli_fields, text_hash
from jaxembed.errors import UserError

ENTAILMENT, CONTRADICTION, NONE = NLI_LABELS["entailment"], NLI_LABELS["contradiction"], NLI_LABELS["-"]


def _parts(row: Row) -> tuple[str, str, int]:
    """Premise, hypothesis and the number of the label."""
    (premise, hypothesis), label = nli_fields(row), row["label"]
    return row[premise], row[hypothesis], NLI_LABELS[label] if isinstance(label, str) else label


def _number(row: Row) -> int:
    """51 bits of the premise's hash and 2 of the label: as much as a float64 holds."""
    premise, _, label = _parts(row)
    return (int(text_hash(premise).view(np.uint64)[0]) >> 13) * 4 + label - NONE


SHAPE = RowSchema("nli", check_nli, _number)


class NliPairs:
    """(premise, hypothesis, label) rows as rows of pairs, one for every premise, in the order of the file.

    Entailed hypotheses are its positives, contradicting ones its negatives, neutral ones neither, after the supervised
    SimCSE (Gao et al. 2021, arXiv:2104.08821). A premise that entails nothing is dropped.
    """

    def __init__(self, rows: Rows):
        """`rows` are of `SHAPE`, `row_count` how many there are. Holds 4 bytes of each, and 16 of each premise."""
        self._rows, self.row_count = rows, len(rows)
        self.digest = rows.digest
        premise, label = np.divmod(rows.numbers.astype(np.int64), 4)
        label += NONE
        order = np.argsort(premise, kind="stable")
        changes = np.diff(premise[order]) != 0
        first = np.flatnonzero(np.concatenate([[True], changes]))
        entailed = np.add.reduceat(label[order] == ENTAILMENT, first, dtype=np.int64)
        kept = np.flatnonzero(entailed)
        if not len(kept):
            told = "no premise has an entailed hypothesis; expected rows with the label entailment or 0"
            raise UserError(f"{rows.container.name}: {told}")
        kept = kept[np.argsort(order[first[kept]])]
        self._order = order.astype(np.int32)
        self._start, self._end = first[kept], np.append(first, len(order))[kept + 1]
        self.most_positives = int(entailed.max())
        self.dropped = {
            "rows without a label": int((label == NONE).sum()),
            "premises without an entailed hypothesis": len(first) - len(kept),
        }

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> Row:
        rows = (self._rows[int(i)] for i in self._order[self._start[index] : self._end[index]])
        parts = [_parts(row) for row in rows]
        entailed, contradicting = ([text for _, text, label in parts if label == of] for of in (ENTAILMENT, CONTRADICTION))
        return {"query": parts[0][0], "pos": entailed, "neg": contradicting}
