"""The `run`, `optim`, `mesh`, `train` and `eval` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.fields import LARGEST
from jaxembed.config.sections import Positive, Section


class RunConfig(Section):
    name: str = Field("", description="name of the run; the config file's stem if empty")
    dir: str = Field("", description="run directory; runs/NAME if empty")


class OptimConfig(Section):
    learning_rate: float = Field(2e-5, gt=0, description="the highest, reached after the warm-up")
    warmup_steps: int = Field(0, ge=0, le=LARGEST, description="steps of linear warm-up")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay to 0 at the last step, or none")
    weight_decay: float = Field(0.01, ge=0, description="of kernels and embeddings; norms and biases are spared")
    clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    restart: bool = Field(
        True, description="a stage begins with a new optimizer and schedule; no: it goes on with those of the stage before"
    )


class MeshConfig(Section):
    data: int = Field(-1, description="devices that share a batch, each with all parameters; -1 for the rest of the devices")
    fsdp: int = Field(1, description="devices that share a batch and hold a part of every parameter each; -1 for the rest")
    tensor: int = Field(1, description="devices that share the heads and the feed-forward of a layer; -1 for the rest")

    @model_validator(mode="after")
    def _positive_or_the_rest(self) -> MeshConfig:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{axis} is {size}; expected a number of devices, or -1 for the rest")
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are -1; only one of them can have the rest of the devices")
        return self


class TrainConfig(Section):
    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(64, description="queries of a step, over all devices")
    seed: int = Field(0, ge=0, le=LARGEST, description="of the parameters, the order of examples and every draw")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    eval_every: Positive = Field(500, description="steps between scorings of the held-out sets, each with a checkpoint")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="at a loss or gradient that is not finite: end, or skip the step"
    )
    stall_timeout_s: float = Field(
        1800.0, gt=0, le=1e9, description="seconds after which a step that does not finish ends the process"
    )
    keep_checkpoints: Positive = Field(2, description="latest checkpoints kept; the best one is kept beside them")
    profile_steps: tuple[Positive, Positive] | None = Field(
        None, description="first and last step of a trace in the run directory's profile/, such as [20, 22]; absent: none"
    )
    peak_flops: float | None = Field(
        None, gt=0, description="FLOP/s of a device, of which mfu is a share; absent: as its data sheet says of bfloat16"
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"steps {steps[0]} to {steps[1]}; expected two steps, the first not after the last")
        return steps


class EvalSetConfig(Section):
    name: str = Field(description="SET in SET/METRIC")
    kind: Literal["retrieval", "sts"] = Field("retrieval", description="nDCG@10 and recall@10, or Spearman")
    path: str = Field(description="BEIR folder, scored-pairs file, python_packages:functions or python_packages:package")
    adapter: str = Field("", description="of model.lora.names: the one that is scored")
    instruction: str = Field("", description="of the queries (of both sides for sts)")
    document_instruction: str = Field("", description="of the documents")


class EvalConfig(Section):
    sets: tuple[EvalSetConfig, ...] = ()
    best: str = Field("", description="SET/METRIC whose maximum names the best checkpoint; if empty, the first set's")
    untrained: bool = Field(True, description="score the model before the first step")
    bm25: bool = Field(False, description="score BM25 on the retrieval sets beside the model")
