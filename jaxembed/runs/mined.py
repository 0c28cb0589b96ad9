"""Hard negatives that the model mines for its own data before a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxembed.curation.remining import write_mined_rows
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import PairSampler
from jaxembed.data.sources import ROW_SCHEMAS
from jaxembed.devices import processes
from jaxembed.hub.embedder import Embedder
from jaxembed.training.stage import Stage


def with_mined_negatives(stage: Stage, encoder_for: Callable[[str], Embedder], run_dir: Path) -> Stage:
    """Return the stage with the hard negatives that the model finds for its pairs. A stage without `mine` stays as it is.

    Negatives are written to the run directory. A resumed run reads them from there.

    Args:
        stage: The stage that is about to start.
        encoder_for: Maps the name of an adapter to the model with that adapter.
        run_dir: Directory of the run.
    """
    if stage.config.mine is None:
        return stage
    sources = list(stage.sources)
    for number, source in enumerate(stage.sources):
        if not stage.mines(source):
            continue
        path = run_dir / "mined" / f"stage-{stage.index}-source-{number}.jsonl"
        is_written = processes.broadcast_from_first(bytes([path.exists()]))[0]
        if not is_written:
            write_mined_rows(source, stage.config.mine, encoder_for(source.config.adapter), stage.config.train.seed, path)
            processes.barrier()
        rows = IndexedRows(open_container(str(path)), ROW_SCHEMAS["pairs"])
        sources[number] = dataclasses.replace(source, sampler=PairSampler(rows, source.sampler.max_positives))
    return dataclasses.replace(stage, batch_builder=stage.batch_builder.with_sources(sources))
