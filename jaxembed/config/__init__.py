"""The configuration tree. Every default lives on its field; `jaxembed.config.sections` reads and checks it."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from jaxembed.config.fields import LARGEST
from jaxembed.config.sections import Section, apply_override, parse_section, read_tree
from jaxembed.errors import UserError

Positive = Annotated[int, Field(gt=0, le=LARGEST)]


def is_echo(template: str) -> bool:
    """Whether a template presents a text twice and ends with it."""
    return template.count("{text}") == 2 and template.endswith("{text}")


def is_example(template: str) -> bool:
    """Whether a template presents an in-context example; it may do without the instruction. Empty: made of others."""
    return not template or ("{query}" in template and "{response}" in template)


class RunConfig(Section):
    name: str = Field("", description="name of the run; the config file's stem if empty")
    dir: str = Field("", description="run directory; runs/NAME if empty")


PoolingKind = Literal[
    "mean", "last", "first", "max", "weighted_mean", "latent_attention", "latent_attention_paper", "self_attention"
]


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PoolingConfig(Section):
    kind: PoolingKind | None = Field(None, description="as the base says, else mean")
    include_instruction: bool | None = Field(None, description="pool instruction tokens too; as the base says, else no")
    latents: Annotated[int, Field(ge=1, le=2**16)] | None = Field(None, description="of latent attention; 512")
    heads: Annotated[int, Field(ge=1, le=2**12)] | None = Field(None, description="of latent and self-attention; 8")


class ProjectionConfig(Section):
    width: Annotated[int, Field(ge=0, le=2**16)] | None = Field(
        None, description="of a linear layer between pooling and normalisation, 0 for none; as the base says, else none"
    )
    bias: bool | None = Field(None, description="of that layer; as the base says, else no")


AdapterName = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=1, le=2**14)] = Field(16, description="width of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input, in training")
    targets: tuple[LoraTarget, ...] = Field(typing.get_args(LoraTarget), min_length=1, description="projections with adapters")
    base_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="of the frozen base; int8: its kernels, a scale an output channel, and the embedding in bfloat16"
    )
    names: tuple[AdapterName, ...] = Field(
        (), description="of several adapters, each trained by the sources that name it; empty: one, trained by all"
    )

    @field_validator("names")
    @classmethod
    def _one_adapter_a_name(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("the names of adapters must differ")
        return names


class ModelConfig(Section):
    base: str = Field(
        description="folder, run directory (its best checkpoint), hub id, or preset:NAME (random weights, tokenizer made from "
        "the data)"
    )
    attention: Literal["causal", "bidirectional", "prefix", "prefix_lm"] | None = Field(
        None,
        description="as the base says, else bidirectional; prefix: causal in the instruction, bidirectional in the text; "
        "prefix_lm: the other way round",
    )
    pooling: PoolingConfig = PoolingConfig()
    projection: ProjectionConfig = ProjectionConfig()
    echo: str | None = Field(
        None, description="template that names {text} twice and ends with it, the second is pooled; as the base says, else none"
    )
    normalize: bool | None = Field(None, description="unit-length vectors; as the base says, else yes")
    append_eos: bool | None = Field(None, description="end every text with EOS; as the base says, else yes")
    instruction_template: str | None = Field(None, description="with {instruction}; as the base says, else E5's form")
    query_suffix: str | None = Field(
        None, description="follows every text that has a prompt, kept where the text is cut; as the base says, else none"
    )
    example_template: str | None = Field(
        None,
        description="of an in-context example, with {instruction}, {query} and {response}; as the base says, else made of "
        "instruction_template and query_suffix",
    )
    lora: LoraConfig | None = Field(None, description="train low-rank adapters and freeze the base; absent: train everything")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the computation, not parameters")
    remat: bool = Field(False, description="recompute layer activations in the backward pass to save memory")
    unroll: bool = Field(True, description="unroll the layer loop: faster steps, longer compilation")
    attention_kernel: Literal["auto", "einsum", "rows", "splash", "cudnn"] = Field(
        "auto", description="auto: rows on CPU, splash on TPU, else einsum; cudnn: on NVIDIA's GPUs, in bfloat16"
    )

    @model_validator(mode="after")
    def _template_names_instruction(self) -> ModelConfig:
        if self.instruction_template is not None and "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template must contain {instruction}")
        if self.echo and not is_echo(self.echo):
            raise ValueError("echo must name {text} twice and end with it")
        if not is_example(self.example_template or ""):
            raise ValueError("example_template must contain {query} and {response}")
        return self


class FewShotConfig(Section):
    most: Annotated[int, Field(ge=1, le=64)] = Field(
        5,
        description="a query has 1 to that many, out of other rows; the last are left out where its text would have less than "
        "half of data.max_length",
    )
    zero_shot: float = Field(0.2, ge=0, le=1, description="share of the queries that have none")


FIELD = re.compile(r"\{([^{}]+)\}")  # how a template names a field of a row


class PairTemplate(Section):
    query: str = Field(description='names fields of a row, as "{title}" does')
    positive: str = Field(description='likewise, such as "{body}"')

    @field_validator("query", "positive")
    @classmethod
    def _names_a_field(cls, template: str) -> str:
        if not FIELD.search(template):
            raise ValueError('expected a text that names a field of the rows in braces, such as "{title}"')
        return template

    @property
    def fields(self) -> frozenset[str]:
        """The fields that a row needs for both sides."""
        return frozenset(FIELD.findall(self.query + self.positive))


NonEmpty = Annotated[str, Field(min_length=1)]


RowField = Literal[
    "query",
    "pos",
    "neg",
    "prompt",
    "pos_scores",
    "neg_scores",
    "text",
    "label",
    "sentence1",
    "sentence2",
    "score",
    "premise",
    "hypothesis",
]


Format = Literal["auto", "pairs", "labels", "scored_pairs", "nli", "documents", "text", "beir", "python_packages"]


class SourceConfig(Section):
    path: str = Field(
        description="file, folder or pattern such as data/*.parquet, hf:NAME:SPLIT, tfds:NAME:SPLIT, or python_packages"
    )
    format: Format = Field("auto", description="auto: read off the path or the first row")
    columns: dict[RowField, str] = Field(
        {}, description="our fields and the file's columns that hold them, such as {query: question, pos: answer}"
    )
    name: str = Field("", description="shown in logs and used for prompts; the path's stem if empty")
    weight: float = Field(1.0, ge=1e-6, le=1e6, description="share of the mixture, relative to the other sources' weights")
    adapter: str = Field("", description="of model.lora.names: the one that the source trains")
    instructions: tuple[str, ...] = Field((), description="one is drawn per example for its query")
    document_instruction: str = Field("", description="instruction of the documents")
    symmetric: bool = Field(False, description="the query's instruction stands before its documents too (NV-Embed: of STS)")
    few_shot: FewShotConfig | None = Field(None, description="in-context examples before the queries; absent: none")
    in_batch_negatives: bool | None = Field(None, description="default: no for labels, yes otherwise")
    label_documents: Literal["auto", "labels", "examples"] = Field("auto", description="auto: labels where there are two")
    label_names: dict[str, NonEmpty] = Field(
        {}, description="labels: label -> the text that spells it out; empty: the label itself"
    )
    label_negatives: Literal["own", "all"] = Field(
        "own", description="labels: label texts of the source alone, or of all sources of the stage (KaLM)"
    )
    single_labels: Literal["error", "skip"] = Field(
        "error", description="labels: what becomes of a text that has no other example of its label as its positive"
    )
    max_examples: Positive | None = Field(None, description="so many, drawn once, are used; absent: all")
    min_score: float = Field(4.0, description="scored_pairs: pairs below this score are not positives")
    pair_templates: tuple[PairTemplate, ...] = Field(
        (), max_length=32, description="documents: the pairs made of a row; one whose fields are all there is drawn per visit"
    )
    where: dict[str, tuple[bool | int | float | str, ...]] = Field(
        {}, description="documents: field -> the value, or one of the values, that a row must have"
    )
    min_chars: int = Field(0, ge=0, description="documents: fewest characters of each side of a pair")
    max_chars: Positive | None = Field(None, description="documents: most characters of each side of a pair")

    @field_validator("label_names", mode="before")
    @classmethod
    def _labels_are_texts(cls, names: Any) -> Any:
        return {str(label): text for label, text in names.items()} if isinstance(names, dict) else names

    @field_validator("where", mode="before")
    @classmethod
    def _values_are_listed(cls, where: Any) -> Any:
        if not isinstance(where, dict):
            return where
        listed = {field: list(value) if isinstance(value, list | tuple) else [value] for field, value in where.items()}
        for field, values in listed.items():
            if not values or not all(isinstance(value, str | int | float) for value in values):
                raise ValueError(f"of {field}: expected a text, a number, true, false, or a list of these")
        return listed

    @property
    def known_as(self) -> str:
        """Its name, else the stem of its path."""
        return self.name or Path(self.path).stem

    def instruction_of_documents(self, of_query: str) -> str:
        """The instruction of the documents of a query that stands under `of_query`."""
        return of_query if self.symmetric else self.document_instruction

    @model_validator(mode="after")
    def _one_instruction_of_documents(self) -> SourceConfig:
        if self.symmetric and self.document_instruction:
            raise ValueError("symmetric puts the query's instruction before the documents; leave document_instruction out")
        return self

    @model_validator(mode="after")
    def _documents_have_templates(self) -> SourceConfig:
        kind = "python_packages" if self.path == "python_packages" else self.format
        if self.pair_templates and kind not in ("auto", "documents"):
            raise ValueError(f"pair_templates are of format documents, and this one is {kind}; leave them out")
        if kind == "documents" and not self.pair_templates:
            raise ValueError('format documents makes pairs by pair_templates, such as [{query: "{title}", positive: "{body}"}]')
        if not self.pair_templates and (self.where or self.min_chars or self.max_chars):
            raise ValueError("where, min_chars and max_chars choose documents by pair_templates; name these")
        return self

    @model_validator(mode="after")
    def _examples_have_an_instruction(self) -> SourceConfig:
        if self.few_shot is not None and not all(self.instructions or [""]):
            raise ValueError("few_shot presents its examples under an instruction; name instructions, none of them empty")
        return self


class PythonPackagesConfig(Section):
    packages: tuple[str, ...] = Field(
        ("stdlib", "numpy", "scipy", "jax", "flax", "optax", "orbax", "transformers"),
        description="import names of installed packages, or stdlib; one that is absent is skipped",
    )
    holdout_package: str | None = Field(None, description="a package of which nothing is trained on")
    holdout_functions: int = Field(1000, ge=0, description="functions of the other packages kept from training")


class MixtureConfig(Section):
    by: Literal["weight", "size"] = Field(
        "weight", description="what a source's share is proportional to: its weight, or its weight times its examples"
    )
    temperature: float = Field(1.0, ge=0.1, le=1e6, description="shares are raised to 1/temperature; above 1: more even")


class BatchingConfig(Section):
    kind: Literal["blended", "homogeneous", "semi_homogeneous"] = Field(
        "blended", description="a batch is of all sources, of one, or a part of it is of one"
    )
    ratio: float = Field(0.5, ge=0, le=1, description="semi_homogeneous: the part of a batch that is of one source")
    no_duplicates: bool = Field(
        False,
        description="no query or positive stands twice in a batch: others of its source are drawn instead; of sources with "
        "in-batch negatives",
    )

    @property
    def of_one_source(self) -> float:
        """The part of a batch that is of one source."""
        return {"blended": 0.0, "homogeneous": 1.0, "semi_homogeneous": self.ratio}[self.kind]


class DataConfig(Section):
    max_length: Positive = Field(512, description="tokens of a text, special tokens included; longer texts are cut")
    row_length: Positive | None = Field(None, description="tokens of a packed row (>= max_length); max_length if absent")
    hard_negatives: int = Field(0, ge=0, le=1024, description="negatives drawn per query")
    batching: BatchingConfig = BatchingConfig()
    mixture: MixtureConfig = MixtureConfig()
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    python_packages: PythonPackagesConfig = PythonPackagesConfig()

    @model_validator(mode="after")
    def _rows_hold_a_text(self) -> DataConfig:
        if self.row_length is not None and self.row_length < self.max_length:
            raise ValueError(f"row_length {self.row_length} is below max_length {self.max_length}; a text must fit a row")
        return self

    def instructions(self, adapter: str | None = None) -> dict[str, tuple[str, str]]:
        """The first instruction of queries and that of documents, by the name of the source; of one adapter's if given."""
        chosen = [s for s in self.sources if s.instructions and adapter in (None, s.adapter)]
        first = ((s, s.instructions[0]) for s in chosen)
        return {s.known_as: (asked, s.instruction_of_documents(asked)) for s, asked in first}


