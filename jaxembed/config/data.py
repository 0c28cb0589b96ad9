"""The `data` section: sources, their rows, and how batches are drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.sections import Positive, Section


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
    def display_name(self) -> str:
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
        return {s.display_name: (asked, s.instruction_of_documents(asked)) for s, asked in first}
