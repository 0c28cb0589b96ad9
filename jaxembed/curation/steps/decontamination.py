"""The step `decontaminate`: drops texts that equal an evaluation text, share consecutive words with it, or resemble it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from jaxembed.config import SourceConfig
from jaxembed.config.curation import DecontaminateStepConfig, Side
from jaxembed.curation.curation_sources import iter_curated_rows, open_curated_sources
from jaxembed.curation.overlap import DEFAULT_NGRAM_WORDS, OverlapIndex
from jaxembed.curation.steps.curated_row import (
    CuratedRow,
    PreparedStep,
    StepOutcome,
    drop_texts,
    find_problems,
    get_texts,
)
from jaxembed.data.beir import EVALUATION_SPLITS, open_beir
from jaxembed.data.schema import is_text
from jaxembed.errors import UserError
from jaxembed.search.bm25 import Bm25Similarity

QUERIES_PART, DOCUMENTS_PART, OTHER_PART = "queries", "documents", "texts"  # parts of an evaluation set

EvaluationParts = Iterable[tuple[str, Iterable[str]]]  # names of the parts, and their texts
ReadTask = Callable[[str], EvaluationParts]  # the parts of an MTEB task, given its name


def make_decontaminate_step(config: DecontaminateStepConfig, cache: Path, read_task: ReadTask) -> PreparedStep:
    """Return the step.

    Args:
        config: The section of the step.
        cache: Folder for the row indexes.
        read_task: Returns the parts of an MTEB task.

    Raises:
        UserError: An evaluation set cannot be read, or has no text to compare with.
    """
    index = OverlapIndex(config.ngram_words or DEFAULT_NGRAM_WORDS)
    texts, names = list[str](), list[str]()
    for name, parts in iter_evaluation_sets(config, cache, read_task):
        selected = list_selected_texts(config, name, parts)
        index.add(selected)
        texts += selected
        names += [name] * len(selected)
    similarity = Bm25Similarity(texts) if config.bm25_threshold is not None else None

    def find_problem(text: str) -> str | None:
        matches = [match for match in index.find(text) if match.rule == "exact" or config.ngram_words]
        if matches:
            kind = "equal to" if matches[0].rule == "exact" else f"shares {config.ngram_words} words with"
            return f"{kind} a text of {names[matches[0].index]}"
        number, score = similarity.find_most_similar(text) if similarity else (-1, 0.0)
        is_similar = config.bm25_threshold is not None and score >= config.bm25_threshold
        return f"similar to a text of {names[number]} (BM25)" if is_similar else None

    def decontaminate(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [drop_texts(row, find_problems(row, config.sides, find_problem)) for row in rows]

    return PreparedStep(decontaminate, hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest())


def list_selected_texts(config: DecontaminateStepConfig, name: str, parts: EvaluationParts) -> list[str]:
    """Return the texts of the selected parts of an evaluation set. Raise `UserError` if there are none."""
    selected = [text for part, texts in parts if part in (*config.parts, OTHER_PART) for text in texts if is_text(text)]
    if not selected:
        raise UserError(f"decontaminate: {name} has no {' and no '.join(config.parts)}. Remove it, or change parts.")
    return selected


def iter_evaluation_sets(
    config: DecontaminateStepConfig, cache: Path, read_task: ReadTask
) -> Iterator[tuple[str, EvaluationParts]]:
    """Yield the name and the parts of each evaluation set of a step."""
    return chain(
        ((name, read_task(name)) for name in config.tasks),
        ((name, read_beir_parts(Path(name))) for name in config.beir),
        ((name, read_file_parts(name, cache)) for name in config.files),
    )


def read_beir_parts(folder: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the queries of the first of test, dev and train that a BEIR folder has, and all its documents."""
    beir = open_beir(folder, EVALUATION_SPLITS)
    yield QUERIES_PART, map(beir.get_query_text, range(len(beir.query_rows)))
    yield DOCUMENTS_PART, map(beir.get_document_text, range(len(beir.corpus)))


def read_file_parts(path: str, cache: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the texts of a file: queries and positives of pairs; of other rows, all texts."""
    sources = open_curated_sources([SourceConfig(path=path)], cache, path)
    is_pairs = sources[0].format == "pairs"
    sides: tuple[tuple[str, Side], ...] = ((QUERIES_PART, "query"), (DOCUMENTS_PART, "positives"))
    for part, side in sides:
        texts = (text for row in iter_curated_rows(sources) for text in get_texts(row, side))
        yield part if is_pairs else OTHER_PART, texts