class ObjectiveConfig(Section):
    """What every objective has."""

    name: str
    weight: float = Field(1.0, gt=0, description="of this objective in the sum")
    sources: tuple[str, ...] = Field((), description="names of the sources whose queries it is for; empty: all")

    @field_validator("guide", "teacher", check_fields=False)
    @classmethod
    def _names_a_model(cls, name: str | None) -> str | None:
        if name is not None and not name.strip():
            raise ValueError("expected a MODEL: a run directory, a folder or a hub id")
        return name


Direction = Literal["query_document", "query_query", "document_query", "document_document"]


class InfoNCEConfig(ObjectiveConfig):
    name: Literal["infonce"] = "infonce"
    temperature: float = Field(0.05, gt=0, description="similarities are divided by it")
    learn_temperature: bool = Field(False, description="train the temperature from there on, down to 0.01")
    negatives: Literal["all", "in_batch", "hard"] = Field(
        "all", description="documents of other queries, the query's own negatives, or both"
    )
    directions: tuple[Direction, ...] = Field(
        ("query_document",), min_length=1, description="of in-batch negatives; all four: GTE's loss"
    )
    per_direction: bool = Field(False, description="a loss a direction, averaged, instead of one denominator for all")
    mask_same_label: bool = Field(False, description="texts with the query's label are no in-batch negatives")
    margin: float | None = Field(None, description="what scores above the positive by more is no negative; Qwen3: 0.1")
    guide: str | None = Field(
        None, description="MODEL, one a run; what it scores above the positive is no negative (GISTEmbed)"
    )
    guide_margin: float = Field(0.0, description="of the guide: what it scores above the positive less that is no negative")
    guide_margin_kind: Literal["absolute", "relative"] = Field("absolute", description="relative: to the positive's score")
    focal: float = Field(0.0, ge=0, description="each query's loss is weighted with (1 - p)^focal (KaLM-V2)")
    hardness: float = Field(0.0, ge=0, description="negatives are weighted with e^(hardness x similarity) (EmbeddingGemma: 5)")
    hardness_of: Literal["hard", "in_batch", "all"] = Field("hard", description="the negatives that are weighted so")
    mixed_negatives: int = Field(0, ge=0, le=1024, description="negatives mixed out of each query's own (KaLM-V2)")

    @model_validator(mode="after")
    def _goes_together(self) -> InfoNCEConfig:
        if "query_document" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError("directions must name query_document, and each at most once")
        if self.per_direction and set(self.directions) != {"query_document", "document_query"}:
            raise ValueError("per_direction takes directions query_document and document_query: the others hold no positive")
        if self.negatives == "hard" and (len(self.directions) > 1 or self.mask_same_label):
            raise ValueError(
                "directions and mask_same_label are about in-batch negatives, and negatives is hard; leave them out"
            )
        if self.negatives == "in_batch" and self.mixed_negatives:
            raise ValueError("mixed_negatives are made of a query's own, but negatives is in_batch; leave it out")
        if self.guide is None and self.guide_margin:
            raise ValueError("guide_margin is about a guide; name one")
        return self


