"""A page whose program runs in a small JavaScript engine, with the part of a browser that `dom.js` has."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import quickjs

VOID_TAGS = {"meta", "br", "img", "input", "link"}
RUN = """
(async () => {{ {program} }})().then(() => (globalThis.end = "done"), (error) => (globalThis.end = error + error.stack));
"""


class TreeBuilder(HTMLParser):
    """Builds [tag, attributes, children] of a page."""

    def __init__(self, content: str):
        super().__init__()
        self.root: list[Any] = ["", {}, []]
        self._open = [self.root]
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: list[Any] = [tag, {name: value or "" for name, value in attrs}, []]
        self._open[-1][2].append(element)
        if tag not in VOID_TAGS:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"{tag} closes {self._open[-1][0]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1][2].append(data)


class ScriptedPage:
    """A page after its program has run."""

    def __init__(self, content: str):
        """Run the last script of a page, which uses the library of the one before it."""
        [page] = [child for child in TreeBuilder(content).root[2] if child[0] == "html"]
        [program] = [script[2][0] for script in _find_scripts(page)][-1:]
        self._context = quickjs.Context()
        self._context.set("TREE", json.dumps(page))
        self._context.eval((Path(__file__).parent / "dom.js").read_text())
        self.run(RUN.format(program=program.replace("export ", "")))
        end = self.run("end")
        assert end == "done", end

    def run(self, expression: str) -> Any:
        """Return the value of an expression, after everything that waits has run."""
        value = self._context.eval(expression)
        while self._context.execute_pending_job():
            pass
        return value

    def read(self, expression: str) -> Any:
        """Return the value of an expression that JSON has."""
        return json.loads(self.run(f"JSON.stringify({expression})"))

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element that a selector finds."""
        found: list[str] = self.read(f"document.querySelectorAll({json.dumps(selector)}).map((e) => e.textContent)")
        return found


def _find_scripts(element: list[Any]) -> list[list[Any]]:
    children = [child for child in element[2] if not isinstance(child, str)]
    return [script for child in children for script in ([child] if child[0] == "script" else _find_scripts(child))]
