"""Adapters of finished stages, merged into the base before the next stage: the steps of LLM2Vec."""

from __future__ import annotations

import dataclasses
import logging
import shutil

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxembed.devices import processes
from jaxembed.devices.placement import to_host
from jaxembed.files import name_in_errors
from jaxembed.formats.peft import write_adapters
from jaxembed.formats.run_files import name_merged_adapters
from jaxembed.hub.base import Base, BaseWithWeights
from jaxembed.model.embedder import init_params
from jaxembed.model.lora import ADAPTER_PARAMS, FROZEN_PARTS
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.runs.open import OpenedRun
from jaxembed.training.stage import Stage
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")


def open_stage_base(run: OpenedRun, index: int) -> Base:
    """Return the base of a stage: that of the run, with the adapters that were merged into it before the stage."""
    base = run.base
    for stage in run.config.list_merging_stages(index):
        assert isinstance(base, BaseWithWeights)  # adapters need weights
        base = base.with_adapters(base.name, name_merged_adapters(run.run_dir, stage), base.spec)
    return base


def merge_trained_adapters(run: OpenedRun, stage: Stage, state: TrainState) -> TrainState:
    """Merge the adapters of the previous stage into the base, and start new ones. Without `merge_adapters` nothing changes.

    The adapters are written to the run directory as a PEFT folder, with which a resumed run merges them again. They are added
    to the weights of the base before these are rounded.
    """
    lora = run.model.lora
    if lora is None or not stage.config.train.merge_adapters:
        return state
    folder = name_merged_adapters(run.run_dir, stage.index)
    adapters = {"decoder": jax.tree.map(to_host, state.params["decoder"])}
    if processes.is_first():
        partial_folder = folder.with_suffix(".partial")
        for path in (partial_folder, folder):  # of a run that was killed here, or went back to an earlier checkpoint
            shutil.rmtree(path, ignore_errors=True)
        try:
            with name_in_errors(folder):
                partial_folder.mkdir(parents=True)
                write_adapters(partial_folder, adapters, lora, run.base.name, run.model.transformer.family)
                partial_folder.rename(folder)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    processes.barrier()
    log.info("%s: the adapters so far, merged into the base before the stage", folder)
    # The base with all merged adapters takes the place of the old one, which is freed first.
    for leaf in jax.tree.leaves(state.frozen):
        leaf.delete()
    shapes, shardings = compute_shapes_and_shardings(run.model, run.mesh)
    parts = [part for part in FROZEN_PARTS if part in shapes]
    frozen = open_stage_base(run, stage.index).load(*({part: tree[part] for part in parts} for tree in (shapes, shardings)))
    # Initialize new adapters.
    adapter_shardings = {path: sharding for path, sharding in flatten_dict(shardings).items() if path[-1] in ADAPTER_PARAMS}
    key = jax.random.fold_in(state.key, stage.index)
    with jax.set_mesh(None):  # under the mesh of the run, Flax would look for the logical axes in it
        new_adapters = flatten_dict(init_params(run.model, key, unflatten_dict(adapter_shardings)))
    return dataclasses.replace(state, params=unflatten_dict(flatten_dict(state.params) | new_adapters), frozen=frozen)
