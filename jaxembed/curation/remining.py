"""Hard negatives that the model in training mines for its own data at the start of a stage (ANCE, arXiv:2007.00808)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.config import MineConfig
from jaxembed.curation.mining import MiningOptions, embed_texts, mine_negatives
from jaxembed.curation.pool import TextIds, read_pool
from jaxembed.data.batch import EncoderInput
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.sources import Source
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.files import atomic_write
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.frozen_encoder import encode_in_groups

KEPT_FIELDS = ("query", "prompt", "pos")
log = logging.getLogger("jaxembed")


def check_first_rank(sources: Sequence[Source], config: MineConfig, seed: int, prefix: str) -> None:
    """Check that every source has more texts than the first rank of the rule. Read no more rows than needed.

    Args:
        sources: Sources of a stage.
        config: The `mine` section of the stage.
        seed: Training seed.
        prefix: Prefix of the keys in errors, such as "stages.1.".

    Raises:
        UserError: If a source has too few texts.
    """
    for source in (source for source in sources if source.is_mineable):
        num_texts = _count_texts(source, seed, limit=config.first_rank + 1)  # one text is the query's own positive
        if num_texts <= config.first_rank:
            raise UserError(
                f"{prefix}mine.window: negatives start at rank {config.first_rank}, but source {source.name} has only "
                f"{num_texts} texts, and at least one of them is a query's own positive. Lower the start of the window."
            )


def _count_texts(source: Source, seed: int, limit: int) -> int:
    """Count the distinct texts of a source of pairs up to about `limit`."""
    texts = TextIds()
    for row in source.iter_pairs(seed):
        for text in (*row["pos"], *row.get("neg", ())):
            texts.add(text)
        if len(texts) >= limit:
            break
    return len(texts)


def write_mined_rows(source: Source, config: MineConfig, embedder: Embedder, seed: int, path: Path) -> None:
    """Write the rows of a source of pairs with negatives that the model mines among all texts of the source.

    Prompts are those of training. If the source has several instructions, the first one is used. All processes of a run
    mine together. The first process writes the file atomically.
    """
    width = embedder.model.width

    def encode(texts: Sequence[EncoderInput]) -> np.ndarray:
        prompts = [embedder.spec.prompt(text.instruction) for text in texts]
        return encode_in_groups(texts, prompts, lambda group, prompt: embedder.encode(group, prompt=prompt), width)

    # Mine on all processes.
    pool = read_pool(source, None, seed)
    instruction = source.config.instruction_for_documents(next(iter(source.config.instructions), ""))
    document_inputs = [EncoderInput(text, "document", instruction) for text in pool.documents]
    query_vectors = embed_texts(pool.queries, encode, width, f"{source.name}: queries")
    document_vectors = embed_texts(document_inputs, encode, width, "documents")
    mined_rows = mine_negatives(pool, query_vectors, document_vectors, MiningOptions(config, seed)).rows
    if not processes.is_first():
        return

    # Write on the first process.
    path.parent.mkdir(parents=True, exist_ok=True)
    negatives = ([pool.documents[document] for document in mined.negatives] for mined in mined_rows)
    rows = zip(source.iter_pairs(seed), negatives, strict=True)
    with atomic_write(path) as partial:
        write_jsonl(partial, ({**{key: row[key] for key in KEPT_FIELDS if key in row}, "neg": neg} for row, neg in rows))
    counts = [mined.num_mined for mined in mined_rows]
    log.info("%s: mined %.1f negatives per query; %d queries have none", source.name, np.mean(counts), counts.count(0))
