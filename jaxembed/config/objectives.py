"""The `objectives`, `matryoshka` and `gradcache` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.sections import Positive, Section


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
