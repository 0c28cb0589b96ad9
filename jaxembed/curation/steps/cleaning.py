"""The step `clean`: repairs encodings, converts HTML to text, normalizes Unicode and white space."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import Literal

from jaxembed.config.curation import CleanStepConfig
from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, edit_texts
from jaxembed.errors import UserError

# Control characters other than tab and line breaks; zero-width characters; joiners that join nothing. Joiners between other
# characters stay: emoji and the spelling of Persian and Indic languages need them. So do variation selectors.
CONTROL_CHARS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    "|(?:^|(?<=[\\s\x21-\x7e]))[\u200c\u200d]+|[\u200c\u200d]+(?=$|[\\s\x21-\x7e])"
)
HTML_MARKER = re.compile(r"</?[a-zA-Z]|<!|&(?:#\w+|[a-zA-Z]\w*);")
SKIPPED_TAGS = frozenset({"script", "style", "head", "template", "noscript"})
BLOCK_TAG_NAMES = (
    "address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr li "
    "main nav ol option p pre section table tbody td tfoot th thead tr ul"
)
INLINE_TAG_NAMES = (
    "a abbr acronym audio b bdi bdo big body button canvas center cite code col colgroup data del details dfn em font html i "
    "iframe img input ins kbd label link mark meta nobr picture q rp rt ruby s samp select small source span strike strong "
    "sub summary sup svg textarea time title tt u var video wbr"
)
BLOCK_TAGS = frozenset(BLOCK_TAG_NAMES.split())
HTML_TAGS = SKIPPED_TAGS | BLOCK_TAGS | frozenset(INLINE_TAG_NAMES.split())

Edit = Callable[[str], str]


def make_clean_step(config: CleanStepConfig) -> RowStep:
    """Return the step. Raise `UserError` if it needs a library that is not installed."""
    edits = list_edits(config)

    def apply_edits(text: str) -> tuple[str, list[str]]:
        changes = []
        for name, edit in edits:
            if (edited := edit(text)) != text:
                changes.append(name)
                text = edited
        return text, changes

    def clean(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [edit_texts(row, config.sides, apply_edits) for row in rows]

    return clean


def list_edits(config: CleanStepConfig) -> list[tuple[str, Edit]]:
    """Return the edits that a config enables, with the names of their keys, in the order in which they are applied."""
    patterns = [re.compile(pattern) for pattern in config.boilerplate]
    edits: list[tuple[str, bool, Callable[[], Edit]]] = [
        ("repair", config.repair, import_encoding_repair),
        ("html", config.html, lambda: html_to_text),
        ("unicode", config.unicode != "none", lambda: lambda text: normalize_unicode(text, config.unicode)),
        ("control_chars", config.control_chars, lambda: lambda text: CONTROL_CHARS.sub("", text)),
        ("boilerplate", bool(patterns), lambda: lambda text: remove_lines(text, patterns)),
        ("whitespace", config.whitespace, lambda: collapse_whitespace),
    ]
    return [(name, make()) for name, is_enabled, make in edits if is_enabled]


def normalize_unicode(text: str, form: Literal["none", "NFC", "NFKC"]) -> str:
    """Return a text in a normalization form of Unicode, or unchanged."""
    return text if form == "none" else unicodedata.normalize(form, text)


def import_encoding_repair() -> Edit:
    """Return ftfy's repair of texts that were decoded with a wrong encoding."""
    try:
        import ftfy
    except ImportError:
        raise UserError("clean: repair needs ftfy, which is not installed. Run pip install '.[curate]'.") from None
    return ftfy.fix_encoding


def html_to_text(text: str) -> str:
    """Return the text of an HTML fragment. Block elements become line breaks; tags unknown to HTML stay.

    So `List<String>` and `a < b` survive. A text without tags or entities is returned unchanged.
    """
    if not HTML_MARKER.search(text):
        return text
    parser = TextCollector()
    parser.feed(text)
    parser.close()
    return parser.get_text()


class TextCollector(HTMLParser):
    """Collects the text of HTML in `parts`."""

    skipped_tags = SKIPPED_TAGS

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped: list[str] = []  # open elements whose text is left out

    def get_text(self) -> str:
        """Return the text so far, without empty lines and indentation."""
        return re.sub(r"(?<![ \t])[ \t]*\n\s*", "\n", "".join(self.parts)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Process a start tag."""
        if tag == "body":
            self._skipped.clear()  # </head> is optional
        if tag in self.skipped_tags:
            self._skipped.append(tag)
        self._add_tag(tag, self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Process a self-closing tag."""
        self._add_tag(tag, self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        """Process an end tag."""
        if tag in self._skipped:
            while self._skipped.pop() != tag:
                pass
        self._add_tag(tag, f"</{tag}>")

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Return the end of a marked section, such as CDATA. A malformed one is a comment, as in a browser."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_data(self, data: str) -> None:
        """Process text between tags."""
        if not self._skipped:
            self.parts.append(data)

    def _add_tag(self, tag: str, source: str) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append("\n")
        elif tag not in HTML_TAGS and not self._skipped:
            self.parts.append(source)


def remove_lines(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    """Return a text without the lines that a pattern fully matches after both ends are stripped."""
    lines = text.split("\n")
    kept = [line for line in lines if not any(pattern.fullmatch(line.strip()) for pattern in patterns)]
    return text if len(kept) == len(lines) else "\n".join(kept)


def collapse_whitespace(text: str) -> str:
    """Collapse runs of spaces and of blank lines, and strip both ends. Indentation stays."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    collapsed = "\n".join(re.sub(r"(?<=\S)\s+", " ", line).rstrip() for line in lines)
    return re.sub(r"\n{3,}", "\n\n", collapsed).strip()
