"""The `objectives`, `matryoshka` and `gradcache` sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxembed.config.objective import ObjectiveConfig
from jaxembed.config.sections import Positive, Section
from jaxembed.config.token_objectives import CausalLMConfig, MaskedPredictionConfig

Direction = Literal["query_document", "query_query", "document_query", "document_document"]


class InfoNCEConfig(ObjectiveConfig):
    """InfoNCE over the global batch (van den Oord et al. 2018), and its variants."""

    name: Literal["infonce"] = "infonce"
    temperature: float = Field(0.05, gt=0, description="Temperature by which similarities are divided.")
    learn_temperature: bool = Field(
        False, description="Train the temperature, starting from this value. It stays at least 0.01."
    )
    negatives: Literal["all", "in_batch", "hard"] = Field(
        "all", description="Negatives: documents of other queries (in_batch), the query's own negatives (hard), or both."
    )
    directions: tuple[Direction, ...] = Field(
        ("query_document",), min_length=1, description="Directions of the in-batch negatives. All four give GTE's loss."
    )
    per_direction: bool = Field(
        False,
        description="Average two losses that each have their own denominator: one of the queries, with query_query, and "
        "one of the documents, with document_document (UAE). false: all directions share one denominator.",
    )
    mask_same_label: bool = Field(False, description="Exclude texts with the label of the query from the in-batch negatives.")
    margin: float | None = Field(
        None,
        description="Exclude negatives that score above the positive by more than this margin (Qwen3-Embedding: 0.1). "
        "Default: no margin.",
    )
    guide: str | None = Field(
        None,
        description="MODEL, or URL or NAME@URL of a server, whose scores exclude negatives: those that it scores above the "
        "positive (GISTEmbed). A run has at most one guide.",
    )
    guide_margin: float = Field(
        0.0, description="Margin of the guide: it excludes negatives that score above the positive's score minus this margin."
    )
    guide_margin_kind: Literal["absolute", "relative"] = Field(
        "absolute", description="absolute: guide_margin is a difference of scores. relative: a share of the positive's score."
    )
    focal: float = Field(0.0, ge=0, description="Exponent of the focal weight (1 - p)^focal of each query's loss (KaLM-V2).")
    hardness: float = Field(0.0, ge=0, description="Weight negatives by e^(hardness * similarity) (EmbeddingGemma: 5).")
    hardness_of: Literal["hard", "in_batch", "all"] = Field(
        "hard",
        description="Negatives to which hardness applies: the query's own (hard), documents of other queries in the direction "
        "query_document (in_batch), or both (all).",
    )
    mixed_negatives: int = Field(
        0, ge=0, le=1024, description="Number of negatives synthesized by mixing each query's own negatives (KaLM-V2)."
    )

    @model_validator(mode="after")
    def _check_options(self) -> InfoNCEConfig:
        if "query_document" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError("directions must contain query_document, and each direction at most once")
        if self.per_direction and "document_query" not in self.directions:
            raise ValueError("per_direction needs directions query_document and document_query, which have positives")
        if self.negatives == "hard" and (len(self.directions) > 1 or self.mask_same_label):
            raise ValueError("directions and mask_same_label concern in-batch negatives, but negatives is hard. Remove them.")
        if self.negatives == "in_batch" and self.mixed_negatives:
            raise ValueError("mixed_negatives mixes a query's own negatives, but negatives is in_batch. Remove it.")
        if self.guide is None and self.guide_margin:
            raise ValueError("guide_margin needs a guide. Set guide.")
        return self


class SpreadOutConfig(ObjectiveConfig):
    """The spread-out regularizer (Zhang et al. 2017; EmbeddingGemma)."""

    name: Literal["spread_out"] = "spread_out"


class DistillationConfig(ObjectiveConfig):
    """KL divergence between the teacher's and the model's score distributions over a query's own documents."""

    name: Literal["kl_distillation"] = "kl_distillation"
    teacher: str | None = Field(
        None,
        description="MODEL, or URL or NAME@URL of a server, whose cosines are the teacher's scores. Default: pos_scores and "
        "neg_scores of the data.",
    )
    temperature: float = Field(0.05, gt=0, description="Temperature of the model's scores.")
    teacher_temperature: float = Field(1.0, gt=0, description="Temperature of the teacher's scores.")
    hard_labels: float = Field(
        0.0, ge=0, lt=1, description="Share of the loss that is cross-entropy with the positive as target (E5: 0.2)."
    )


class MarginMSEConfig(ObjectiveConfig):
    """Mean squared error between the model's and a teacher's score margins (Hofstätter et al. 2020)."""

    name: Literal["margin_mse"] = "margin_mse"
    teacher: str | None = Field(
        None,
        description="MODEL, or URL or NAME@URL of a server, whose cosines are the teacher's scores. Default: pos_scores and "
        "neg_scores of the data.",
    )


class EmbeddingMatchingConfig(ObjectiveConfig):
    """Distance to a teacher's vectors (EmbeddingGemma)."""

    name: Literal["embedding_matching"] = "embedding_matching"
    teacher: str = Field(
        description="MODEL, or URL or NAME@URL of a server, whose vectors are matched, through a projection if the widths "
        "differ. A run has at most one teacher."
    )


class GradedObjectiveConfig(ObjectiveConfig):
    """The keys that all objectives of scored pairs share."""