class SpreadOutConfig(ObjectiveConfig):
    name: Literal["spread_out"] = "spread_out"


class DistillationConfig(ObjectiveConfig):
    name: Literal["kl_distillation"] = "kl_distillation"
    temperature: float = Field(0.05, gt=0, description="of the model's scores")
    teacher_temperature: float = Field(1.0, gt=0, description="of the teacher's scores")
    hard_labels: float = Field(0.0, ge=0, lt=1, description="share of the loss to the positive alone (E5: 0.2)")


class MarginMSEConfig(ObjectiveConfig):
    name: Literal["margin_mse"] = "margin_mse"


class EmbeddingMatchingConfig(ObjectiveConfig):
    name: Literal["embedding_matching"] = "embedding_matching"
    teacher: str = Field(description="MODEL, one a run, whose vectors are matched, through a projection where widths differ")


AnyObjective = Annotated[
    InfoNCEConfig | SpreadOutConfig | DistillationConfig | MarginMSEConfig | EmbeddingMatchingConfig,
    Field(discriminator="name"),
]


class MatryoshkaConfig(Section):
    dims: tuple[Positive, ...] = Field((), description="first dimensions that the objectives hold for too, such as [512, 64]")
    weights: tuple[float, ...] = Field((), description="of each of dims in the sum, beside 1 for the whole; empty: all 1")

    @model_validator(mode="after")
    def _one_weight_a_width(self) -> MatryoshkaConfig:
        if self.weights and len(self.weights) != len(self.dims):
            raise ValueError(f"{len(self.weights)} weights for {len(self.dims)} dims; give one each, or none")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights must be above 0")
        return self


