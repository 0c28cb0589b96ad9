"""The loop: next batch, step, then is it time to log, to evaluate, to checkpoint?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxembed.config import TrainConfig
from jaxembed.data.batch import HostBatch
from jaxembed.parallel import put_batch
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.metrics import Recorder
from jaxembed.training.step import Metrics, TrainState

Evaluate = Callable[[Any], Mapping[str, float]]  # parameters -> scores by SET/METRIC


@dataclasses.dataclass
class Tally:
    """What happened since the last logged step."""

    since: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0
    useful: int = 0
    padded: int = 0

    def add(self, host: HostBatch, waited: float) -> None:
        self.steps += 1
        self.waited += waited
        self.useful += host.useful_tokens
        self.padded += host.padded_tokens

    def rates(self, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        return {
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": self.waited / self.steps,
            "useful_tokens_per_second": self.useful / seconds,
            "examples_per_second": batch_size * self.steps / seconds,
            "padding_fraction": 1 - self.useful / self.padded,
        }


@dataclasses.dataclass
class Trainer:
    """What a run needs beside its state. `best_metric` names the score whose maximum is the best checkpoint's."""

    config: TrainConfig
    mesh: Mesh
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    schedule: optax.Schedule
    evaluate: Evaluate | None
    best_metric: str
    checkpoints: Checkpoints
    recorder: Recorder
    plan_hash: str
    programs: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def fit(self, state: TrainState, batches: Iterator[HostBatch]) -> tuple[TrainState, dict[str, float]]:
        """Trains to the last step; returns the state and the last held-out scores. Resumes from the state's own step."""
        scores: dict[str, float] = {}
        tally = Tally()
        before: Metrics | None = None
        for step in range(int(state.step) + 1, self.config.steps + 1):
            asked = time.perf_counter()
            host = next(batches)
            tally.add(host, time.perf_counter() - asked)
            state, metrics = self._step(state, host)
            jax.block_until_ready(before)  # at most one step runs ahead of the host
            before = metrics
            last = step == self.config.steps
            if last or step % self.config.log_every == 0:
                self._log(step, metrics, tally)
                tally = Tally()
            self.recorder.advance()
            score = None
            if self.evaluate and (last or step % self.config.eval_every == 0):
                scores = self._evaluate(state, step)
                score = scores.get(self.best_metric)
                tally.since = time.perf_counter()
            if last or score is not None or step % self.config.checkpoint_every == 0:
                self.checkpoints.save(state, {"stage": 0, "step": step, "plan_hash": self.plan_hash}, score)
        return state, scores

    def _step(self, state: TrainState, host: HostBatch) -> tuple[TrainState, Metrics]:
        shape = host.batch.texts.tokens.shape
        batch = put_batch(self.mesh, host.batch)
        if shape in self.programs:
            return self.train_step(state, batch)
        began = time.perf_counter()
        result = jax.block_until_ready(self.train_step(state, batch))
        self.programs.add(shape)
        seconds = time.perf_counter() - began
        told = f"program {len(self.programs)}: {shape[0]} rows x {shape[1]} tokens, compiled and run in {seconds:.1f} s"
        self.recorder.say(told)
        return result

    def _log(self, step: int, metrics: Metrics, tally: Tally) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        values["learning_rate"] = float(self.schedule(step - 1))
        values |= tally.rates(self.config.batch_size)
        self.recorder.log(step, values)
        self.recorder.show(loss=f"{values['loss']:.4f}", tokens_s=f"{values['useful_tokens_per_second']:,.0f}")

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        assert self.evaluate is not None
        scores = dict(self.evaluate(state.params))
        self.recorder.log(step, {f"eval/{name}": value for name, value in scores.items()})
        self.recorder.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return scores
