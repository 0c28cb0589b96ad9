"""The `run`, `optim`, `mesh`, `train`, and `eval` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.fields import MAX_INTEGER
from jaxembed.config.removed import reject_python_packages
from jaxembed.config.sections import Positive, Section


class RunConfig(Section):
    """The name and the directory of a run."""

    name: str = Field("", description="Name of the run. Default: the stem of the config file.")
    dir: str = Field("", description="Run directory. Default: runs/NAME.")


class OptimConfig(Section):
    """The optimizer, AdamW, and its schedule."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate, reached after the warm-up.")
    warmup_steps: int = Field(0, ge=0, le=MAX_INTEGER, description="Steps of linear warm-up.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay of the learning rate to 0 at the last step. constant: no decay."
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of kernels and embeddings. Norms and biases have none.")
    clip: float = Field(1.0, gt=0, description="Maximum global norm of the gradient.")
    lazy_embedding: bool = Field(
        False,
        description="Update only the rows of the token embedding that the batch reads, as torch.optim.SparseAdam does. Other "
        "rows keep their values and moments, without weight decay. Saves time with a large vocabulary.",
    )
    restart: bool = Field(
        True,
        description="Start the stage with a new optimizer and schedule. false: continue with those of the previous stage.",
    )


class MeshConfig(Section):
    """The device mesh. At most one axis may be -1, which stands for the remaining devices."""

    data: int = Field(
        -1, description="Devices that share a batch, each with a copy of the parameters. -1: the remaining devices."
    )
    fsdp: int = Field(
        1, description="Devices that share a batch and each hold a part of every parameter. -1: the remaining devices."
    )
    tensor: int = Field(
        1, description="Devices that share the heads and the feed-forward of a layer. -1: the remaining devices."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> MeshConfig:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{axis} is {size} (expected a number of devices, or -1 for the remaining ones)")
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise ValueError(f"{' and '.join(open_axes)} are -1; only one axis can take the remaining devices")
        return self


class DropoutConfig(Section):
    """Dropout in the transformer, drawn from the seed and the step. Adapters have their own, `model.lora.dropout`."""

    hidden: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout rate of the embeddings, and of the output of each attention and feed-forward block.",
    )
    attention: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the attention weights.")


class TrainConfig(Section):
    """The length of training, the batch, and what happens between steps."""

    steps: Positive = Field(1000, description="Number of optimizer steps.")
    batch_size: Positive = Field(64, description="Queries per step, over all devices.")
    seed: int = Field(
        0, ge=0, le=MAX_INTEGER, description="Seed of the parameters, the order of examples, and every random draw."
    )
    merge_adapters: bool = Field(
        False,
        description="Before a stage that is not the first, merge the adapters into the base and start new ones, as LLM2Vec "
        "does. false: keep training the same adapters.",
    )
    dropout: DropoutConfig = DropoutConfig()
    log_every: Positive = Field(10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: Positive = Field(500, description="Steps between checkpoints.")
    eval_every: Positive = Field(500, description="Steps between evaluations of the held-out sets. Each saves a checkpoint.")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="What to do at a loss or gradient that is not finite: stop the run, or skip the step."
    )
    stall_timeout_s: float = Field(1800.0, gt=0, le=1e9, description="Seconds after which an unfinished step ends the process.")
    keep_checkpoints: Positive = Field(2, description="Number of latest checkpoints to keep, beside the best one.")
    profile_steps: tuple[Positive, Positive] | None = Field(
        None,
        description="First and last step of a trace, written to profile/ in the run directory, such as [20, 22]. "
        "Default: no trace.",
    )
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        description="Loggers to use besides metrics.jsonl.",
    )
    peak_flops: float | None = Field(
        None, gt=0, description="Peak FLOP/s of a device, the denominator of mfu. Default: the data sheet's bfloat16 value."
    )

    @field_validator("profile_steps")
    @classmethod
    def _check_profile_steps(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"the steps are {steps[0]} to {steps[1]} (expected a first step that is not after the last)")
        return steps


class EvalSetConfig(Section):
    """A held-out set that is scored during training."""

    name: str = Field(description="Name of the set, SET in SET/METRIC.")
    kind: Literal["retrieval", "sts", "classification", "clustering"] = Field(
        "retrieval",
        description="retrieval scores nDCG@10 and recall@10; sts scores Spearman's correlation; classification scores the "
        "accuracy of logistic regression; clustering scores the V-measure of k-means.",
    )
    path: str = Field(
        description="BEIR folder for retrieval, file of scored pairs for sts, or file of labeled texts for the other two."
    )
    split: str = Field(
        "",
        description="retrieval: the split qrels/SPLIT.tsv. Default: the first that exists of test, dev and train; the "
        "choice is logged. Other kinds: the split of a dataset whose path names none.",
    )
    train_path: str = Field(
        "",
        description="classification: file of labeled texts that train the classifier. Default: path itself, by "
        "cross-validation.",
    )
    train_split: str = Field("", description="classification: split of a dataset whose train_path names none.")
    precision: Literal["float32", "int8", "binary"] = Field(
        "float32", description="Precision of the vectors that are scored. int8 needs ranges, as in quantization."
    )
    adapter: str = Field("", description="The adapter that is scored, one of model.lora.names.")
    instruction: str = Field("", description="Instruction of the queries; of all texts for the kinds other than retrieval.")
    document_instruction: str = Field("", description="Instruction of the documents.")

    @field_validator("path")
    @classmethod
    def _reject_removed_set(cls, path: str) -> str:
        reject_python_packages("path", path)
        return path

    @model_validator(mode="after")
    def _check_train_path(self) -> EvalSetConfig:
        if self.kind != "classification" and (self.train_path or self.train_split):
            raise ValueError(f"{self.name}: train_path and train_split are keys of classification sets (kind is {self.kind})")
        return self


class EvalConfig(Section):
    """Evaluation during training."""

    sets: tuple[EvalSetConfig, ...] = ()
    best: str = Field(
        "", description="SET/METRIC whose maximum selects the best checkpoint. Default: the main score of the first set."
    )
    untrained: bool = Field(True, description="Score the model before the first step.")
    bm25: bool = Field(False, description="Score BM25 on the retrieval sets, for comparison.")
