"""A report in a browser: it draws without errors or requests, on desktop and phone, light and dark, and can be clicked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.reports import HOSTILE, TOPICS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 120_000  # of every step in the browser, for machines under load
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def test_a_report_works_in_a_browser(browser: Any, report: Any, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.path.as_uri())
    page.wait_for_selector(f"html[data-drawn={scheme}]")
    # Every chart is drawn, and the page is as wide as the window.
    charts = page.locator(".chart").count()
    assert page.locator(".chart canvas").count() == charts > 10
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # The browser of neighbors: all queries, then one that is clicked, then those that hit.
    queries = page.locator("#queries button")
    assert queries.count() == len(HOSTILE) + len(TOPICS)
    queries.filter(has_text=f"about {HOSTILE[0]}").click()
    assert page.locator("#documents .asked").inner_text() == f"about {HOSTILE[0]}"
    assert page.locator("#documents li").count() >= 10
    assert page.locator("#documents li.relevant .mark").inner_text() == "relevant"
    hits = page.locator("#queries .hit").count()
    page.locator("[data-filter=hit]").click()
    assert queries.count() == hits
    page.locator("[data-filter=miss]").click()
    assert queries.count() == len(HOSTILE) + len(TOPICS) - hits
    # The pointer over a point of the map shows its source and text; a click keeps the text below the map.
    figure = page.locator("#map figure")
    figure.scroll_into_view_if_needed()
    point = page.evaluate(FIND_POINT)
    figure.locator("canvas").hover(position=point)
    assert page.locator("#vg-tooltip-element.visible").inner_text().split()[0] == "source"
    figure.locator("canvas").click(position=point)
    assert figure.locator(".picked").inner_text().startswith(("faq: ", "sts "))
    # Charts are drawn again in the other colors.
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    other = "dark" if scheme == "light" else "light"
    page.emulate_media(color_scheme=other)
    page.wait_for_selector(f"html[data-drawn={other}]")
    assert page.locator(".chart canvas").count() == charts
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert problems == [] and [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("window.attacked") is None
    context.close()


# Where a point of the map is on its canvas: the program keeps the views of Vega.
FIND_POINT = """
() => {
  const view = window.jaxembedViews.get(document.querySelector("#map .chart"));
  const find = (item) => item.mark && item.mark.marktype === "symbol" && item.datum && item.datum.text ? item : null;
  const { left, top } = view.padding();
  const queue = [[view.scenegraph().root, left + view.origin()[0], top + view.origin()[1]]];
  while (queue.length) {
    const [item, x, y] = queue.pop();
    if (find(item)) return { x: x + item.x, y: y + item.y };
    for (const child of item.items || []) {
      const isGroup = child.marktype === undefined && child.items;
      queue.push([child, x + (isGroup ? child.x || 0 : 0), y + (isGroup ? child.y || 0 : 0)]);
    }
  }
}
"""