class CoSENTConfig(GradedObjectiveConfig):
    """Ranking of the cosines of all pairs of a batch by their scores (Su 2022)."""

    name: Literal["cosent"] = "cosent"
    temperature: float = Field(0.05, gt=0, description="Temperature by which differences of cosines are divided.")


class AnglEConfig(GradedObjectiveConfig):
    """Ranking of the angle similarities of all pairs of a batch by their scores (Li and Li 2023)."""

    name: Literal["angle"] = "angle"
    temperature: float = Field(1.0, gt=0, description="Temperature by which differences of angle similarities are divided.")


class CosineRegressionConfig(GradedObjectiveConfig):
    """Squared difference between the cosine of a pair and its score (Sentence-BERT)."""

    name: Literal["cosine_regression"] = "cosine_regression"


AnyObjective = Annotated[
    InfoNCEConfig
    | SpreadOutConfig
    | DistillationConfig
    | MarginMSEConfig
    | EmbeddingMatchingConfig
    | CoSENTConfig
    | AnglEConfig
    | CosineRegressionConfig
    | MaskedPredictionConfig
    | CausalLMConfig,
    Field(discriminator="name"),
]


def check_weights(key: str, entries: Sequence[object], weights: Sequence[float]) -> None:
    """Raise `ValueError` unless the entries differ, and `weights` is empty or holds a positive weight for each."""
    if repeated := next((entry for entry in entries if entries.count(entry) > 1), None):
        raise ValueError(f"{key} has {repeated} twice. Remove one.")
    if weights and len(weights) != len(entries):
        raise ValueError(
            f"{len(weights)} weights for {len(entries)} {key} (expected one weight per {key.removesuffix('s')}, or none)"
        )
    if any(weight <= 0 for weight in weights):
        raise ValueError("weights must be above 0")


class MatryoshkaConfig(Section):
    """Matryoshka representation learning (Kusupati et al. 2022)."""

    dims: tuple[Positive, ...] = Field(
        (),
        description="Also apply the objectives, except embedding_matching, to the first dimensions of the vectors, such as "
        "[512, 64].",
    )
    weights: tuple[float, ...] = Field(
        (), description="Weight of each of dims in the sum; the whole vector has weight 1. Default: all 1."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> MatryoshkaConfig:
        check_weights("dims", self.dims, self.weights)
        return self


class ExitsConfig(Section):
    """Early exits: the first layers, trained together with the whole model (2DMSE, Li et al. 2024, arXiv:2402.14776)."""

    layers: tuple[Positive, ...] = Field(
        (),
        description="Also apply the objectives to the vectors of the model cut to this many of its first layers, such as "
        "[6, 9].",
    )
    weights: tuple[float, ...] = Field(
        (), description="Weight of each of layers in the sum; the whole model has weight 1. Default: all 1."
    )
    random: int = Field(
        0, ge=0, le=1024, description="Number of further exits at random layers, drawn in every step (2DMSE: 1)."
    )
    random_weight: float = Field(1.0, gt=0, description="Weight of each random layer in the sum.")
    align: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL divergence between the vectors of each exit and of the whole model, each turned "
        "into a distribution by a softmax over its dimensions.",
    )
    align_temperature: float = Field(0.3, gt=0, description="Temperature of these softmaxes.")

    @model_validator(mode="after")
    def _check_exits(self) -> ExitsConfig:
        check_weights("layers", self.layers, self.weights)
        if self.align and not (self.layers or self.random):
            raise ValueError("align compares exits with the whole model, but there are none. Set layers or random.")
        return self

    @property
    def all_weights(self) -> tuple[float, ...]:
        """The weights of `layers`, then of the random layers."""
        return (*(self.weights or (1.0,) * len(self.layers)), *(self.random_weight,) * self.random)

    def list_trained(self, layers: int) -> tuple[int, ...]:
        """Return the exits below `layers` that training covers. With random layers, these are all."""
        return tuple(range(1, layers)) if self.random else tuple(sorted(set(self.layers)))


class QuantizationConfig(Section):
    """Quantization-aware training: the objectives also apply to quantized vectors."""

    precisions: tuple[Literal["int8", "binary"], ...] = Field(
        (),
        description="Also apply the objectives, except embedding_matching, to vectors in these precisions. Gradients pass "
        "straight through the rounding.",
    )
    weights: tuple[float, ...] = Field(
        (), description="Weight of each of precisions in the sum; the float32 vectors have weight 1. Default: all 1."
    )
    ranges: str | None = Field(
        None,
        description="File of the ranges of int8, which `encode --write-ranges` writes. Default: quantization_ranges.npy in the "
        "folder of model.base.",
    )

    @model_validator(mode="after")
    def _check_weights(self) -> QuantizationConfig:
        check_weights("precisions", self.precisions, self.weights)
        return self


class GradCacheConfig(Section):
    """Gradient caching (Gao et al. 2021)."""

    rows: Positive | None = Field(
        None,
        description="Rows that a device encodes at a time. Only their activations are in memory. Default: all rows.",
    )
    recompute: bool = Field(
        True,
        description="Encode every chunk of rows again in the backward pass. false: keep the residuals of all chunks "
        "(with model.remat, the input of every layer), which is faster if they fit into memory.",
    )