class GradCacheConfig(Section):
    rows: Positive | None = Field(
        None, description="rows encoded at a time on a device, so that memory holds the activations of those; absent: all"
    )


MiningRule = Literal["topk_perc_pos", "topk_margin_pos", "topk_abs", "top_k", "sampled_top_k", "window"]


class MineConfig(Section):
    rule: MiningRule = Field("topk_perc_pos", description="which candidates become negatives: docs/mining.md")
    negatives: Positive = Field(7, description="of a query")
    depth: Positive = Field(100, description="candidates of a query")
    window: tuple[Positive, Positive] = Field((50, 100), description="window: ranks, counted from 1")
    max_score: float = Field(0.7, description="topk_abs: the highest score of a negative")
    margin: float = Field(0.05, ge=0, description="topk_margin_pos: below the positive's score")
    share: float = Field(0.95, ge=0, le=1, description="topk_perc_pos: of the positive's score")

    @model_validator(mode="after")
    def _candidates_suffice(self) -> MineConfig:
        first, last = self.window
        if first > last:
            raise ValueError(f"window is {first} to {last}; expected two ranks, the first not after the last")
        if self.rule == "window" and self.negatives > 1 + last - first:
            raise ValueError(f"window is {first} to {last}, fewer ranks than the {self.negatives} negatives; raise its end")
        if self.rule != "window" and self.negatives > self.depth:
            raise ValueError(f"depth is {self.depth}, fewer candidates than the {self.negatives} negatives; raise it")
        return self


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


