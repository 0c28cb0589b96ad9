"""Counts and samples for the report of a curation. They need constant memory, and do not depend on the order of the rows."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxembed.config.curation import ALL_SIDES
from jaxembed.curation.steps.curated_row import CuratedRow, StepOutcome, get_texts, hash_row
from jaxembed.curation.steps.quality import compute_symbol_share
from jaxembed.data.convert import select_fields
from jaxembed.data.schema import Row

MAX_SAMPLES = 5  # of each kind
MAX_SAMPLE_CHARS = 400  # of a text
MAX_SAMPLE_TEXTS = 3  # of a list


SampleKey = tuple[float, int]  # what samples are selected by, and a hash of the row, which breaks ties


class TopSamples:
    """The `MAX_SAMPLES` samples with the largest keys. Samples with equal keys are ordered by their content."""

    def __init__(self) -> None:
        """Start without samples."""
        self._heap: list[tuple[SampleKey, str]] = []

    def is_candidate(self, key: SampleKey) -> bool:
        """Return whether a sample with this key would be among the largest so far."""
        return len(self._heap) < MAX_SAMPLES or key >= self._heap[0][0]

    def add(self, key: SampleKey, sample: dict[str, Any]) -> None:
        """Add a sample. Equal samples are kept once."""
        entry = (key, json.dumps(sample, ensure_ascii=False, sort_keys=True))
        if entry in self._heap:
            return
        if len(self._heap) < MAX_SAMPLES:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the samples, largest key first."""
        return [json.loads(sample) for _, sample in sorted(self._heap, reverse=True)]


class CurationStepStats:
    """Counts and samples of one step."""

    def __init__(self, source_names: Sequence[str], seed: int):
        """Start without rows."""
        self._source_names, self._seed = source_names, seed
        self._rows_in, self._rows_out, self._changed = Counter[str](), Counter[str](), Counter[str]()
        self._reasons = {"dropped": Counter[str](), "changed": Counter[str]()}
        self._samples = {"dropped": TopSamples(), "changed": TopSamples()}

    @property
    def has_rows_left(self) -> bool:
        """Whether any row passed the step."""
        return bool(self._rows_out)

    def describe_drops(self) -> str:
        """Return the reasons for which rows were dropped, the most frequent ones first."""
        counts = self._reasons["dropped"].most_common(MAX_SAMPLES)
        return "; ".join(f"{reason}: {count:,}" for reason, count in counts) or "no row reached it"

    def add(self, before: CuratedRow, outcome: StepOutcome) -> None:
        """Count a row that went through the step."""
        name = self._source_names[before.source]
        self._rows_in[name] += 1
        if outcome.row is not None:
            self._rows_out[name] += 1
        if not outcome.reasons:
            return
        kind = "dropped" if outcome.row is None else "changed"
        self._changed[name] += outcome.row is not None
        self._reasons[kind].update(outcome.reasons)
        samples, key = self._samples[kind], (0, hash_row(before.fields, self._seed))
        if samples.is_candidate(key):
            after = {} if outcome.row is None else {"after": shorten_row(outcome.row)}
            samples.add(key, {"source": name, "reasons": list(outcome.reasons[:1]), "row": shorten_row(before.fields), **after})

    def to_json(self) -> dict[str, Any]:
        """Return the counts and samples as plain values."""
        return {
            "sources": {
                name: {"in": self._rows_in[name], "out": self._rows_out[name], "changed": self._changed[name]}
                for name in self._source_names
            },
            "reasons": {kind: dict(sorted(counts.items())) for kind, counts in self._reasons.items()},
            "samples": {kind: samples.to_list() for kind, samples in self._samples.items()},
        }


class RowStats:
    """Counts, lengths and samples of input or output rows."""

    def __init__(self, source_names: Sequence[str], seed: int):
        """Start without rows."""
        self._source_names, self._seed = source_names, seed
        self._rows = Counter[str]()
        self._lengths = {name: {side: Counter[int]() for side in ALL_SIDES} for name in source_names}
        self._samples = {kind: TopSamples() for kind in ("random", "longest", "strangest")}

    def add(self, curated: CuratedRow) -> None:
        """Count a row."""
        name = self._source_names[curated.source]
        self._rows[name] += 1
        all_texts = []
        for side, counts in self._lengths[name].items():
            for text in get_texts(curated, side):
                counts[len(text).bit_length()] += 1
                all_texts.append(text)
        keys = {"random": 0.0, "longest": max(map(len, all_texts)), "strangest": max(map(compute_symbol_share, all_texts))}
        content = hash_row(curated.fields, self._seed)
        for kind, value in keys.items():
            key = (value, content)
            if self._samples[kind].is_candidate(key):
                self._samples[kind].add(key, {"source": name, "row": shorten_row(curated.fields)})

    def to_json(self) -> dict[str, Any]:
        """Return the counts and samples as plain values. Lengths are counted by powers of two."""
        lengths = {
            name: {
                side: {_name_range(bits): n for bits, n in sorted(counts.items())} for side, counts in sides.items() if counts
            }
            for name, sides in self._lengths.items()
        }
        return {
            "sources": {name: {"rows": self._rows[name], "chars": lengths[name]} for name in self._source_names},
            "samples": {kind: samples.to_list() for kind, samples in self._samples.items()},
        }


def _name_range(bits: int) -> str:
    """Return the range of the numbers with this many bits, such as 4–7 for 3."""
    return f"{2 ** (bits - 1)}–{2**bits - 1}" if bits > 1 else str(bits)


def shorten_row(row: Row) -> dict[str, Any]:
    """Return the fields of a row that training reads, with long texts and lists truncated."""
    return {field: _shorten(value) for field, value in select_fields(row).items()}


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        more = [f"... ({len(value)} in all)"] if len(value) > MAX_SAMPLE_TEXTS else []
        return [*map(_shorten, value[:MAX_SAMPLE_TEXTS]), *more]
    if isinstance(value, str) and len(value) > MAX_SAMPLE_CHARS:
        return f"{value[:MAX_SAMPLE_CHARS]}... ({len(value):,} characters)"
    return value
