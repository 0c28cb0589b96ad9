"""Hard negatives that the model in training finds for its own data, as a stage begins (ANCE, arXiv:2007.00808)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.config import MineConfig
from jaxembed.curation.mining import MiningOptions, embed, mine
from jaxembed.curation.pool import TextIds, read_pool
from jaxembed.curation.rules import Rule
from jaxembed.data.batch import RawText
from jaxembed.data.jsonl import write_lines
from jaxembed.data.sampling import Pairs
from jaxembed.data.sources import Source
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.files import written_whole
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.frozen_encoder import in_groups

KEPT = ("query", "prompt", "pos")  # fields of a row that stay
log = logging.getLogger("jaxembed")


def is_mined(source: Source) -> bool:
    """Whether its negatives are those that the model finds: other shapes than pairs have their own way to them."""
    return isinstance(source.sampler, Pairs)


def check_reach(sources: Sequence[Source], chosen: MineConfig, seed: int, place: str) -> None:
    """`UserError`, its key beginning with `place`, where a source has too few texts for the rule's first rank.

    No more of its rows are read than it takes to know.
    """
    first = Rule.of(chosen).first
    for source in filter(is_mined, sources):
        count = _texts(source, seed, first + 1)  # one is the query's own positive
        if count <= first:
            told = f"and source {source.name} has {count} texts, at least one of them a query's own; lower its begin"
            raise UserError(f"{place}mine.window takes negatives from rank {first} on, {told}")


def _texts(source: Source, seed: int, most: int) -> int:
    """How many texts a source of pairs has, counted to `most` or a little beyond."""
    texts = TextIds()
    for row in source.as_pairs(seed):
        for text in (*row["pos"], *row.get("neg", ())):
            texts(text)
        if len(texts.texts) >= most:
            break
    return len(texts.texts)


def write_mined(source: Source, chosen: MineConfig, embedder: Embedder, seed: int, path: Path) -> None:
    """Writes the rows of a source of pairs, their negatives replaced by those that the model finds among all its texts.

    Prompts are those of training, of several instructions the first. All processes of a run find them together, the first one
    writes the file, which is moved to its place whole.
    """
    pool = read_pool(source, None, seed)

    def encode(texts: Sequence[RawText]) -> np.ndarray:
        prompts = [embedder.spec.prompt(text.instruction) for text in texts]
        return in_groups(texts, prompts, lambda of_prompt, prompt: embedder.encode(of_prompt, prompt=prompt), width)

    width = embedder.model.width
    instruction = source.config.instruction_of_documents(next(iter(source.config.instructions), ""))
    queries = embed(pool.queries, encode, width, f"{source.name}: queries")
    documents = embed([RawText(text, "document", instruction) for text in pool.documents], encode, width, "documents")
    found = mine(pool, queries, documents, MiningOptions(Rule.of(chosen), seed)).rows
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = ([pool.documents[number] for number in row.negatives] for row in found)
    rows = zip(source.as_pairs(seed), texts, strict=True)
    with written_whole(path) as partial:
        write_lines(partial, ({**{name: row[name] for name in KEPT if name in row}, "neg": neg} for row, neg in rows))
    counts = [row.mined for row in found]
    log.info("%s: mined %.1f negatives a query; %d queries have none", source.name, np.mean(counts), counts.count(0))
