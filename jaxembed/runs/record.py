"""Record what identifies a run in its directory, and compare it when the run resumes."""

from __future__ import annotations

import datetime
import json
from typing import Any

from jaxembed.devices import processes
from jaxembed.files import append_line, write_json
from jaxembed.formats.run_files import STARTS_FILE
from jaxembed.hub.spec_files import write_spec
from jaxembed.runs.open import OpenedRun
from jaxembed.runs.ranges import record_ranges
from jaxembed.runs.report import count_parameters, describe_computation
from jaxembed.training.resume_settings import find_selection_set_name
from jaxembed.training.run_dir import Record, check_record, record_versions, write_record
from jaxembed.training.step import TrainState


def record_run(run: OpenedRun) -> None:
    """Write versions, spec, data hashes, frozen encoders, and base beside the config of a run.

    Raises:
        UserError: A resumed run has other data, another frozen encoder, or another base.
    """
    run_dir, records = run.run_dir, _collect_records(run)
    # A refused run leaves the files as they are.
    for record in records:
        check_record(run_dir, record)
    record_versions(run_dir)
    if processes.is_first():
        write_spec(run_dir, run.spec)
        record_ranges(run_dir, run.ranges)
        drop_counts = [{source.name: source.sampler.drop_counts for source in stage.all_sources} for stage in run.stages]
        write_json(run_dir / "dropped.json", drop_counts)
    # The base comes last, because its file makes the folder a run for other commands.
    for record in records:
        write_record(run_dir, record)


def _collect_records(run: OpenedRun) -> list[Record]:
    """Return what identifies the data, the frozen encoders, and the base of a run."""
    digests: dict[str, str] = {}
    for source in run.sources:
        path = source.config.path
        is_other_split = digests.get(path, source.digest) != source.digest
        digests[f"{path} (split {source.config.split or 'by default'})" if is_other_split else path] = source.digest
    records = [Record("data_hashes", digests, "its training data changed")]
    if run.held_out:  # only the set that selects the best checkpoint must stay: scores of other data cannot be ranked
        held_out_digests = {held_out.config.name: held_out.digest for held_out in run.held_out}
        problem = "the held-out data that selects its best checkpoint changed"
        records.append(Record("eval_hashes", held_out_digests, problem, {find_selection_set_name(run.config)}))
    records += [Record(role, encoder.identity, f"its {role} changed") for role, encoder in run.encoders.items()]
    base: dict[str, Any] = {"name": run.base.name, "hash": run.base.hash(), "config": dict(run.base.hf_config)}
    if run.model.lora is not None:
        base["lora"] = run.model.lora.model_dump(mode="json")
    if run.model.has_head:
        base["has_head"] = True
    # Only the hash is compared: it covers the config of the base, and the run's config covers LoRA. So keys that a later
    # version adds to this file do not stop a resumed run.
    return [*records, Record("base", base, "its base changed", {"hash"})]


def record_start(run: OpenedRun, state: TrainState, command: str) -> None:
    """Append a line about this start of a run: time, first step, command, devices, and computation."""
    trained, frozen = count_parameters(state)
    devices = run.mesh.devices.flat
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": int(state.step),
        "command": command,
        "processes": processes.count(),
        "devices": run.mesh.size,
        "device": devices[0].device_kind,
        "parameters": trained + frozen,
        "trained_parameters": trained,
        "computation": describe_computation(run),
    }
    append_line(run.run_dir / STARTS_FILE, json.dumps(start))
