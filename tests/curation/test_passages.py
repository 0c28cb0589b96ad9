"""Documents of a user: files of each kind, division into passages, and bad files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.commands import run_command
from helpers.pdf import write_pdf
from jaxembed.curation.document_files import Block, read_document
from jaxembed.curation.passages import PassageLimits, split_text
from jaxembed.data.__main__ import main, make_parser, open_tokenizer
from jaxembed.errors import UserError

MARKDOWN = """---
title: ignored
---
# Guide

Read this first, it takes only a minute of your time.

Install
-------

Run the installer, then open the window.

```bash
# not a heading
make install
```

- one item of a list
- another item

<!-- a comment -->

## Removal of the program

Delete the folder and everything that is inside.
"""
HTML = """<!doctype html><html><head><meta charset="latin-1"><title>Tea &amp; more</title><style>p {color: red}</style>
<body><nav>Home | About</nav><p>Tea is a drink that people like.
<h2>How to <em>brew</em></h2><div>Boil water.<br>Add caf\xe9 leaves.</div><script>alert(1)</script>
<footer>Imprint</footer></html>"""


def read(path: Path, content: str | bytes) -> list[tuple[int, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(block) for block in read_document(path).blocks]


def run(*args: str) -> dict[str, Any]:
    return main(make_parser().parse_args(["documents", *args]))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of each kind, as the working folder's docs/."""
    monkeypatch.chdir(tmp_path)
    docs = tmp_path / "docs"
    (docs / "deep" / ".hidden").mkdir(parents=True)
    (docs / "guide.md").write_text(MARKDOWN)
    (docs / "deep" / "tea.HTML").write_bytes(HTML.encode("latin-1"))
    (docs / "notes.txt").write_text("The first note of this file is long enough.\r\n\r\nThe second one is too.\r\n")
    write_pdf(docs / "paper.pdf", ["Printed words that are hyphen-", "ated at the end of a line."], title="A Paper")
    (docs / "deep" / "picture.png").write_bytes(b"\x89PNG")
    (docs / "deep" / ".hidden" / "secret.txt").write_text("Nobody wants this text in the passages of a model.")
    return docs


def test_markdown_keeps_code_and_knows_both_kinds_of_headings(tmp_path: Path) -> None:
    assert read(tmp_path / "a.md", MARKDOWN) == [
        (1, "Guide"),
        (0, "Read this first, it takes only a minute of your time."),
        (2, "Install"),
        (0, "Run the installer, then open the window."),
        (0, "```bash\n# not a heading\nmake install\n```"),
        (0, "- one item of a list\n- another item"),
        (0, ""),
        (2, "Removal of the program"),
        (0, "Delete the folder and everything that is inside."),
    ]


def test_html_has_headings_and_no_navigation(tmp_path: Path) -> None:
    blocks = read(tmp_path / "a.html", HTML.encode("latin-1"))
    assert blocks == [
        (0, "Tea is a drink that people like."),
        (2, "How to brew"),
        (0, "Boil water.\nAdd café leaves."),
    ]
    assert read_document(tmp_path / "a.html").title == "Tea & more"


def test_pdf_has_text_and_title(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["Printed words that are hyphen-", "ated at the end of a line."], title="A Paper")
    document = read_document(tmp_path / "a.pdf")
    assert document == ("A Paper", [Block(0, "Printed words that are hyphenated at the end of a line.")])


def test_a_folder_becomes_passages(folder: Path) -> None:
    report = run("docs", "docs.jsonl", "--min-chars", "20")
    assert report == {
        "out": "docs.jsonl", "files": 4, "passages": 7, "dropped": {}, "bad_files": [], "other_files": {".png": 1},
    }  # fmt: skip
    rows = read_rows(Path("docs.jsonl"))
    assert [(row["id"], row["title"]) for row in rows] == [
        ("deep/tea.HTML#1", "Tea & more"),
        ("deep/tea.HTML#2", "Tea & more > How to brew"),
        ("guide.md#1", "Guide"),
        ("guide.md#2", "Guide > Install"),
        ("guide.md#3", "Guide > Removal of the program"),
        ("notes.txt#1", "notes"),
        ("paper.pdf#1", "A Paper"),
    ]
    assert rows[3]["text"].count("\n\n") == 2  # paragraphs of a section stay together


def test_short_and_repeated_passages_are_dropped_and_counted(folder: Path) -> None:
    (folder / "copy.txt").write_text("the FIRST note of this file is long enough.\n\nThe second one is too.")
    (folder / "short.txt").write_text("Too short.")
    report = run("docs", "docs.jsonl", "--min-chars", "30")
    assert report["dropped"] == {"copy of another passage": 1, "too short": 2}


