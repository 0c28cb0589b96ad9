"""Mine hard negatives for the pairs of a file, and write the output and its report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxembed.config import SourceConfig
from jaxembed.curation.mining import (
    MiningOptions,
    check_first_rank,
    check_rows_left,
    embed_pool,
    make_id_scorer,
    mine_negatives,
)
from jaxembed.curation.pool import open_mining_source, read_corpus, read_pool
from jaxembed.curation.report import collect_scores_and_samples, count_outcomes, describe_options, to_output_row
from jaxembed.curation.rules import option_name
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, write_json
from jaxembed.hub.cross_encoder import open_cross_encoder
from jaxembed.hub.frozen_encoder import open_frozen_encoder

log = logging.getLogger("jaxembed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiningJob:
    """Pairs for which negatives are mined.

    Attributes:
        model: Folder or hub id of the model that finds the candidates.
        source: The pairs.
        options: How candidates are found and filtered.
        corpus_paths: Documents to search. Empty or None: the positives and negatives of the pairs.
        text_column: Column of the corpus that has the text.
        cross_encoder: Cross-encoder whose scores replace those of the model, or None.
        out: File of the pairs with their mined negatives.
        report_path: File of counts, histograms and samples.
    """

    model: str
    source: SourceConfig
    options: MiningOptions
    corpus_paths: Sequence[str] | None
    text_column: str
    cross_encoder: str | None
    out: Path
    report_path: Path


def mine_source(job: MiningJob, cache: Path, mesh: Mesh) -> dict[str, Any]:
    """Mine negatives for the pairs of a job, then write its output and report. All texts are read before a model is loaded.

    Args:
        job: The job.
        cache: Folder of the vectors and scores that earlier calls computed.
        mesh: The devices of the model.

    Returns:
        The files that were written, and the counts of the report.

    Raises:
        UserError: The pairs or documents are malformed or too few, a model cannot be loaded, or a file cannot be written.
    """
    # Read all texts.
    source = open_mining_source(job.source, cache)
    corpus = read_corpus(job.corpus_paths, cache, job.text_column) if job.corpus_paths else None
    pool = read_pool(source, corpus, job.options.seed)
    check_first_rank(pool, job.options.config, "Name more documents with --corpus.")

    # Open the models and encode the texts.
    rescore = make_id_scorer(open_cross_encoder(job.cross_encoder, cache), pool) if job.cross_encoder else None
    encoder = open_frozen_encoder(job.model, cache, mesh)
    query_vectors, document_vectors = embed_pool(pool, job.source, encoder.encode, encoder.width)

    # Mine, report and write.
    config = job.options.config
    result = mine_negatives(pool, query_vectors, document_vectors, job.options, rescore)
    check_rows_left(result, config, option_name("consistency_top_k"))
    counts = count_outcomes(pool, result, config)
    if "warning" in counts:
        log.warning("warning: %s", counts["warning"])
    report = {
        **counts,
        "model": encoder.identity,
        "cross_encoder": job.cross_encoder,
        "corpus_paths": job.corpus_paths,
        "digest": source.digest,
        "source": job.source.model_dump(mode="json", exclude_defaults=True),
        "ways": describe_options(job.options),
        **collect_scores_and_samples(pool, result),
    }
    _write_outputs(job.out, (to_output_row(pool, row) for row in result.rows), job.report_path, report)
    return {"out": str(job.out), "report": str(job.report_path), **counts}


def _write_outputs(out: Path, rows: Iterable[Mapping[str, Any]], report_path: Path, report: Mapping[str, Any]) -> None:
    """Write OUT, then the report. A `UserError` names the file that could not be written."""
    try:
        with atomic_write(out) as partial:
            write_jsonl(partial, rows)
        write_json(report_path, report)
    except OSError as error:
        if out.exists():
            raise UserError(f"{report_path}: cannot be written ({error.strerror}). {out} is complete.") from None
        raise UserError(f"{out}: cannot be written ({error.strerror}). Make room, and the same command continues.") from None
