"""The report of a curation as one HTML page without links, scripts or images. Every text of the data is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

REPORT_FILE, PAGE_FILE = "report.json", "report.html"  # of a curation, and of a synthesis
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem }
td, th { padding: .15rem .7rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f4f4f4; padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: .3rem 0 }
.bar { background: #4c78a8; height: .8rem; display: inline-block } summary { cursor: pointer; color: #225 }
"""
SAMPLE_TITLES = {"random": "Random rows", "longest": "Rows with the longest texts", "strangest": "Rows with the most symbols"}


def render_page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report (`engine.write_report`)."""
    steps = [part for number, step in enumerate(report["steps"]) for part in _render_step(number, step)]
    parts = [
        _render_overview(report),
        "<h2>Steps</h2>",
        *steps,
        "<h2>Kept rows</h2>",
        *(render_samples(SAMPLE_TITLES[kind], samples) for kind, samples in report["output"]["samples"].items()),
        "<h2>Lengths in characters</h2>",
        *_render_lengths(report),
        "<h2>Config</h2>",
        f"<pre>{escape(json.dumps(report['config'], indent=2, ensure_ascii=False))}</pre>",
    ]
    return render_document("Curation report", parts)


def render_document(title: str, parts: Iterable[str]) -> str:
    """Return a page with a title and the HTML of its parts."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def render_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table. Numbers are aligned right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_render_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _render_cell(value: Any) -> str:
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f"<td>{escape(str(value))}</td>"


def _render_overview(report: Mapping[str, Any]) -> str:
    """Return the table of the number of rows of each source, before and after."""
    outputs = report["output"]["sources"]
    rows = [
        (name, source["path"], source["rows"], outputs[name]["rows"], report["files"].get(name, "none: no row is left"))
        for name, source in report["sources"].items()
    ]
    return render_table(["source", "path", "rows in", "rows out", "file"], rows)


def _render_step(number: int, step: Mapping[str, Any]) -> list[str]:
    """Return the section of a step."""
    rows = [(name, n["in"], n["out"], n["in"] - n["out"], n["changed"]) for name, n in step["sources"].items()]
    reasons = [(kind, reason, count) for kind, counts in step["reasons"].items() for reason, count in counts.items()]
    return [
        f"<h3>{number}. {escape(step['name'])}</h3>",
        render_table(["source", "rows in", "rows out", "dropped", "changed"], rows),
        render_table(["rows", "reason", "count"], reasons) if reasons else "",
        *(render_samples(f"Samples of {kind} rows", samples) for kind, samples in step["samples"].items()),
    ]


def render_samples(title: str, samples: Iterable[Mapping[str, Any]]) -> str:
    """Return samples that unfold with a click, or nothing if there are none."""
    blocks = [f"<pre>{escape(json.dumps(sample, ensure_ascii=False, indent=1))}</pre>" for sample in samples]
    return f"<details><summary>{escape(title)} ({len(blocks)})</summary>{''.join(blocks)}</details>" if blocks else ""


def _render_lengths(report: Mapping[str, Any]) -> Iterable[str]:
    """Yield the histograms of each source and side, before and after."""
    for name, source in report["input"]["sources"].items():
        after = report["output"]["sources"][name]["chars"]
        for side, counts in source["chars"].items():
            yield f"<h3>{escape(name)}: {escape(side)}</h3>" + _render_histogram(counts, after.get(side, {}))


def _render_histogram(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Return a table of bars: texts before and after, by length."""
    ranges = sorted({*before, *after}, key=lambda label: int(label.split("–")[0]))
    max_count = max([*before.values(), *after.values()])
    cells = "".join(
        f'<tr><td class="n">{label}</td><td class="n">{before.get(label, 0):,}</td><td class="n">{after.get(label, 0):,}</td>'
        f'<td><span class="bar" style="width:{20 * after.get(label, 0) / max_count:.2f}rem"></span></td></tr>'
        for label in ranges
    )
    return f"<table><tr><th>characters</th><th>before</th><th>after</th><th></th></tr>{cells}</table>"