def test_a_file_name_that_is_not_utf8_is_escaped(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("The only passage of a file with an old name is long enough.")
    run("docs", "passages.jsonl")
    assert "caf\\udce9.txt#1" in [row["id"] for row in read_rows(Path("passages.jsonl"))]


def test_passages_have_at_most_the_tokens_of_a_model(folder: Path) -> None:
    tiny.write_folder(Path("model"), "qwen3")
    run("docs", "docs.jsonl", "--max-tokens", "8", "--model", "model", "--min-chars", "1")
    tokenizer = open_tokenizer("model", None)[1]
    assert tokenizer is not None
    texts = [row["text"] for row in read_rows(Path("docs.jsonl"))]
    assert tokenizer.count_untruncated_tokens(texts, [""] * len(texts)).max() == 8


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("short", 10, ["short"]),
        ("aa bb.\n\ncc dd.\n\nee ff.", 16, ["aa bb.\n\ncc dd.", "ee ff."]),
        ("First one. Second one. Third.", 20, ["First one.", "Second one. Third."]),
        ("line one\nline two", 9, ["line one", "line two"]),
        ("abcdefgh", 4, ["abcd", "efgh"]),
        ("一二三。四五六。", 4, ["一二三。", "四五六。"]),
    ],
)
def test_a_long_text_is_divided_at_the_widest_boundary(text: str, limit: int, parts: list[str]) -> None:
    assert split_text(text, PassageLimits(limit, 1)) == parts


def test_no_word_is_lost_and_no_part_is_too_long() -> None:
    text = "\n\n".join(f"Paragraph {i} has words.\nAnd a second line, {'very ' * i}long." for i in range(12))
    parts = split_text(text, PassageLimits(60, 1))
    assert " ".join(parts).split() == text.split()
    assert max(map(len, parts)) <= 60


def write_bad_files(folder: Path) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    write_pdf(folder / "scan.pdf", [])
    (folder / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    (folder / "binary.md").write_bytes(b"a\x00b")
    (folder / "empty.html").write_text("<p></p>")


def test_bad_files_are_named_one_a_line_and_nothing_is_written(folder: Path) -> None:
    write_bad_files(folder)
    done = run_command("jaxembed.data", "documents", "docs", "docs.jsonl")
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("reading")]
    assert done.returncode == 2 and not Path("docs.jsonl").exists()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "docs/binary.md", "docs/broken.pdf", "docs/empty.html", "docs/latin.txt", "docs/scan.pdf",
    ]  # fmt: skip
    assert lines[-1] == "error: docs: 5 of 9 files cannot be read. Repair them, or pass --skip-bad-files."


def test_bad_files_can_be_skipped(folder: Path) -> None:
    write_bad_files(folder)
    report = run("docs", "docs.jsonl", "--skip-bad-files")
    assert report["files"] == 4 and len(report["bad_files"]) == 5


@pytest.mark.parametrize("charset", ["idna", "punycode", "undefined", "zlib", "no-such"])
def test_a_page_in_an_encoding_that_is_none_is_refused(tmp_path: Path, charset: str) -> None:
    (tmp_path / "a.html").write_bytes(b'<meta charset="%s"><p>text \xff\\%s' % (charset.encode(), b"x" * 100))
    with pytest.raises(UserError, match=rf"a\.html: not valid in the encoding that it declares, {charset}\. Save it as UTF-8"):
        read_document(tmp_path / "a.html")


@pytest.mark.parametrize(
    ("charset", "content", "text"),
    [
        ("iso-8859-1", b"\x93quoted\x94", "\u201cquoted\u201d"), ("UTF-16", b"na\xc3\xafve", "na\xefve"),
        ("gb2312", b"\x81\x40", "\u4e02"),
    ],
)  # fmt: skip
def test_encodings_are_those_of_browsers(tmp_path: Path, charset: str, content: bytes, text: str) -> None:
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}"><p>'.encode() + content)
    assert read_document(tmp_path / "a.html").blocks == [Block(0, text)]


def test_halves_of_surrogate_pairs_are_repaired_or_replaced(tmp_path: Path) -> None:
    page = r'<meta charset="unicode_escape"><head><title>\ud83d</title></head><p>\ud83d\ude42 \udc00'
    (tmp_path / "a.html").write_text(page)
    document = read_document(tmp_path / "a.html")
    assert document == ("\ufffd", [Block(0, "\U0001f642 \ufffd")])


@pytest.mark.parametrize("content", ["<title" * 20_000, "<title>" * 20_000, "<p>a" + " " * 300_000 + "b"])
def test_a_hostile_page_takes_no_quadratic_time(tmp_path: Path, content: str) -> None:
    """The spaces would take hours in quadratic time."""
    (tmp_path / "a.html").write_text(f"{content}<p>text" + "<!--" * 100_000)
    assert read_document(tmp_path / "a.html").blocks[-1].text.endswith("text")


def test_a_locked_pdf_is_refused(tmp_path: Path) -> None:
    write_pdf(tmp_path / "locked.pdf", ["A secret."], password="secret")
    with pytest.raises(UserError, match=r"locked\.pdf: needs a password"):
        read_document(tmp_path / "locked.pdf")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent", "out.jsonl"], "absent: no such folder"),
        (["docs", "out.txt"], r"expected an output that ends in \.jsonl"),
        (["docs", "out.jsonl", "--max-tokens", "9"], "--max-tokens: needs --model"),
        (["docs/deep/picture.png", "out.jsonl"], "has no documents"),
        (["docs", "out.jsonl", "--min-chars", "9999"], "no passage is left of 4 files"),
    ],
)
def test_bad_arguments_are_one_line(folder: Path, args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*args)


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"guide\.md: reading it needs markdown_it, .* pip install '\.\[documents\]'"):
        run("docs", "out.jsonl")
