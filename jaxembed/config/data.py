"""The `data` section: sources, their rows, and how batches are drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from jaxembed.config.catalog import check_catalog_name, fill_from_catalog
from jaxembed.config.fields import quote_value
from jaxembed.config.removed import reject_python_packages
from jaxembed.config.sections import Positive, Section
from jaxembed.config.yaml_text import format_scalar

TEMPLATE_FIELD = re.compile(r"\{([^{}]+)\}")  # a placeholder for a field of a row, such as {title}


class FewShotConfig(Section):
    """In-context examples before the queries of a source (bge-en-icl, Li et al. 2024)."""

    most: Annotated[int, Field(ge=1, le=64)] = Field(
        5,
        description="Maximum number of examples of a query. Each query draws 1 to this many, from other rows. The last ones "
        "are dropped if they would leave less than half of data.max_length for the query.",
    )
    zero_shot: float = Field(0.2, ge=0, le=1, description="Share of the queries that get no examples.")


class PairTemplate(Section):
    """Templates that turn a row of a documents source into a pair."""

    query: str = Field(description='Template of the query. Names fields of a row in braces, such as "{title}".')
    positive: str = Field(description='Template of the positive, such as "{body}".')

    @field_validator("query", "positive")
    @classmethod
    def _check_names_field(cls, template: str) -> str:
        if not TEMPLATE_FIELD.search(template):
            raise ValueError('expected a template that names a field of the rows in braces, such as "{title}"')
        return template

    @property
    def fields(self) -> frozenset[str]:
        """The fields that a row must have."""
        return frozenset(TEMPLATE_FIELD.findall(self.query + self.positive))


NonEmpty = Annotated[str, Field(min_length=1)]
# The limit is above that of any model. It refuses typos before memory is allocated.
Tokens = Annotated[int, Field(gt=0, le=2**20)]
LIST_FIELDS = ("pos", "neg", "pos_scores", "neg_scores")  # fields that are lists


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
    "messages",
    "response",
]


def _convert_values_to_lists(where: Any) -> Any:
    """Return the conditions of `where` with a list of values for each field."""
    if not isinstance(where, dict):
        return where
    values_by_field = {field: list(value) if isinstance(value, list | tuple) else [value] for field, value in where.items()}
    for field, values in values_by_field.items():
        if not values or not all(isinstance(value, str | int | float) for value in values):
            raise ValueError(f"{field}: expected a text, a number, true, false, or a list of these")
    return values_by_field


Where = Annotated[dict[str, tuple[bool | int | float | str, ...]], BeforeValidator(_convert_values_to_lists)]
Format = Literal["auto", "pairs", "labels", "scored_pairs", "nli", "documents", "text", "chat", "beir"]


class SourceConfig(Section):
    """One source of training examples."""

    catalog: str = Field(
        "",
        description="Entry of configs/catalog.yaml that provides the keys which the source does not set itself.",
    )
    path: str = Field(
        description="File, folder, or pattern such as data/*.parquet; or hf:NAME:SPLIT (Hugging Face datasets) or "
        "tfds:NAME:SPLIT (TensorFlow Datasets). A source with an entry of the catalog may leave it out."
    )
    format: Format = Field("auto", description="Format of the rows. auto: detected from the path or the first row.")
    columns: dict[RowField, str | tuple[str, ...]] = Field(
        {},
        description="Column that holds each field, such as {query: question, pos: answer}. pos, neg, pos_scores and "
        "neg_scores may have a list of columns: {neg: [negative_1, negative_2]}.",
    )
    split: str = Field(
        "",
        description="Split of a dataset whose path names none (hf:NAME, tfds:NAME, or a saved dataset with several "
        "splits), or of a BEIR folder (qrels/SPLIT.tsv). Default for BEIR: the first that exists of train, dev and test. "
        "The choice is logged.",
    )
    name: str = Field("", description="Name of the source in logs, and of its exported prompt. Default: the stem of the path.")
    weight: float = Field(
        1.0, ge=1e-6, le=1e6, description="Share of the mixture, relative to the weights of the other sources."
    )
    adapter: str = Field("", description="The adapter that this source trains, one of model.lora.names.")
    instructions: tuple[str, ...] = Field((), description="Instructions of the queries. One is drawn for each example.")
    document_instruction: str = Field("", description="Instruction of the documents.")
    symmetric: bool = Field(
        False, description="Put the query's instruction before its documents too (NV-Embed does so for STS)."
    )
    few_shot: FewShotConfig | None = Field(None, description="In-context examples before the queries. Default: none.")
    in_batch_negatives: bool | None = Field(
        None, description="Use documents of other queries as negatives. Default: false for labels, otherwise true."
    )
    label_documents: Literal["auto", "labels", "examples"] = Field(
        "auto",
        description="Documents of the format labels. labels: the names of the labels. examples: other labeled texts. "
        "auto: labels if there are two labels, otherwise examples.",
    )
    label_names: dict[str, NonEmpty] = Field(
        {}, description="labels: text to use for each label, where the documents are labels. Default: the label itself."
    )
    label_negatives: Literal["own", "all"] = Field(
        "own",
        description="labels: draw negatives from the labels of this source (own), or of all sources of the stage "
        "(all, as in KaLM).",
    )
    single_labels: Literal["error", "skip"] = Field(
        "error", description="labels: what to do with a text that has no positive because no other example has its label."
    )
    max_examples: Positive | None = Field(None, description="Number of examples to use, drawn once. Default: all.")
    min_score: float = Field(
        4.0,
        description="scored_pairs: minimum score of a positive pair. The default is for scores from 0 to 5; scores above 5 "
        "need another value.",
    )
    graded: bool | None = Field(
        None,
        description="scored_pairs: train on all pairs with their scores, instead of only on those of at least min_score. "
        "Default: true if a graded objective of the stage applies to the source.",
    )
    score_range: tuple[float, float] | None = Field(
        None,
        description="scored_pairs: lowest and highest possible score, such as [0, 5]. A score outside of it is an error. "
        "Default for graded sources: the first of [0, 1], [-1, 1] and [0, 5] that contains all scores.",
    )
    label_scores: dict[str, float] = Field(
        {},
        description="scored_pairs: score of each label, for a column of labels that columns maps to score, such as "
        "{entailment: 1, contradiction: 0}. Rows with another label are left out.",
    )
    pair_templates: tuple[PairTemplate, ...] = Field(
        (),
        max_length=32,
        description="documents: templates of the pairs of a row. Each time, one is drawn among those whose fields the row has.",
    )
    equality: Literal["normalized", "exact"] = Field(
        "normalized",
        description="documents: rule by which a query and a positive are equal, in which case they make no pair. "
        "normalized: case, white space, Unicode form, and invisible characters are ignored. exact: only identical texts "
        "are equal. Runs of earlier versions keep exact.",
    )
    where: Where = Field({}, description="Value, or list of values, that a field of a row must have. Other rows are left out.")
    min_chars: int = Field(
        0, ge=0, description="Minimum characters of a text. Shorter texts, and rows that need them, are left out."
    )
    max_chars: Positive | None = Field(
        None, description="Maximum characters of a text. Longer texts, and rows that need them, are left out."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_over_catalog_entry(cls, source: Any) -> Any:
        return fill_from_catalog(source) if isinstance(source, dict) and source.get("catalog") else source

    @field_validator("catalog")
    @classmethod
    def _check_catalog_name(cls, name: str) -> str:
        if name:
            check_catalog_name(name)
        return name

    @field_validator("path", "format", mode="before")
    @classmethod
    def _reject_removed_source(cls, value: Any, info: ValidationInfo) -> Any:
        reject_python_packages(str(info.field_name), value)
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _check_columns(cls, columns: Any) -> Any:
        for field, names in columns.items() if isinstance(columns, dict) else ():
            if isinstance(names, list | tuple) and names and field not in LIST_FIELDS:
                raise ValueError(f"{field}: expected one column; a list is for {', '.join(sorted(LIST_FIELDS))}")
            column_names = names if isinstance(names, list | tuple) else [names]
            if not column_names or not all(isinstance(name, str) for name in column_names):
                raise ValueError(f"{field} is {quote_value(names)} (expected the name of a column, or a list of names)")
        return columns

    @field_validator("label_names", "label_scores", mode="before")
    @classmethod
    def _convert_labels_to_texts(cls, names: Any) -> Any:
        if not isinstance(names, dict):
            return names
        if not all(isinstance(label, str | int | float) for label in names):
            raise ValueError("expected a label as each key. Quote a label that is null, ~, or empty.")
        texts = {format_scalar(label): text for label, text in names.items()}
        if len(texts) < len(names):
            raise ValueError("two keys are the same label")
        return texts

    @model_validator(mode="after")
    def _check_score_range(self) -> SourceConfig:
        if self.score_range is None:
            return self
        low, high = self.score_range
        if low >= high:
            raise ValueError(f"score_range is [{low:g}, {high:g}] (expected the lowest score, then the highest). Swap them.")
        for label, score in self.label_scores.items():
            if not low <= score <= high:
                raise ValueError(f"label_scores: {label} is {score:g} (expected {low:g} to {high:g}, the score_range)")
        return self

    @property
    def display_name(self) -> str:
        """The name, or the stem of the path if there is none."""
        return self.name or Path(self.path).stem

    def get_document_instruction(self, query_instruction: str) -> str:
        """Return the instruction of the documents of a query with this instruction."""
        return query_instruction if self.symmetric else self.document_instruction

    @model_validator(mode="after")
    def _check_document_instruction(self) -> SourceConfig:
        if self.symmetric and self.document_instruction:
            raise ValueError("symmetric puts the query's instruction before the documents. Remove document_instruction.")
        return self

    @model_validator(mode="after")
    def _check_pair_templates(self) -> SourceConfig:
        if self.pair_templates and self.format not in ("auto", "documents"):
            raise ValueError(f"pair_templates belong to format documents, but format is {self.format}. Remove them.")
        if self.format == "documents" and not self.pair_templates:
            raise ValueError(
                'format documents needs pair_templates, such as [{query: "{title}", positive: "{body}"}], to make pairs'
            )
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> SourceConfig:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars is {self.max_chars}, less than min_chars, {self.min_chars}. Swap them.")
        return self

    @model_validator(mode="after")
    def _check_few_shot_instruction(self) -> SourceConfig:
        if self.few_shot is not None and not all(self.instructions or [""]):
            raise ValueError("few_shot shows its examples under an instruction. Set instructions, none of them empty.")
        return self


class MixtureConfig(Section):
    """The shares of the sources in the training data."""

    by: Literal["weight", "size"] = Field(
        "weight", description="Make the share of a source proportional to its weight, or to its weight times its size."
    )
    temperature: float = Field(
        1.0, ge=0.1, le=1e6, description="Shares are raised to 1 / temperature. Above 1, they become more even."
    )


class BatchingConfig(Section):
    """How examples are grouped into batches."""

    kind: Literal["blended", "homogeneous", "semi_homogeneous"] = Field(
        "blended", description="Whether a batch mixes all sources, comes from one source, or partly from one source."
    )
    ratio: float = Field(0.5, ge=0, le=1, description="semi_homogeneous: share of a batch that comes from one source.")
    no_duplicates: bool = Field(
        False,
        description="Use each query and positive only once in a batch, and draw other examples of the source instead. "
        "Applies to sources with in-batch negatives.",
    )

    @property
    def single_source_share(self) -> float:
        """Share of a batch that comes from one source, 0 to 1."""
        return {"blended": 0.0, "homogeneous": 1.0, "semi_homogeneous": self.ratio}[self.kind]


class DataConfig(Section):
    """The training data of a stage."""

    max_length: Tokens = Field(
        512, description="Maximum tokens of a text, special tokens included. Longer texts are truncated."
    )
    row_length: Tokens | None = Field(None, description="Tokens of a packed row, at least max_length. Default: max_length.")
    hard_negatives: int = Field(0, ge=0, le=1024, description="Number of hard negatives drawn for each query.")
    batching: BatchingConfig = BatchingConfig()
    mixture: MixtureConfig = MixtureConfig()
    sources: tuple[SourceConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_row_length(self) -> DataConfig:
        if self.row_length is not None and self.row_length < self.max_length:
            raise ValueError(
                f"row_length is {self.row_length} (expected at least max_length, {self.max_length}: a text must fit a row)"
            )
        return self

    def collect_first_instructions(self, adapter: str | None = None) -> dict[str, tuple[str, str]]:
        """Return the (query, document) instructions by source name, for the sources that have any.

        Args:
            adapter: Only consider the sources that train this adapter.
        """
        sources = [source for source in self.sources if source.instructions and adapter in (None, source.adapter)]
        return {
            source.display_name: (source.instructions[0], source.get_document_instruction(source.instructions[0]))
            for source in sources
        }
