"""Mine hard negatives for the data of a training stage, with the model in training (ANCE, arXiv:2007.00808) or another one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxembed.config import MineConfig
from jaxembed.config.fields import Fields
from jaxembed.curation.mining import MiningOptions, MiningResult, check_rows_left, embed_pool, mine_negatives
from jaxembed.curation.pool import MiningPool, TextIds, read_pool
from jaxembed.curation.report import count_outcomes
from jaxembed.data.batch import EncodeInputs, EncoderInput
from jaxembed.data.containers import open_container
from jaxembed.data.equality import normalize_text
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import EXAMPLE_FIELD, MINED_SCHEMA, MinedPairSampler
from jaxembed.data.sources import Source
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, cache_dir, compute_file_digest, read_json, write_json
from jaxembed.formats.run_files import read_run_file
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.frozen_encoder import check_model_exists, encode_in_groups, open_frozen_encoder

KEPT_FIELDS = ("query", "prompt")
log = logging.getLogger("jaxembed")


class Miner(NamedTuple):
    """The model that finds negatives.

    Attributes:
        encode: Encodes texts with their instructions.
        width: Width of the vectors.
        identity: Name and hash of the model; empty for the one in training.
    """

    encode: EncodeInputs
    width: int
    identity: Mapping[str, str]


def make_training_miner(embedder: Embedder) -> Miner:
    """Return the model in training as a miner, with the prompts of training. All processes of a run encode together."""
    width = embedder.model.width

    def encode(texts: Sequence[EncoderInput]) -> np.ndarray:
        prompts = [embedder.spec.build_prompt(text.instruction, side=text.side) for text in texts]
        return encode_in_groups(texts, prompts, lambda group, prompt: embedder.encode(group, prompt=prompt), width)

    return Miner(encode, width, {})


def open_miner(name: str) -> Miner:
    """Load another model as a miner, with its own prompts. Each process of a run encodes all texts on its devices."""
    encoder = open_frozen_encoder(name, cache_dir())
    return Miner(encoder.encode, encoder.width, encoder.identity)


def check_miner_exists(config: MineConfig | None) -> None:
    """Raise `UserError` if `mine.model` names no model. A hub model is downloaded."""
    if config is not None and config.model:
        check_model_exists(config.model)


def check_mined_sources(sources: Sequence[Source], config: MineConfig, seed: int, prefix: str) -> None:
    """Check that each source can be mined and has more texts than the first rank. Rows are read only as far as needed.

    Args:
        sources: Sources of a stage.
        config: The `mine` section of the stage.
        seed: Training seed.
        prefix: Prefix of the keys in errors, such as "stages.1.".

    Raises:
        UserError: A source has too few texts, or `mine.sources` names one whose rows are not mined.
    """
    for source in sources:
        if source.name in config.sources and not source.is_mineable:
            raise UserError(
                f"{prefix}mine.sources contains {source.name!r}, but rows of format {source.format} are not mined. Remove it."
            )
    for source in (source for source in sources if source.is_mineable and config.applies_to(source.name)):
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


def write_mined_rows(source: Source, config: MineConfig, miner: Miner, seed: int, path: Path, prefix: str) -> None:
    """Write the pairs of a source with negatives that a model mines among all texts of the source, and a report.

    If the source has several instructions, the first one is used. Positives that the consistency filter removes are left
    out. All processes of a run call this. The first one writes the files, each atomically, and the pairs last.

    Args:
        source: The source.
        config: The `mine` section of the stage.
        miner: The model.
        seed: Training seed.
        path: Where the pairs go. The report has the suffix .json instead.
        prefix: Prefix of the keys in errors, such as "stages.1.".

    Raises:
        UserError: The consistency filter leaves no example.
    """
    # Mine on all processes.
    pool = read_pool(source, None, seed)
    query_vectors, document_vectors = embed_pool(pool, source.config, miner.encode, miner.width, f"{source.name}: ")
    result = mine_negatives(pool, query_vectors, document_vectors, MiningOptions(config, seed))
    check_rows_left(result, config, f"{prefix}mine.consistency_top_k")
    if not processes.is_first():
        return

    # Write on the first process.
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        write_jsonl(partial, _build_rows(source, pool, result, seed))
        counts = count_outcomes(pool, result, config)
        write_json(
            _name_report(path),
            {"source": source.name, "digest": compute_file_digest(partial), "model": miner.identity, **counts},
        )
    num_mined = [mined.num_mined for mined in result.rows]
    log.info("%s: mined %.1f negatives per query; %d queries have none", source.name, np.mean(num_mined), num_mined.count(0))
    if config.consistency_top_k:
        log.info(
            "  dropped: %s of %s pairs (no positive among the %d nearest documents)",
            f"{len(result.inconsistent_rows):,}", f"{len(pool.rows):,}", config.consistency_top_k,
        )  # fmt: skip


def open_mined_pairs(source: Source, path: Path) -> Source:
    """Return a source that draws from the pairs that were mined for it. Raise `UserError` if they changed since."""
    rows = IndexedRows(open_container(str(path)), MINED_SCHEMA)
    report = _name_report(path)
    if report.exists():  # earlier versions wrote none
        digest = Fields(read_run_file(read_json, report), str(report)).string("digest")
        if digest != rows.digest:
            raise UserError(f"{path}: changed since it was mined. Restore it, or name another run.dir.")
    return dataclasses.replace(source, sampler=MinedPairSampler(rows, source.sampler.max_positives))


def _name_report(path: Path) -> Path:
    """Return the path of the report of a file of mined pairs."""
    return path.with_suffix(".json")


def _build_rows(source: Source, pool: MiningPool, result: MiningResult, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the pairs of a source that have a positive left, with the number of their example and their mined negatives."""
    mined_rows = dict(zip(result.row_numbers, result.rows, strict=True))
    for row_number, (example, row) in enumerate(source.iter_numbered_pairs(seed)):
        if (mined := mined_rows.get(row_number)) is None:
            continue
        kept_positives = {normalize_text(pool.documents[document]) for document in mined.row.positives}
        yield {
            EXAMPLE_FIELD: example,
            **{key: row[key] for key in KEPT_FIELDS if key in row},
            "pos": [text for text in row["pos"] if normalize_text(text) in kept_positives],
            "neg": [pool.documents[document] for document in mined.negatives],
        }
