"""The report of a synthesis as JSON and HTML: rows by task, reasons of rejections, tokens, diversity, samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from jaxembed.curation.curation_page import render_document, render_samples, render_table
from jaxembed.curation.curation_stats import TopSamples, shorten_row
from jaxembed.curation.steps.curated_row import hash_row
from jaxembed.data.schema import Row
from jaxembed.synthesis.acceptance import list_texts

WORD = re.compile(r"\w+")
MAX_NGRAMS = 200_000  # the diversity is computed from the first n-grams


class DiversityMeter:
    """Distinct-n of texts: the share of their word n-grams that are different (Li et al. 2016, arXiv:1510.03055)."""

    def __init__(self) -> None:
        """Start without texts."""
        self._distinct: dict[int, set[int]] = {1: set(), 2: set()}
        self._counts = {1: 0, 2: 0}

    def add(self, text: str) -> None:
        """Count the n-grams of a text. Texts beyond `MAX_NGRAMS` are ignored, because the share falls with more texts."""
        words = WORD.findall(text.casefold())
        for n, seen in self._distinct.items():
            if self._counts[n] < MAX_NGRAMS:
                ngrams = [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]
                seen.update(ngrams)
                self._counts[n] += len(ngrams)

    def to_json(self) -> dict[str, float]:
        """Return distinct-1 and distinct-2."""
        return {f"distinct_{n}": round(len(seen) / max(self._counts[n], 1), 4) for n, seen in self._distinct.items()}


class AcceptedRowStats:
    """Counts, samples and diversity of the accepted rows of a task."""

    def __init__(self, seed: int):
        """Start without rows."""
        self.num_rows, self._chars, self._seed = 0, 0, seed
        self._samples, self._diversity = TopSamples(), DiversityMeter()

    def add(self, row: Row) -> None:
        """Count a row."""
        self.num_rows += 1
        for text in list_texts(row):
            self._diversity.add(text)
            self._chars += len(text)
        self._samples.add((0, hash_row(row, self._seed)), shorten_row(row))

    def to_json(self) -> dict[str, Any]:
        """Return the counts and samples as plain values."""
        return {
            "rows": self.num_rows,
            "mean_chars": round(self._chars / max(self.num_rows, 1)),
            "diversity": self._diversity.to_json(),
            "samples": self._samples.to_list(),
        }


def render_page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report."""
    tokens = report["tokens"]
    parts = [
        f"<p>Recipe {escape(report['recipe'])}, version {report['version']}; model {escape(report['model'])}.</p>",
        render_table(["", "count"], [(name.replace("_", " "), value) for name, value in tokens.items()]),
        *(part for name, task in report["tasks"].items() for part in _render_task(name, task)),
        "<h2>Recipe</h2>",
        f"<pre>{escape(json.dumps(report['config'], indent=2, ensure_ascii=False))}</pre>",
    ]
    return render_document("Synthesis report", parts)


def _render_task(name: str, task: Mapping[str, Any]) -> list[str]:
    """Return the section of a task."""
    step_rows = [(s["name"], s["drafts_in"], s["answers"], sum(s["invalid"].values()), s["drafts_out"]) for s in task["steps"]]
    reasons = [(s["name"], kind, *item) for s in task["steps"] for kind in ("invalid", "dropped") for item in s[kind].items()]
    reasons += [("row", "rejected", *item) for item in task["rejected"].items()]
    groups = [(quota, *item) for quota, counts in task["groups"].items() for item in counts.items()]
    diversity = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in task["diversity"].items())
    return [
        f"<h2>{escape(name)}</h2>",
        f"<p>{task['rows']:,} rows ({task['format']}) in {escape(task['file'] or 'no file')}; mean length of a text: "
        f"{task['mean_chars']:,} characters; {diversity}.</p>",
        render_table(["step", "drafts in", "answers", "invalid answers", "drafts out"], step_rows),
        render_table(["step", "what", "reason", "count"], reasons) if reasons else "",
        render_table(["quota", "group", "rows"], groups) if groups else "",
        render_samples("Samples", task["samples"]),
    ]
