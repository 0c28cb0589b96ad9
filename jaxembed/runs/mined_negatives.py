"""Mine hard negatives for the data of a stage before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxembed.curation.remining import make_training_miner, open_mined_pairs, open_miner, write_mined_rows
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.formats.run_files import name_mined_pairs
from jaxembed.hub.embedder import Embedder
from jaxembed.training.stage import Stage


def add_mined_negatives(
    stage: Stage, encoder_for: Callable[[str], Embedder], run_dir: Path, key_prefix: str, steps_done: int
) -> Stage:
    """Return the stage with the hard negatives that its miner finds for its pairs. A stage without `mine` is unchanged.

    The miner is the model that is about to be trained, or `mine.model`, which is in memory only while it is needed. Pairs
    with their negatives are written to the run directory. A resumed run reads them from there. The consistency filter of
    `mine` may leave fewer examples: the stage then has a new plan for them.

    Args:
        stage: The stage that is about to start, or to continue.
        encoder_for: Maps the name of an adapter to the model with that adapter.
        run_dir: Directory of the run.
        key_prefix: Prefix of the keys of the stage in errors, such as "stages.1.".
        steps_done: Number of steps of the stage that the run has trained.

    Raises:
        UserError: The mined pairs of a stage that has started are missing or changed, or too few examples are left.
    """
    mine = stage.config.mine
    if mine is None:
        return stage
    sources, other_miner = list(stage.sources), None
    for number, source in enumerate(stage.sources):
        if not stage.mines(source):
            continue
        path = name_mined_pairs(run_dir, stage.index, number)
        is_written = processes.broadcast_from_first(bytes([path.exists()]))[0]
        if not is_written and steps_done:
            raise UserError(f"{path}: is missing, but the run has trained on it. Restore it, or name another run.dir.")
        if not is_written:
            if mine.model and other_miner is None:
                other_miner = open_miner(mine.model)
            miner = other_miner or make_training_miner(encoder_for(source.config.adapter))
            write_mined_rows(source, mine, miner, stage.config.train.seed, path, key_prefix)
            processes.barrier()
        sources[number] = open_mined_pairs(source, path)
    try:
        plan = stage.plan.with_sources(sources)
    except UserError as error:
        raise UserError(f"{error} {key_prefix}mine.consistency_top_k has dropped the others.") from None
    return dataclasses.replace(stage, plan=plan, batch_builder=stage.batch_builder.with_sources(sources))