class Config(Section):
    """The whole tree. `load` reads it; fields are documented where they stand."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    objectives: tuple[AnyObjective, ...] = Field((InfoNCEConfig(),), min_length=1)
    matryoshka: MatryoshkaConfig = MatryoshkaConfig()
    gradcache: GradCacheConfig = GradCacheConfig()
    mine: MineConfig | None = Field(
        None, description="as a stage begins, find hard negatives for its pairs with the model as it is then; absent: do not"
    )
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    stages: tuple[dict[str, Any], ...] = Field(
        (),
        description="trained one after the other, each a tree of what differs from the rest of the file: of data, objectives, "
        "matryoshka, gradcache, mine, optim and train; each names its train.steps",
    )

    @model_validator(mode="after")
    def _adapters_are_named(self) -> Config:
        names = self.model.lora.names if self.model.lora else ()
        users = {f"data.sources.{i}.adapter": source.adapter for i, source in enumerate(self.data.sources)}
        idle = sorted(set(names) - set(users.values()))
        for key, adapter in (users | {f"eval.sets.{i}.adapter": s.adapter for i, s in enumerate(self.eval.sets)}).items():
            if names and adapter not in names:
                raise ValueError(f"{key} is {adapter!r}; expected one of model.lora.names: {', '.join(names)}")
            if adapter and not names:
                raise ValueError(f"{key} is {adapter!r}, but model.lora.names is empty; name the adapters there")
        if idle:
            raise ValueError(f"model.lora.names: no source trains {idle[0]}; name it as the adapter of one, or leave it out")
        return self

    @property
    def guide(self) -> str | None:
        """The model that guides the objectives, of any stage; None without one."""
        return next(iter(_named(self.in_stages(), "guide")), None)

    @property
    def teacher(self) -> str | None:
        """The model whose vectors the objectives match, of any stage; None without one."""
        return next(iter(_named(self.in_stages(), "teacher")), None)

    @property
    def row_length(self) -> int:
        return self.data.row_length or self.data.max_length

    def dump(self) -> str:
        """The resolved tree as YAML text, every default spelled out."""
        return yaml.safe_dump(self._tree(), sort_keys=False, allow_unicode=True)

    def in_stages(self, where: str = "stages") -> tuple[Config, ...]:
        """The config of every stage, without `stages`; of one without them, itself. `UserError` says what is off in one."""
        if not self.stages:
            return (self,)
        whole = {key: value for key, value in self._tree().items() if key != "stages"}
        return tuple(_stage(whole, changes, f"{where}.{i}") for i, changes in enumerate(self.stages))

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of all stages, each once."""
        return tuple(dict.fromkeys(source for stage in self.in_stages() for source in stage.data.sources))

    def _tree(self) -> dict[str, Any]:
        tree = self.model_dump(mode="json")
        if self.stages:
            del tree["train"]["steps"]
        return tree

    @model_validator(mode="after")
    def _mined_negatives_are_drawn(self) -> Config:
        if self.mine is not None and not self.stages and not self.data.hard_negatives:
            raise ValueError("mine finds hard negatives, but data.hard_negatives is 0; set how many of them a query draws")
        return self

    @model_validator(mode="after")
    def _objectives_have_negatives(self) -> Config:
        """Each stage is checked by itself: the whole may lack what a stage brings."""
        for i, objective in enumerate(() if self.stages else self.objectives):
            key, needed = "", 0
            if isinstance(objective, InfoNCEConfig) and objective.mixed_negatives:
                key, needed = "mixed_negatives", 2
            elif isinstance(objective, InfoNCEConfig) and objective.negatives == "hard":
                key, needed = "negatives=hard", 1
            elif isinstance(objective, DistillationConfig | MarginMSEConfig):
                key, needed = objective.name, 1
            if self.data.hard_negatives < needed:
                told = f"objectives.{i}: {key} compares a query's own negatives, but data.hard_negatives is"
                raise ValueError(f"{told} {self.data.hard_negatives}; set it to {needed} or more")
        return self

    @model_validator(mode="after")
    def _stages_have_the_steps(self) -> Config:
        if self.stages and "steps" in self.train.model_fields_set:
            raise ValueError("train.steps and stages do not go together; give each stage its own train.steps")
        return self


