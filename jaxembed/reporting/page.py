"""A report as one HTML page that needs no network: template, styles, scripts, charts, and data in one file.

Texts of a user reach the page in two ways only. Jinja escapes those in HTML (`autoescape`). Data of charts and of the browser
of neighbors are JSON in which <, > and & are escaped, so that no text can end a script; the script puts them on the page as
text nodes. The page's own content security policy forbids every request.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from jaxembed.files import atomic_write
from jaxembed.reporting.blocks import ReportSection
from jaxembed.reporting.charts import Chart
from jaxembed.training.run_dir import collect_package_versions

TEMPLATE_FOLDER = Path(__file__).parent
# Characters that could end the script element, and line separators that older JavaScript rejects in strings.
JSON_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(path: Path, title: str, sections: Sequence[ReportSection], command: str) -> int:
    """Write a report, and return its size in bytes.

    Args:
        path: The file. It appears when it is complete.
        title: Title of the page.
        sections: Its sections. Empty ones are left out.
        command: The command that writes it.
    """
    content = render_page(title, sections, command)
    with atomic_write(path) as partial:
        partial.write_bytes(content)
    return len(content)


def render_page(title: str, sections: Sequence[ReportSection], command: str) -> bytes:
    """Return a report as UTF-8. A lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
    shown_sections = [section for section in sections if not section.is_empty]
    specs: list[Mapping[str, Any]] = []
    charts_by_section: dict[str, list[tuple[int, Chart]]] = {}
    for section in shown_sections:
        charts_by_section[section.id] = list(enumerate(section.charts, start=len(specs)))
        specs += [chart.spec for chart in section.charts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        sections=shown_sections,
        charts=charts_by_section,
        chart_data=to_script_json(specs),
        neighbor_data=to_script_json([entry for section in shown_sections for entry in section.neighbors]),
        style=_read_asset("report.css"),
        program=_read_asset("report.js"),
        library=_bundle_library() if specs else "",
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=collect_package_versions()["jaxembed"],
        command=command,
    )
    return page.encode("utf-8", errors="replace")


def to_script_json(value: Any) -> Markup:
    """Return a value as JSON that is safe inside a script element. NaN and infinity raise an error: use null."""
    return Markup(json.dumps(value, allow_nan=False).translate(JSON_ESCAPES))


@functools.cache
def _bundle_library() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script. Bundling takes seconds."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _read_asset(name: str) -> Markup:
    return Markup((TEMPLATE_FOLDER / name).read_text(encoding="utf-8"))
