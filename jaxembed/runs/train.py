"""Train a run, from its config to its scores."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxembed.config import Config
from jaxembed.data.pipeline import iter_batches
from jaxembed.devices import processes
from jaxembed.devices.cpu import retain_freed_memory
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError, summarize
from jaxembed.files import write_json
from jaxembed.formats.run_files import DATA_REPORT_FILE
from jaxembed.hub.embedder import Embedder
from jaxembed.runs.base_monitor import BaseMonitor
from jaxembed.runs.merged_adapters import merge_trained_adapters
from jaxembed.runs.mined_negatives import add_mined_negatives
from jaxembed.runs.open import OpenedRun, open_run
from jaxembed.runs.record import record_run, record_start
from jaxembed.runs.report import describe_stage, show_data, show_scores, show_size, summarize_run
from jaxembed.runs.scoring import choose_best_metric, make_evaluator, score_baselines, use_adapter
from jaxembed.runs.state import resume
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.loggers import open_loggers
from jaxembed.training.loop import TrainingLoop
from jaxembed.training.metrics import NullRecorder, Recorder, read_metrics
from jaxembed.training.mfu import MfuMeter, find_device_peak, make_mfu_meter
from jaxembed.training.profile import Profile
from jaxembed.training.run_dir import check_same_config
from jaxembed.training.run_lock import RunLock
from jaxembed.training.shutdown import RESUME_MESSAGE, StopRequest, stop_on_signals
from jaxembed.training.state import begin_stage
from jaxembed.training.step import TrainState


def train(config: Config, command: str = "") -> dict[str, Any]:
    """Train a run to its last step. A run that has a checkpoint resumes there. No other job may train in its directory.

    Args:
        config: Settings of the run.
        command: The command line that starts the run. It is recorded.

    Returns:
        `run_dir`, the last `step` and its `loss`, the duration in `seconds`, and held-out scores by SET/METRIC: of the last
        step (`scores`), of the model before training (`untrained`), and of BM25 (`bm25`).

    Raises:
        UserError: Something in the config, the data, the base, or the run directory is wrong.
        Stopped: The run was asked to stop, and has saved a checkpoint.
    """
    with RunLock(Path(config.run.dir)) as lock:
        return _train(config, lock, command)


def _train(config: Config, lock: RunLock, command: str) -> dict[str, Any]:
    """Train a run. `lock` is acquired when its directory is created.

    The order matters. Cheap checks come before data, and data before weights, so that a mistake is reported early. The run
    directory is created once the data is known to be good. The run is recorded there before the first parameter is read, so
    that a killed start resumes like any other. Baselines are scored before the metrics file is opened: only a run that starts
    at step 0 has them. In every stage, the state is prepared first. Negatives are mined with its weights, and batches are
    built from them.
    """
    start_time = time.perf_counter()
    # Open: config, base, data, model, stages.
    check_same_config(config)
    run = open_run(config, make_mesh(**dict(config.mesh)), lock)
    best_metric = choose_best_metric(config, run.held_out)
    # Record what identifies the run, and refuse to resume another one.
    processes.run_on_first_process_first(partial(record_run, run))
    if processes.is_first():
        write_json(run.run_dir / DATA_REPORT_FILE, [show_data(stage) for stage in run.stages])
    # Restore or initialize the state.
    checkpoints = Checkpoints(run.run_dir, config.train.keep_checkpoints)
    stage_index, state = resume(run, checkpoints)
    show_size(run, state)
    if processes.is_first():
        record_start(run, state, command)
    # Score the baselines.
    encoder = Embedder(run.model, {}, run.tokenizer, run.mesh, run.base.hf_config)
    evaluate = make_evaluator(encoder, run.held_out, run.ranges)
    baselines = score_baselines(run, encoder, state)
    recorder = _open_recorder(run, int(state.step)) if processes.is_first() else NullRecorder()
    for name, scores in baselines.items():
        recorder.log(0, {f"{name}/{metric}": value for metric, value in scores.items()})
    base_monitor = BaseMonitor(run, recorder)
    # Train the remaining stages.
    profile, mfu_meter = Profile(config.train.profile_steps, run.run_dir / "profile"), _make_mfu_meter(run, state)
    retain_freed_memory()  # not earlier, so that the memory that loading used goes back to the system
    try:
        # The stop request comes first: a second signal must not interrupt the last checkpoint, which `closing` waits for.
        with StopRequest() as stop_request, closing(recorder), closing(checkpoints), closing(profile), jax.set_mesh(run.mesh):
            for stage in run.stages[stage_index:]:
                with stop_on_signals(RESUME_MESSAGE):  # nothing to save before the first step of a stage
                    if int(state.step) == stage.first_step > 0:
                        state = merge_trained_adapters(run, stage, state)
                        state = begin_stage(stage, state, run.model, run.mesh)
                    steps_done = int(state.step) - stage.first_step
                    encoder_for = partial(use_adapter, encoder, state.weights)
                    stage = add_mined_negatives(stage, encoder_for, run.run_dir, config.get_key_prefix(stage.index), steps_done)
                loop = TrainingLoop(
                    stage=stage,
                    total_steps=run.total_steps,
                    mesh=run.mesh,
                    train_step=stage.make_train_step(run.model, state),
                    evaluate=evaluate if run.held_out else None,
                    best_metric=best_metric,
                    checkpoints=checkpoints,
                    recorder=recorder,
                    profile=profile,
                    mfu_meter=mfu_meter,
                    check_scores=base_monitor.check,
                )
                recorder.say(describe_stage(stage, len(run.stages)))
                batches = iter_batches(stage.plan, stage.batch_builder, steps_done, stage.config.train.steps)
                state = loop.fit(state, batches, stop_request)
    except OSError as error:  # a full disk, a folder that is no longer writable, or data that cannot be read
        raise _make_file_error(error, run.run_dir) from error
    processes.barrier()  # all processes read the metrics that the first one wrote
    summary = summarize_run(run, time.perf_counter() - start_time)
    show_scores(summary)
    return summary


def _make_file_error(error: OSError, run_dir: Path) -> UserError:
    """Return the error of a file that training could not read or write."""
    problem = f"{run_dir}: cannot be written" if error.filename is None else f"{error.filename}: cannot be accessed"
    return UserError(f"{problem} ({error.strerror or summarize(error)}). Fix the cause and run the same command.")


def _open_recorder(run: OpenedRun, start_step: int) -> Recorder:
    if start_step:
        read_metrics(run.run_dir)  # reports a damaged file before the loggers are opened
    return Recorder(run.run_dir, start_step, run.total_steps, open_loggers(run.config, start_step))


def _make_mfu_meter(run: OpenedRun, state: TrainState) -> MfuMeter | None:
    """Return the meter of the model FLOPs utilization, or None if the peak of the devices is unknown."""
    peak_flops = run.config.train.peak_flops or find_device_peak(run.config.model.dtype)
    if peak_flops is None:
        return None
    num_adapters = len(run.model.adapters)
    return make_mfu_meter(run.model.transformer, state.params, state.frozen, num_adapters, peak_flops * run.mesh.size)