def load(path: str | Path, overrides: typing.Sequence[str] = (), base: str | None = None) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides, and returns the checked tree; `UserError` says what is off.

    `base` is `model.base` where the file names none: for those who read its data alone.
    """
    path = Path(path)
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    if base is not None and isinstance(model := tree.setdefault("model", {}), dict):
        model.setdefault("base", base)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        if isinstance(run["name"], str):
            run["dir"] = run.get("dir") or f"runs/{run['name']}"
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str) -> Config:
    """Checks a nested dict against the tree, each of its stages too; `where` names its origin in errors."""
    config = parse_section(Config, tree, where)
    stages = config.in_stages(f"{where}: stages")
    for role in ("guide", "teacher"):
        if len(named := _named(stages, role)) > 1:
            raise UserError(f"{where}: objectives name several models as {role} ({', '.join(named)}); a run has one")
    return config


def _named(stages: Sequence[Config], role: str) -> list[str]:
    """The models that the objectives of stages name in a role, each once."""
    names = [getattr(objective, role, None) for stage in stages for objective in stage.objectives]
    return list(dict.fromkeys(name for name in names if name is not None))


# What a stage may not differ in: one model, one run directory, one set of scores, one trace by steps of the run.
OF_THE_RUN = {
    "run", "model", "mesh", "eval", "stages", "train.seed", "train.keep_checkpoints", "train.profile_steps", "train.peak_flops",
}  # fmt: skip


def _stage(whole: dict[str, Any], changes: dict[str, Any], where: str) -> Config:
    """The config of a stage."""
    train = changes.get("train")
    named = {*changes, *(f"train.{key}" for key in (train if isinstance(train, dict) else {}))}
    if shared := sorted(named & OF_THE_RUN):
        raise UserError(f"{where}.{shared[0]}: is one for all stages; set it outside of stages")
    if "train.steps" not in named:
        raise UserError(f"{where}.train.steps is missing; every stage names its own")
    return parse_section(Config, _changed(whole, changes), where)


def _changed(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict with the values of another put in; lists are replaced whole."""
    made = dict(tree)
    for key, value in changes.items():
        before = made.get(key)
        made[key] = _changed(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return made
