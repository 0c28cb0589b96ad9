"""Files of a user's documents, read as headings and paragraphs: plain text, Markdown, HTML and PDF."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxembed.curation.steps.cleaning import SKIPPED_TAGS, TextCollector, html_to_text
from jaxembed.errors import UserError
from jaxembed.files import decode, read_bytes

EMPTY_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*\n", re.S)
HTML_TITLE = re.compile(r"<title[^<>]*>", re.I)
HTML_TITLE_END = re.compile("</title", re.I)
HTML_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?([\w-]+)", re.I)
HTML_CHARSET_BYTES = 1024  # the declaration must lie within these (HTML standard, 4.2.5.4)
# What browsers read instead of these encodings, which pages declare wrongly (Encoding Standard, 4.2). A declaration that can
# be read byte by byte is not in UTF-16 (HTML standard, 13.2.3.2).
BROWSER_ENCODINGS = {
    **dict.fromkeys(("utf-16", "utf-16le", "utf-16be"), "utf-8"),
    **dict.fromkeys(("iso-8859-1", "latin1", "us-ascii", "ascii"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    "shift_jis": "cp932", "euc-kr": "cp949", "iso-8859-9": "cp1254",
}  # fmt: skip
HYPHENATED_WORD = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
HEADING_TAGS = {f"h{level}": level for level in range(1, 7)}
PARAGRAPH_TAG_NAMES = "address article aside blockquote div dl figure form header hr main ol p pre section table ul"
PARAGRAPH_TAGS = frozenset(HEADING_TAGS) | frozenset(PARAGRAPH_TAG_NAMES.split())


class Block(NamedTuple):
    """A paragraph (level 0), or a heading of level 1 to 6."""

    level: int
    text: str


class Document(NamedTuple):
    """A title, which may be empty, and the blocks of a file in their order."""

    title: str
    blocks: list[Block]


def check_libraries(files: Iterable[Path]) -> None:
    """Raise `UserError` if a library that reads one of the files is not installed."""
    for path in files:
        library = READER_LIBRARIES.get(path.suffix.lower())
        if library and importlib.util.find_spec(library) is None:
            raise UserError(f"{path}: reading it needs {library}, which is not installed. Run pip install '.[documents]'.")


def read_document(path: Path) -> Document:
    """Read a file with the reader of its extension (`DOCUMENT_READERS`).

    Raises:
        UserError: The file cannot be read, is broken, or has no text.
    """
    document = DOCUMENT_READERS[path.suffix.lower()](path)
    # No file can hold half of a surrogate pair, which broken PDF files and some encodings of HTML give.
    blocks = [Block(level, _repair_surrogates(text)) for level, text in document.blocks]
    document = Document(_repair_surrogates(document.title), blocks)
    if not any(block.text for block in document.blocks):
        raise UserError(f"{path}: has no text. Remove it, or convert its images to text first.")
    return document


def _repair_surrogates(text: str) -> str:
    """Return a text whose surrogate pairs are one character each; halves are replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_plain_text(path: Path) -> Document:
    """Return the paragraphs of a text file, which empty lines separate."""
    return Document("", _split_paragraphs(_decode_lines(path)))


def read_markdown(path: Path) -> Document:
    """Return the headings and paragraphs of a Markdown file. Lists, tables and code stay as they are written."""
    text = FRONT_MATTER.sub("", _decode_lines(path))
    return Document("", list(_iter_markdown_blocks(text)))


def _iter_markdown_blocks(text: str) -> Iterator[Block]:
    from markdown_it import MarkdownIt

    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for i, token in enumerate(tokens):
        if token.level or token.map is None or token.nesting < 0:
            continue
        source = "\n".join(lines[slice(*token.map)]).strip()
        if token.type == "heading_open":
            yield Block(int(token.tag[1]), tokens[i + 1].content)
        elif token.type == "html_block":
            yield Block(0, html_to_text(source))
        elif token.type != "hr":
            yield Block(0, source)


def read_html(path: Path) -> Document:
    """Return the headings and paragraphs of an HTML page, without its scripts, styles, navigation and footer."""
    text = _cut_open_comment(_decode_html(path))
    collector = _BlockCollector()
    collector.feed(text)
    collector.close()
    collector.end_block(0)
    title = HTML_TITLE.search(text)
    end = HTML_TITLE_END.search(text, title.end()) if title else None
    return Document(html_to_text(text[title.end() : end.start()]).strip() if title and end else "", collector.blocks)


def _cut_open_comment(text: str) -> str:
    """Return a page without a comment that does not end. Python's parser would look for its end again and again."""
    start = text.find("<!--", text.rfind("-->") + 1)
    return text if start < 0 else text[:start]


class _BlockCollector(TextCollector):
    """Collects the text of HTML in `blocks`."""

    skipped_tags = SKIPPED_TAGS | {"nav", "footer"}

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Process a start tag."""
        if tag in PARAGRAPH_TAGS:
            self.end_block(0)
        super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """Process an end tag."""
        if tag in PARAGRAPH_TAGS:
            self.end_block(HEADING_TAGS.get(tag, 0))
        super().handle_endtag(tag)

    def end_block(self, level: int) -> None:
        """Add the text since the last block as a block, if there is any."""
        if text := self.get_text():
            self.blocks.append(Block(level, " ".join(text.split()) if level else text))
        self.parts.clear()


def read_pdf(path: Path) -> Document:
    """Return the paragraphs of a PDF file, whose headings are not known, and the title that it declares."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    content = read_bytes(path)
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path}: needs a password. Save it without one.")
        pages = [page.extract_text() for page in reader.pages]
        title = str((reader.metadata and reader.metadata.title) or "")
    except UserError:
        raise
    except Exception as error:  # pypdf raises errors of many kinds for broken files
        raise UserError(f"{path}: not a readable PDF file ({error or type(error).__name__})") from None
    text = HYPHENATED_WORD.sub("", "\n\n".join(pages))
    return Document(title, _split_paragraphs(text))


def _split_paragraphs(text: str) -> list[Block]:
    return [Block(0, part.strip()) for part in EMPTY_LINES.split(text) if part.strip()]


def _decode_lines(path: Path) -> str:
    """Return the text of a UTF-8 file. All its line breaks become line feeds."""
    text = decode(read_bytes(path), str(path))
    if "\x00" in text:
        raise UserError(f"{path}: not a text file (it contains a zero byte)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode_html(path: Path) -> str:
    """Return the text of a page in the encoding that it declares, or in UTF-8."""
    content = read_bytes(path)
    declared = HTML_CHARSET.search(content[:HTML_CHARSET_BYTES])
    if declared is None:
        return decode(content, str(path))
    charset = declared[1].decode()
    try:
        return content.decode(BROWSER_ENCODINGS.get(charset.lower(), charset))
    except (LookupError, UnicodeError):
        raise UserError(f"{path}: not valid in the encoding that it declares, {charset}. Save it as UTF-8.") from None


DOCUMENT_READERS: Mapping[str, Callable[[Path], Document]] = {
    **dict.fromkeys((".txt", ".text", ".rst"), read_plain_text),
    **dict.fromkeys((".md", ".markdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".pdf": read_pdf,
}
READER_LIBRARIES = {**dict.fromkeys((".md", ".markdown"), "markdown_it"), ".pdf": "pypdf"}
