"""Classification and clustering data as pairs: the documents are label texts, or other examples."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.equality import exclude_equal, normalize_text
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row
from jaxembed.errors import UserError

MAX_LISTED_LABELS = 10
log = logging.getLogger(__name__)
UNLABELED_REASON = "rows with the label -1, which stands for none beside a label 0 (to keep it, name it in label_names)"
EXAMPLES_PER_PAIR_ROW = 8  # positives, and negatives, of a row of pairs whose documents are examples


class LabelSampler(ExampleSampler):
    """Draws from (text, label) rows, after NV-Embed (sections 4.2 and 5.3.4).

    The documents are of one of two kinds:

    - Label texts, if `label_documents` is `labels`, or if it is `auto` and there are two labels. The positive is the text of
      the row's label. The negatives are texts of other labels: those of this source, or of all sources
      (`add_negative_labels`, KaLM-Embedding 2.1).
    - Examples otherwise. The positive is another text with the same label. The negatives are texts of other labels, each from
      a label drawn uniformly.
    """

    max_positives = 1

    def __init__(self, rows: IndexedRows, config: SourceConfig):
        """Resolve the label texts and find the usable rows.

        Args:
            rows: Rows with the schema `labels`.
            config: The source.

        Raises:
            UserError: A label has no name in `label_names`, or a text has no positive and `single_labels` is `error`.
        """
        self.rows = rows
        self._path = config.path
        self._unlabeled = find_unlabeled(rows.label_names, config.label_names)
        texts = self._resolve_label_texts(config)  # of each label of the rows; several labels may share a text
        self._label_texts = sorted({text for text in texts if text is not None})
        class_ids = {text: i for i, text in enumerate(self._label_texts)}
        # Index into `_label_texts` of each label of the rows, -1 for the label that stands for none.
        self._class_ids = [-1 if text is None else class_ids[text] for text in texts]
        self._warn_of_similar_labels()
        self._group_ends = np.cumsum(rows.label_counts)
        self._candidate_labels = tuple(self._label_texts)
        uses_label_texts = {"auto": len(self._label_texts) == 2, "labels": True, "examples": False}
        self._uses_label_texts = uses_label_texts[config.label_documents]
        self._usable_rows: Sequence[int] | np.ndarray = range(len(rows))
        self.drop_counts = dict(rows.drop_counts)
        if self._unlabeled is not None:
            self._usable_rows = np.flatnonzero(rows.index_values != self._unlabeled).astype(np.int32)
            self.drop_counts[UNLABELED_REASON] = rows.label_counts[self._unlabeled]
        if not self._uses_label_texts:
            self._drop_single_labels(config)

    @property
    def label_texts(self) -> tuple[str, ...]:
        """Return the label texts that are documents, or () if the documents are examples."""
        return tuple(self._label_texts) if self._uses_label_texts else ()

    @property
    def rows_per_label(self) -> Counter[str]:
        """Return the number of rows of each label, by the label's text."""
        rows_per_label = Counter[str]()
        for class_id, count in zip(self._class_ids, self.rows.label_counts, strict=True):
            if class_id >= 0:
                rows_per_label[self._label_texts[class_id]] += count
        return rows_per_label

    def add_negative_labels(self, texts: Sequence[str]) -> LabelSampler:
        """Return a copy that also draws negatives from `texts`."""
        sampler = copy.copy(self)
        sampler._candidate_labels = tuple(dict.fromkeys((*self._label_texts, *texts)))
        return sampler

    def __len__(self) -> int:
        return len(self._usable_rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw a positive and negatives of the text."""
        text, class_id, (positive,), negatives = self._draw_texts(index, rng, 1, max_negatives)
        return Example(
            query=text,
            positive=positive,
            negatives=tuple(negatives),
            positives=(positive,),
            label=class_id,
        )

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield one row of pairs for the text.

        Its documents are label texts (the label's own and up to `max_texts` others) or examples (up to `max_texts` of the label
        and as many of other labels).
        """
        count = max_texts or (len(self._candidate_labels) if self._uses_label_texts else EXAMPLES_PER_PAIR_ROW)
        text, _, positives, negatives = self._draw_texts(index, np.random.default_rng((seed, index)), count, count)
        yield {"query": text, "pos": positives, "neg": negatives}

    def _draw_texts(
        self, index: int, rng: np.random.Generator, max_positives: int, max_negatives: int
    ) -> tuple[str, int, list[str], list[str]]:
        """Return a text, its class, and different positives and negatives of it."""
        row = int(self._usable_rows[index])
        text, class_id = self._read_text(row), self._class_ids[int(self.rows.index_values[row])]
        if self._uses_label_texts:
            positives = [self._label_texts[class_id]]
            others = _sample_except(class_id, len(self._candidate_labels), max_negatives, rng)
            negatives = [self._candidate_labels[i] for i in others]
        else:
            same_label = self._get_label_rows(class_id)
            others = _sample_except(int(np.searchsorted(same_label, row)), len(same_label), max_positives, rng)
            positives = [self._read_text(same_label[i]) for i in others]
            count = len(self._label_texts) - 1  # other labels
            draws = rng.integers(count, size=max_negatives) if count else np.empty(0, int)
            negatives = [self._read_text(rng.choice(self._get_label_rows(i))) for i in draws + (draws >= class_id)]
        positives = list(dict.fromkeys(positives))
        return text, class_id, positives, exclude_equal(negatives, (text, *positives))

    def _read_text(self, row: int) -> str:
        return str(self.rows[int(row)]["text"])

    def _get_label_rows(self, class_id: int) -> np.ndarray:
        """Return the rows of a class, in ascending order. Here every class is one label of the rows."""
        label = self._class_ids.index(class_id)
        end = self._group_ends[label]
        return self.rows.rows_grouped_by_label[end - self.rows.label_counts[label] : end]

    def _resolve_label_texts(self, config: SourceConfig) -> Sequence[str | None]:
        """Return the text of each label: its entry in `label_names`, or the label itself if there are no names.

        The label that means "no label" has no text.
        """
        labels = [None if i == self._unlabeled else label for i, label in enumerate(self.rows.label_names)]
        if not config.label_names:
            return labels
        if missing := [label for label in labels if label is not None and label not in config.label_names]:
            raise UserError(f"{self._path}: label_names has no name for {_list_labels(missing)}. Name every label of the data.")
        return [None if label is None else config.label_names[label] for label in labels]

    def _warn_of_similar_labels(self) -> None:
        """Warn of labels that are equal as texts (`data.equality`), but not as labels."""
        first: dict[str, str] = {}
        for text in self._label_texts:
            other = first.setdefault(normalize_text(text), text)
            if other != text:
                log.warning(
                    "%s: the labels %r and %r differ only in case, white space or encoding; they count as two labels",
                    self._path, other, text,
                )  # fmt: skip

    def _drop_single_labels(self, config: SourceConfig) -> None:
        """Skip texts without another example of their label.

        Raises:
            UserError: `single_labels` is `error`, no row would be left, or keys for label texts are set.
        """
        if config.label_names or config.label_negatives == "all":
            key = "label_names" if config.label_names else "label_negatives=all"
            raise UserError(
                f"{self._path}: {key} needs documents that are label texts (the documents of these {len(self._label_texts)} "
                f"labels are examples). Set label_documents to labels, or remove {key}."
            )
        counts = np.array(self.rows.label_counts)
        is_label = np.array(self._class_ids) >= 0
        single = np.flatnonzero((counts == 1) & is_label)
        if not len(single):
            return
        if len(single) == is_label.sum():
            raise UserError(f"{self._path}: no label has two texts, so no text has a positive. Set label_documents to labels.")
        if config.single_labels == "error":
            raise UserError(
                f"{self._path}: {len(single):,} of {is_label.sum():,} labels have a single text, which has no positive: "
                f"{_list_labels([self.rows.label_names[i] for i in single])}. Add texts, or set single_labels to skip."
            )
        is_usable = (counts > 1) & is_label
        self._usable_rows = np.flatnonzero(is_usable[self.rows.index_values.astype(np.int32)]).astype(np.int32)
        self.drop_counts["label with one text"] = len(single)


def find_unlabeled(labels: Sequence[str], names: Mapping[str, str] = MappingProxyType({})) -> int | None:
    """Return the index of the label that means "no label", or None.

    Hugging Face datasets number classes from 0, and write -1 for a row without a label. But -1 is a label like any other if it
    has a name, or if there is no label 0, as in data with the labels -1 and 1.

    Args:
        labels: The labels of the data.
        names: Names of labels, as in `label_names`.
    """
    is_class = "0" not in labels or "-1" in names
    return None if is_class or "-1" not in labels else labels.index("-1")


def _sample_except(excluded: int, count: int, max_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to `max_samples` different integers below `count`, none of them `excluded`."""
    draws = rng.choice(count - 1, min(max_samples, count - 1), replace=False)
    return draws + (draws >= excluded)


def _list_labels(labels: Sequence[str]) -> str:
    """Return the first `MAX_LISTED_LABELS` labels, and the number of further ones."""
    more = f" and {len(labels) - MAX_LISTED_LABELS:,} more" if len(labels) > MAX_LISTED_LABELS else ""
    return f"{', '.join(map(repr, labels[:MAX_LISTED_LABELS]))}{more}"
