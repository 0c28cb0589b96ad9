"""The training loop: take a batch, run a step, then log, evaluate and save a checkpoint when due."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
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
from jaxembed.training.metrics import NullRecorder, Recorder
from jaxembed.training.mfu import MfuMeter
from jaxembed.training.profile import Profile
from jaxembed.training.shutdown import StopRequest, must_finish
from jaxembed.training.stage import Stage
from jaxembed.training.step import Metrics, TrainState

Evaluate = Callable[[Any], Mapping[str, float]]  # all parameters -> scores by SET/METRIC


@dataclasses.dataclass
class StepStats:
    """Counts and times since the last logged step.

    Attributes:
        start_time: Start of the measurement (`time.perf_counter`).
        steps: Number of steps.
        data_wait_seconds: Seconds of waiting for batches.
        useful_tokens: Tokens of texts.
        padded_tokens: Tokens of rows, padding included.
        token_pairs: Pairs of tokens in one text, for `MfuMeter`.
        examples: Queries, and texts whose tokens are predicted.
        new_programs: Number of programs that were compiled.
    """

    start_time: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    data_wait_seconds: float = 0.0
    useful_tokens: int = 0
    padded_tokens: int = 0
    token_pairs: int = 0
    examples: int = 0
    new_programs: int = 0

    def add(self, host_batch: HostBatch, data_wait_seconds: float) -> None:
        """Count a step on a batch that took so many seconds to arrive."""
        self.steps += 1
        self.data_wait_seconds += data_wait_seconds
        self.useful_tokens += host_batch.useful_tokens
        self.padded_tokens += host_batch.padded_tokens
        self.token_pairs += host_batch.token_pairs
        self.examples += host_batch.examples

    def compute_rates(self, mfu_meter: MfuMeter | None) -> dict[str, float]:
        """Return the throughput metrics by name."""
        seconds = time.perf_counter() - self.start_time
        rates = {
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": self.data_wait_seconds / self.steps,
            "useful_tokens_per_second": self.useful_tokens / seconds,
            "examples_per_second": self.examples / seconds,
            "padding_fraction": 1 - self.useful_tokens / self.padded_tokens,
            "new_programs": self.new_programs,
        }
        if mfu_meter is not None:
            rates["mfu"] = mfu_meter.compute_mfu(self.useful_tokens, self.token_pairs, seconds)
        return rates


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """A step that was started and may still be running."""

    step: int
    host_batch: HostBatch
    metrics: Metrics


@dataclasses.dataclass(kw_only=True)
class TrainingLoop:
    """The training loop of one stage. Steps are counted across all stages.

    Attributes:
        stage: The stage to train.
        total_steps: Steps of all stages.
        mesh: The device mesh.
        train_step: The compiled step of the stage.
        evaluate: Scores all parameters on the held-out sets; None without such sets.
        best_metric: SET/METRIC whose maximum selects the best checkpoint.
        checkpoints: Where states are saved.
        recorder: Where metrics are written.
        profile: Records a trace of some steps.
        mfu_meter: Computes MFU; None if the peak of the devices is unknown.
        check_scores: Called with the step and its scores after every evaluation.
        program_shapes: Batch shapes for which a program is compiled.
    """

    stage: Stage
    total_steps: int
    mesh: Mesh
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    evaluate: Evaluate | None
    best_metric: str
    checkpoints: Checkpoints
    recorder: Recorder | NullRecorder
    profile: Profile
    mfu_meter: MfuMeter | None
    check_scores: Callable[[int, Mapping[str, float]], None]
    program_shapes: set[tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=set)

    @property
    def config(self) -> TrainConfig:
        """The `train` section of the stage."""
        return self.stage.config.train

    def fit(self, state: TrainState, batches: Iterator[HostBatch], stop: StopRequest) -> TrainState:
        """Train from the state's step to the last step of the stage.

        Args:
            state: The state to start from. It is consumed.
            batches: The batches of the remaining steps.
            stop: Whether the run was asked to stop.

        Returns:
            The state after the last step.

        Raises:
            Stopped: `stop` was due. A checkpoint of the step is saved.
            UserError: A loss or gradient is not finite, and train.on_nan does not skip such steps.
        """
        stats = StepStats()
        in_flight: InFlightStep | None = None
        last_step = self.stage.last_step
        for step in range(int(state.step) + 1, last_step + 1):
            self.profile.before_step(step)
            with must_finish(f"step {step}", self.config.stall_timeout_s), StepTraceAnnotation("train", step_num=step):
                # Take the next batch.
                wait_start = time.perf_counter()
                host_batch = next(batches)
                stats.add(host_batch, time.perf_counter() - wait_start)
                # Start the step, then wait for the one before: at most one step runs ahead of the host.
                state, metrics = self._start_step(state, host_batch, stats)
                self._check_finite(in_flight)
                in_flight = InFlightStep(step, host_batch, metrics)
                # Decide what is due. Logging and saving must wait until the step has finished.
                is_last = step == last_step
                log = is_last or step % self.config.log_every == 0
                evaluate = self.evaluate is not None and (is_last or step % self.config.eval_every == 0)
                is_stopping = stop.is_due(step) and step < self.total_steps
                save = is_last or evaluate or is_stopping or step % self.config.checkpoint_every == 0
                if log or save:
                    self._check_finite(in_flight)
                    in_flight = None
            self.profile.after_step(step, metrics)
            if log:
                self._log(step, metrics, stats)
                stats = StepStats()
            self.recorder.advance()
            score = None
            if evaluate:  # also before a stop, because the resumed run starts with the next step
                start_time = time.perf_counter()
                score = self._get_ranking_score(self._evaluate(state, step)[self.best_metric], step)
                stats.start_time += time.perf_counter() - start_time  # the rates are those of training
            if save:
                self._save(state, step, score)
            if is_stopping:
                message = f"saved a checkpoint after step {step} of {self.total_steps}. Run the same command to resume."
                raise Stopped(message, stop.signal)
        return state

    def _start_step(self, state: TrainState, host_batch: HostBatch, stats: StepStats) -> tuple[TrainState, Metrics]:
        batch = put_batch(self.mesh, host_batch.batch)
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes in self.program_shapes:
            return self.train_step(state, batch)
        # A new shape compiles a program: wait for it, and report how long it took.
        release_freed_memory()
        start_time = time.perf_counter()
        result = jax.block_until_ready(self.train_step(state, batch))
        seconds = time.perf_counter() - start_time
        self.program_shapes.add(shapes)
        stats.new_programs += 1
        rows = " and ".join(f"{rows} rows x {tokens} tokens" for rows, tokens in batch.row_shapes)
        self.recorder.say(f"program {len(self.program_shapes)}: {rows}, compiled and run in {seconds:.1f} s")
        return result

    def _check_finite(self, in_flight: InFlightStep | None) -> None:
        """Wait for a step. If its loss or gradient is not finite, end the run, or report it if such steps are skipped."""
        if in_flight is None:
            return
        loss, norm = float(in_flight.metrics["loss"]), float(in_flight.metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return
        names = [self.stage.sources[i].name for i in in_flight.host_batch.sources]
        names += [s.name for builder in self.stage.batch_builder.token_builders.values() for s in builder.plan.sources]
        sources = ", ".join(names)
        problem = f"step {in_flight.step}: not finite (loss {loss}, gradient norm {norm}; batch from {sources})"
        if self.config.on_nan == "skip":
            self.recorder.say(f"{problem}. Skipped the update.")
            return
        latest = self.checkpoints.find_latest()
        checkpoint = "There is no checkpoint yet" if latest is None else f"The last good checkpoint is of step {latest}"
        start = "" if latest is None else f" (model.base={self.checkpoints.run_dir} starts it from this run)"
        raise UserError(
            f"{problem}. {checkpoint}. Check the data, set train.on_nan=skip and run the same command, or lower "
            f"optim.learning_rate in a new run.dir{start}."
        )

    def _log(self, step: int, metrics: Metrics, stats: StepStats) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        values |= stats.compute_rates(self.mfu_meter)
        with must_finish(f"logging of step {step}", self.config.stall_timeout_s):
            self.recorder.log(step, values, self.stage.index)
        self.recorder.show(loss=f"{values['loss']:.4f}", tokens_s=f"{values['useful_tokens_per_second']:,.0f}")

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        assert self.evaluate is not None
        scores = dict(self.evaluate(state.weights))
        self.recorder.log(step, {f"eval/{name}": value for name, value in scores.items()}, self.stage.index)
        self.recorder.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self.check_scores(step, scores)
        return scores

    def _get_ranking_score(self, score: float, step: int) -> float | None:
        """Return the score by which a checkpoint is ranked. If it is not finite, log a line and return None."""
        if math.isfinite(score):
            return score
        self.recorder.say(f"step {step}: {self.best_metric} is not finite, so this checkpoint is not ranked")
        return None

    def _save(self, state: TrainState, step: int, score: float | None) -> None:
        cursor = {"stage": self.stage.index, "step": step, "plan_hash": self.stage.plan_hash}
        self.checkpoints.save(state, cursor, score)
