"""The program of a report runs without errors: charts are drawn, and the neighbors of queries can be browsed.

It runs in a JavaScript engine without a browser. `test_browser.py` checks the same page in Chromium where there is one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.dom import ScriptedPage
from helpers.reports import HOSTILE, TOPICS

ANSWERS = [f"To change your {topic}, open the app and choose {topic}." for topic in TOPICS]
QUERIES = [f"about {text}" for text in (*HOSTILE, *ANSWERS)]
FIND_QUERY = "(text) => document.querySelectorAll('#queries button').find((button) => button.textContent.endsWith(text))"


@pytest.fixture
def page(report: Any) -> ScriptedPage:
    return ScriptedPage(report.path.read_text())


def click_query(page: ScriptedPage, text: str) -> None:
    page.run(f"({FIND_QUERY})({json.dumps(text)}).dispatch('click')")


def test_every_chart_is_drawn_in_the_color_scheme_of_the_reader(page: ScriptedPage) -> None:
    charts = len(page.texts(".chart"))
    assert page.read("drawings.length") == charts > 10 and page.read("problems") == []
    assert page.read("documentElement.dataset.drawn") == "light" and page.read("drawings[0].options.tooltip.theme") == "light"
    page.run("darkScheme.matches = true; darkScheme.listeners.forEach((draw) => draw())")
    assert page.read("drawings.length") == 2 * charts and page.read("finished") == charts
    assert (
        page.read("documentElement.dataset.drawn") == "dark"
        and page.read("drawings[drawings.length - 1].options.tooltip.theme") == "dark"
    )


def test_the_charts_are_valid(page: ScriptedPage) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    for spec in page.read("drawings.map((drawing) => drawing.spec)"):
        assert vl_convert.vegalite_to_svg(spec).startswith("<svg")


def test_neighbors_can_be_browsed(page: ScriptedPage) -> None:
    assert sorted(page.texts("#queries .asking")) == sorted(QUERIES)
    assert page.texts("#documents .asked") == page.texts("#queries .asking")[:1]
    click_query(page, QUERIES[0])
    assert page.texts("#documents .asked") == [QUERIES[0]]
    assert len(page.texts("#documents li")) >= 10 and page.texts("#documents li.relevant .mark") == ["relevant"]
    assert page.texts("#documents li.relevant p") == [HOSTILE[0]]
    # Hits and misses.
    hits = len(page.texts("#queries .hit"))
    page.run("document.querySelectorAll('[data-filter=hit]')[0].dispatch('click')")
    assert len(page.texts("#queries button")) == hits
    page.run("document.querySelectorAll('[data-filter=miss]')[0].dispatch('click')")
    assert len(page.texts("#queries button")) == len(QUERIES) - hits
    page.run("document.querySelectorAll('[data-filter=all]')[0].dispatch('click')")
    assert len(page.texts("#queries button")) == len(QUERIES)
    assert page.read("problems") == [] and page.read("typeof window.attacked") == "undefined"


def test_a_card_opens_and_a_point_of_the_map_shows_its_text(page: ScriptedPage) -> None:
    page.run("document.querySelectorAll('#documents li')[0].dispatch('click')")
    assert len(page.texts("#documents li.open")) == 1
    page.run("globalThis.chart = document.querySelectorAll('#map .chart')[0]")
    page.run("chart.pick({}, { datum: { source: 'faq: queries', text: '<b>text</b>' } })")
    assert page.texts("#map .picked")[0] == "faq: queries <b>text</b>"
    assert page.read("chart.closest('figure').querySelector('.picked').hidden") is False


def test_an_error_of_the_program_is_found(report: Any) -> None:
    content = report.path.read_text().replace("showSet();\n}", "showSets();\n}")
    with pytest.raises(AssertionError, match="showSets"):
        ScriptedPage(content)
