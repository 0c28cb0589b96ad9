"""The loop: next batch, step, then is it time to log, to evaluate, to checkpoint?"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh

from jaxembed.config import TrainConfig
from jaxembed.data.batch import HostBatch
from jaxembed.devices.cpu import release_freed_memory
from jaxembed.devices.placement import put_batch
from jaxembed.errors import Stopped, UserError
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.metrics import Recorder, Unrecorded
from jaxembed.training.mfu import MfuMeter
from jaxembed.training.profile import Profile
from jaxembed.training.shutdown import StopRequest, must_finish
from jaxembed.training.step import Metrics, TrainState

Evaluate = Callable[[Any], Mapping[str, float]]  # all parameters -> scores by SET/METRIC


@dataclasses.dataclass
class StepStats:
    """What happened since the last logged step."""

    since: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0
    useful: int = 0
    padded: int = 0
    pairs: int = 0
    new_programs: int = 0

    def add(self, host: HostBatch, waited: float) -> None:
        self.steps += 1
        self.waited += waited
        self.useful += host.useful_tokens
        self.padded += host.padded_tokens
        self.pairs += host.pairs

    def rates(self, batch_size: int, mfu_meter: MfuMeter | None) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        rates = {
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": self.waited / self.steps,
            "useful_tokens_per_second": self.useful / seconds,
            "examples_per_second": batch_size * self.steps / seconds,
            "padding_fraction": 1 - self.useful / self.padded,
            "new_programs": self.new_programs,
        }
        if mfu_meter is not None:
            rates["mfu"] = mfu_meter.mfu(self.useful, self.pairs, seconds)
        return rates


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """A step that was started."""

    step: int
    host: HostBatch
    metrics: Metrics


@dataclasses.dataclass
class Trainer:
    """What a stage of a run needs beside its state: its config, its index, the steps before it and those of all.

    `best_metric` names the score whose maximum is the best checkpoint's. Without `mfu_meter` none is logged. Steps are
    counted through all stages.
    """

    config: TrainConfig
    stage: int
    before: int
    total: int
    mesh: Mesh
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    source_names: Sequence[str]
    evaluate: Evaluate | None
    best_metric: str
    checkpoints: Checkpoints
    recorder: Recorder | Unrecorded
    plan_hash: str
    profile: Profile
    mfu_meter: MfuMeter | None
    programs: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def fit(self, state: TrainState, batches: Iterator[HostBatch], stop: StopRequest) -> TrainState:
        """Trains to the last step of the stage from the state's own.

        `Stopped`, with a checkpoint of the step, when `stop` asks for it.
        `UserError` at a loss or gradient that is not finite, unless such steps are skipped.
        """
        tally = StepStats()
        running: InFlightStep | None = None
        end = self.before + self.config.steps
        for step in range(int(state.step) + 1, end + 1):
            self.profile.before(step)
            with must_finish(f"step {step}", self.config.stall_timeout_s), StepTraceAnnotation("train", step_num=step):
                asked = time.perf_counter()
                host = next(batches)
                tally.add(host, time.perf_counter() - asked)
                state, metrics = self._step(state, host, tally)
                self._check(running)  # at most one step runs ahead of the host
                running = InFlightStep(step, host, metrics)
                last = step == end
                log = last or step % self.config.log_every == 0
                evaluate = self.evaluate is not None and (last or step % self.config.eval_every == 0)
                stopping = stop.due(step)
                save = last or evaluate or stopping or step % self.config.checkpoint_every == 0
                if log or save:
                    self._check(running)
                    running = None
            self.profile.after(step, metrics)
            if log:
                self._log(step, metrics, tally)
                tally = StepStats()
            self.recorder.advance()
            score = None
            if evaluate and not stopping:
                score = self._evaluate(state, step)[self.best_metric]
                tally.since = time.perf_counter()
            if save:
                self.checkpoints.save(state, {"stage": self.stage, "step": step, "plan_hash": self.plan_hash}, score)
            if stopping and not last:
                raise Stopped(f"saved after step {step} of {self.total}; the same command goes on", stop.signal)
        return state

    def _check(self, running: InFlightStep | None) -> None:
        """Waits for a step; one whose loss or gradient is not finite ends the run, or is told where it was skipped."""
        if running is None:
            return
        loss, norm = float(running.metrics["loss"]), float(running.metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return
        drawn = ", ".join(self.source_names[i] for i in running.host.sources)
        told = f"step {running.step}: loss {loss}, gradient norm {norm}; its batch is from {drawn}"
        if self.config.on_nan == "skip":
            self.recorder.say(f"{told}; skipped")
            return
        latest = self.checkpoints.latest()
        kept = "no checkpoint yet" if latest is None else f"the last good checkpoint is of step {latest}"
        raise UserError(f"{told}; {kept}; lower optim.learning_rate, look at the data, or set train.on_nan=skip")

    def _step(self, state: TrainState, host: HostBatch, tally: StepStats) -> tuple[TrainState, Metrics]:
        batch = put_batch(self.mesh, host.batch)
        shape = batch.texts.tokens.shape
        if shape in self.programs:
            return self.train_step(state, batch)
        release_freed_memory()
        began = time.perf_counter()
        result = jax.block_until_ready(self.train_step(state, batch))
        self.programs.add(shape)
        tally.new_programs += 1
        seconds = time.perf_counter() - began
        told = f"program {len(self.programs)}: {shape[0]} rows x {shape[1]} tokens, compiled and run in {seconds:.1f} s"
        self.recorder.say(told)
        return result

    def _log(self, step: int, metrics: Metrics, tally: StepStats) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        values |= tally.rates(self.config.batch_size, self.mfu_meter)
        self.recorder.log(step, values, self.stage)
        self.recorder.show(loss=f"{values['loss']:.4f}", tokens_s=f"{values['useful_tokens_per_second']:,.0f}")

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        assert self.evaluate is not None
        scores = dict(self.evaluate(state.weights))
        self.recorder.log(step, {f"eval/{name}": value for name, value in scores.items()}, self.stage)
        self.recorder.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return scores
