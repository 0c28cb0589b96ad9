"""Passages of a user's documents: a folder of files becomes rows {"id", "title", "text"}.

files --> headings and paragraphs --> passages of limited length --remove copies--> one JSONL file
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxembed.curation.document_files import DOCUMENT_READERS, Document, check_libraries, read_document
from jaxembed.data.equality import normalize_text
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, exists

# Boundaries at which a long text is divided, in this order, and the text that joins its parts.
BOUNDARIES = (
    (re.compile(r"\n[ \t]*(?:\n[ \t]*)+"), "\n\n"),
    (re.compile(r"\n"), "\n"),
    (re.compile("(?<=[.!?])\\s+|(?<=[\u3002\uff01\uff1f])"), " "),
    (re.compile(r"\s+"), " "),
)
TITLE_SEPARATOR = " > "
DUPLICATE_PASSAGE, SHORT_PASSAGE = "copy of another passage", "too short"
log = logging.getLogger(__name__)


class PassageLimits(NamedTuple):
    """Lengths of passages.

    Attributes:
        max_length: Upper limit, in the unit of `measure`.
        min_chars: Shorter passages are dropped. In characters.
        measure: Returns the length of a text: its characters, or its tokens.
    """

    max_length: int
    min_chars: int
    measure: Callable[[str], int] = len


def write_passages(folder: Path, out: Path, limits: PassageLimits, skip_bad_files: bool = False) -> dict[str, Any]:
    """Write the passages of all documents below a folder to a JSONL file. A kill leaves no file.

    The id of a passage is the path of its file below the folder, and its number in the file. The title consists of the title
    of the document and the headings above the passage.

    Args:
        folder: Folder of documents, or one file.
        out: The file to write.
        limits: Lengths of passages.
        skip_bad_files: Leave out files that cannot be read. They are in the report.

    Returns:
        Counts of files, passages and dropped passages; the bad files with their problems; counts of files of other kinds.

    Raises:
        UserError: There is no document or no passage, or a file is bad. The log has a line for each bad file.
    """
    files, others = _find_files(folder)
    check_libraries(files)
    documents, problems = _read_documents(folder, files)
    for problem in problems:
        log.warning("%s", problem)
    if problems and not skip_bad_files:
        counts = f"{len(problems)} of {len(files)} files"
        raise UserError(f"{folder}: {counts} cannot be read. Repair them, or pass --skip-bad-files.")
    dropped: Counter[str] = Counter()
    rows = list(_iter_rows(documents, limits, dropped))
    if not rows:
        counts = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise UserError(f"{folder}: no passage is left of {len(files)} files ({counts}). Lower --min-chars.")
    with atomic_write(out) as partial:
        write_jsonl(partial, rows)
    return {
        "files": len(documents),
        "passages": len(rows),
        "dropped": dict(dropped),
        "bad_files": problems,
        "other_files": dict(others.most_common()),
    }


def _find_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the documents below a folder in sorted order, and counts of other files by extension. Hidden files are ignored."""
    if not exists(folder):
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    visible = [path for path in paths if path.is_file() and not _is_hidden(path.relative_to(folder))]
    files = [path for path in visible if path.suffix.lower() in DOCUMENT_READERS]
    if not files:
        raise UserError(f"{folder}: has no documents (expected files that end in {', '.join(DOCUMENT_READERS)})")
    return files, Counter(path.suffix.lower() or path.name for path in visible if path.suffix.lower() not in DOCUMENT_READERS)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_documents(folder: Path, files: Sequence[Path]) -> tuple[dict[str, Document], list[str]]:
    """Return the documents by their path below the folder, and a line for each file that is bad."""
    documents, problems = {}, []
    for path in tqdm(files, "reading", unit="file"):
        try:
            document = read_document(path)
        except UserError as error:
            problems.append(str(error))
        else:
            name = path.relative_to(folder).as_posix() if path != folder else path.name
            documents[escape_surrogates(name)] = document
    return documents, problems


def escape_surrogates(name: str) -> str:
    """Return a file name with its bytes that are not UTF-8 escaped, so that it can be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def _iter_rows(documents: dict[str, Document], limits: PassageLimits, dropped: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of all documents. Count in `dropped` why passages are left out."""
    seen = set()
    for name, document in documents.items():
        for number, (title, text) in enumerate(split_document(document, Path(name).stem, limits), 1):
            key = normalize_text(text)
            if len(text) < limits.min_chars:
                dropped[SHORT_PASSAGE] += 1
            elif key in seen:
                dropped[DUPLICATE_PASSAGE] += 1
            else:
                seen.add(key)
                yield {"id": f"{name}#{number}", "title": title, "text": text}


def split_document(document: Document, default_title: str, limits: PassageLimits) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each passage. A passage never crosses a heading.

    Args:
        document: The document. Without a title, its first heading of level 1 is its title.
        default_title: The title of a document without one.
        limits: Lengths of passages.
    """
    first = next((block.text for block in document.blocks if block.level == 1), "")
    title = document.title or first or default_title
    headings: dict[int, str] = {}
    for level, texts in _group_sections(document):
        if level:
            headings = {other: text for other, text in headings.items() if other < level} | {level: texts[0]}
            continue
        parents = [text for _, text in sorted(headings.items()) if text != title]
        for text in split_text("\n\n".join(texts), limits):
            yield TITLE_SEPARATOR.join([title, *parents]), text


def _group_sections(document: Document) -> Iterator[tuple[int, list[str]]]:
    """Yield headings one by one, and the paragraphs between two headings together (level 0)."""
    paragraphs: list[str] = []
    for level, text in document.blocks:
        if level == 0:
            paragraphs += [text] if text else []
            continue
        if paragraphs:
            yield 0, paragraphs
            paragraphs = []
        yield level, [text]
    if paragraphs:
        yield 0, paragraphs


def split_text(text: str, limits: PassageLimits, boundary: int = 0) -> list[str]:
    """Divide a text into as few parts as fit the limit: at paragraphs, lines, sentences, words, or anywhere, in this order."""
    if limits.measure(text) <= limits.max_length:
        return [text]
    if boundary == len(BOUNDARIES):
        middle = len(text) // 2
        halves = (text[:middle], text[middle:]) if middle else ()
        return [part for half in halves for part in split_text(half, limits, boundary)] or [text]
    pattern, separator = BOUNDARIES[boundary]
    pieces = [piece for part in pattern.split(text) if part.strip() for piece in split_text(part, limits, boundary + 1)]
    return _join_pieces(pieces, separator, limits)


def _join_pieces(pieces: Sequence[str], separator: str, limits: PassageLimits) -> list[str]:
    """Join neighbors while the result fits the limit."""
    lengths = [limits.measure(piece + separator) for piece in pieces]
    parts: list[list[str]] = []
    room = 0
    for piece, length in zip(pieces, lengths, strict=True):
        if length > room:
            parts.append([])
            room = limits.max_length
        parts[-1].append(piece)
        room -= length
    return [separator.join(part) for part in parts]
