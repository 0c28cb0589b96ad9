"""The steps of a synthesis recipe: prompts, valid answers, and the retrieval and ranking of documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from jaxembed.config.data import NonEmpty
from jaxembed.config.sections import Patterns, Positive, Section
from jaxembed.config.templates import list_placeholders
from jaxembed.config.yaml_text import format_scalar

BM25 = "bm25"
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class ValuesConfig(Section):
    """The possible values of a placeholder. One is drawn for each request.

    In YAML: a list of values, a mapping from value to weight, or a mapping {file: PATH} with one value per line or row.
    """

    choices: tuple[str, ...] = Field((), description="The possible values.")
    weights: tuple[float, ...] = Field((), description="Weight of each value. Default: all equal.")
    file: str = Field(
        "",
        description="File of the possible values: lines of text, or rows. A relative path is looked up in the working folder, "
        "then next to the recipe.",
    )
    field: NonEmpty = Field("text", description="Field of the rows of file that holds the value.")

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, values: Any) -> Any:
        if isinstance(values, list | tuple):
            return {"choices": [format_scalar(value) if isinstance(value, int | float) else value for value in values]}
        if isinstance(values, dict) and values and not {"file", "choices"} & set(values):
            choices = [format_scalar(value) if isinstance(value, int | float) else value for value in values]
            return {"choices": choices, "weights": list(values.values())}
        return values

    @model_validator(mode="after")
    def _check_values(self) -> ValuesConfig:
        if bool(self.choices) == bool(self.file):
            raise ValueError("expected a list of values, a mapping from value to weight, or {file: PATH}")
        if self.weights and (min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError("expected weights that are not negative, and at least one above 0")
        if self.weights and len(self.weights) != len(self.choices):
            raise ValueError(f"{len(self.weights)} weights for {len(self.choices)} choices (expected one weight per choice)")
        return self


class SamplingConfig(Section):
    """How the model samples an answer."""

    temperature: float = Field(1.0, ge=0, le=5, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: probability mass of the tokens to sample from.")
    max_tokens: Positive = Field(1024, description="Maximum tokens of an answer. A longer answer is truncated and invalid.")


class FieldConfig(Section):
    """A field of an answer and its valid values."""

    type: Literal["string", "number", "integer", "choice", "list"] = Field("string", description="Type of the value.")
    choices: tuple[str, ...] = Field((), description="Type choice: the valid values.")
    minimum: float | None = Field(None, description="Type number or integer: smallest valid value. Default: no limit.")
    maximum: float | None = Field(None, description="Type number or integer: largest valid value. Default: no limit.")
    min_chars: int = Field(1, ge=0, description="Minimum characters of a string, or of each string of a list.")
    max_chars: Positive = Field(20000, description="Maximum characters of a string, or of each string of a list.")
    min_items: int = Field(1, ge=0, description="Minimum number of strings of a list.")
    max_items: Positive = Field(100, description="Maximum number of strings of a list.")
    language: str = Field(
        "",
        description="Language of the strings: its English name, its ISO 639-1 code, or a placeholder such as "
        '"{language}". A text whose language is not certain, such as a short one, is valid too. Default: any language.',
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _read_scalars(cls, choices: Any) -> Any:
        is_list = isinstance(choices, list | tuple)
        return [format_scalar(c) if isinstance(c, int | float) else c for c in choices] if is_list else choices

    @model_validator(mode="after")
    def _check_choices(self) -> FieldConfig:
        if (self.type == "choice") != bool(self.choices):
            raise ValueError("choices belong to type choice. Set both, or none.")
        return self


class AnswerConfig(Section):
    """The form of a valid answer.

    - text: the answer as it is. Its field is `text`.
    - list: a JSON list of strings. Each string continues as a separate draft. Its field is `item`.
    - object: a JSON object with the given fields.

    The server gets the JSON schema of a list or object and enforces it if it can. Otherwise the answer may be fenced or
    surrounded by text.
    """

    type: Literal["text", "list", "object"] = Field(
        "text",
        description="text: the answer as it is. list: a JSON list of strings, each of which becomes a separate draft. object: "
        "a JSON object with the given fields.",
    )
    fields: dict[Name, FieldConfig] = Field({}, description="Type object: the fields of the answer.")
    items: FieldConfig = Field(
        FieldConfig(),
        description="Type text: the rules of the text. Type list: the rules of each string, and how many strings there may be.",
    )
    reject: Patterns = Field(
        (),
        description="Regular expressions. An answer is invalid if one of its strings contains a match. Refusals, such as "
        "strings that start with I'm sorry, are always invalid.",
    )

    @model_validator(mode="after")
    def _check_fields(self) -> AnswerConfig:
        if (self.type == "object") != bool(self.fields):
            raise ValueError("fields belong to type object. Set both, or none.")
        for name in self.fields:
            if name.startswith("_") or (name.startswith("model_") and hasattr(BaseModel, name)):
                raise ValueError(f"fields.{name}: this name is reserved. Choose another one.")
        if self.items.type != "string":
            raise ValueError(f"items.type is {self.items.type!r} (expected string)")
        return self

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields that later templates can use."""
        return {"text": ("text",), "list": ("item",), "object": tuple(self.fields)}[self.type]


class SynthesisStepConfig(Section):
    """The keys that all steps share."""

    kind: str
    name: Name = Field(description="Name of the step. Later templates use its fields as {NAME.FIELD}.")

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields that later templates can use."""
        return ()

    @property
    def own_placeholders(self) -> frozenset[str]:
        """Placeholders that only the templates of this step can use."""
        return frozenset()

    def list_templates(self) -> dict[str, str]:
        """Return the templates of the step by key."""
        return {}


class AskStepConfig(SynthesisStepConfig):
    """Send a prompt to the model for each draft that reaches the step."""

    kind: Literal["ask"] = "ask"
    requests: Positive | None = Field(
        None, description="First step only: number of drafts to start. Set either requests or per."
    )
    per: str = Field(
        "", description="First step only: name of an input, each row of which starts a draft. Set either requests or per."
    )
    repeat: Positive = Field(
        1, description="Number of requests for each draft. Each one draws its own values, and gives a separate draft."
    )
    system: str = Field("", description="Template of the system prompt. Default: none.")
    prompt: NonEmpty = Field(description="Template of the prompt.")
    values: dict[Name, ValuesConfig] = Field(
        {}, description="Placeholders of this step, and their possible values. One value of each is drawn for each request."
    )
    distinct: tuple[str, ...] = Field(
        (), description="Placeholders that must have different values in a request, such as two languages."
    )
    sampling: SamplingConfig = SamplingConfig()
    answer: AnswerConfig = AnswerConfig()
    unique: Literal["none", "exact", "near"] = Field(
        "none",
        description="Drop an answer, or a string of a list, that equals (exact) or nearly equals (near) an earlier one of this "
        "step. Nearly equal: a Jaccard index of the character n-grams of at least 0.8, estimated. The threshold of the recipe "
        "does not apply.",
    )
    attempts: Positive = Field(
        3, description="Maximum number of requests for a valid answer. If none is valid, the draft is dropped."
    )

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields that later templates can use: those of the answer, and the drawn values."""
        return (*self.answer.field_names, *self.values)

    @property
    def own_placeholders(self) -> frozenset[str]:
        """The placeholders with values."""
        return frozenset(self.values)

    def list_templates(self) -> dict[str, str]:
        """Return the templates of the step by key."""
        languages = {f"answer.fields.{name}.language": field.language for name, field in self.answer.fields.items()}
        languages["answer.items.language"] = self.answer.items.language
        return {"system": self.system, "prompt": self.prompt, **{key: text for key, text in languages.items() if text}}

    @model_validator(mode="after")
    def _check_step(self) -> AskStepConfig:
        if unknown := [name for name in self.distinct if name not in self.values]:
            raise ValueError(f"distinct names {unknown[0]!r}, which has no values. Add values.{unknown[0]}.")
        fields = set(self.answer.field_names)
        if duplicates := [name for name in self.values if name in fields]:
            raise ValueError(f"{duplicates[0]!r} is a field of the answer and has values. Rename one.")
        return self


class SearchStepConfig(SynthesisStepConfig):
    """The keys of all steps that search the documents of an input."""

    input: Name = Field("documents", description="Name of the input to search. The title and text of its rows are searched.")
    query: NonEmpty = Field(description="Template of the query.")
    by: NonEmpty = Field(BM25, description="Retriever: bm25, or a MODEL (a run directory, folder, or hub id).")

    def list_templates(self) -> dict[str, str]:
        """Return the templates of the step by key."""
        return {"query": self.query}


class RetrieveStepConfig(SearchStepConfig):
    """Find the documents of an input that are nearest to a query."""

    kind: Literal["retrieve"] = "retrieve"
    k: Positive = Field(20, description="Number of documents to retrieve.")


class RelevanceConfig(Section):
    """Grades that the model gives candidates. If the server returns logprobs, the expected grade is used."""

    system: str = Field("", description="Template of the system prompt. Default: none.")
    prompt: NonEmpty = Field(description="Template of the prompt. {candidate.text} is the text of the candidate.")
    grades: tuple[str, ...] = Field(min_length=2, description="The grades, from least to most relevant, such as ['0', '1'].")

    @field_validator("grades", mode="before")
    @classmethod
    def _read_scalars(cls, grades: Any) -> Any:
        is_list = isinstance(grades, list | tuple)
        return [format_scalar(grade) if isinstance(grade, int | float) else grade for grade in grades] if is_list else grades


class LikelihoodConfig(Section):
    """The mean log-probability of the query after a prompt with the candidate (Sachan et al. 2022, arXiv:2204.07496).

    It needs a server whose completions return the logprobs of the prompt (`echo`), such as vLLM. With others, it is skipped.
    """

    prompt: NonEmpty = Field(
        description="Template of the text before the query. {candidate.text} is the text of the candidate."
    )


class RankStepConfig(SynthesisStepConfig):
    """Rank the candidates of a retrieve step by the model (Gecko, arXiv:2403.20327, section 3.2).

    The ranks by likelihood and by relevance are combined by reciprocal rank fusion. Fields: `positive` is the best candidate,
    `negative` a hard negative, and `is_relabeled` whether it differs from the document of the draft.
    """

    kind: Literal["rank"] = "rank"
    candidates: Name = Field(description="Name of the retrieve step whose documents are ranked.")
    query: NonEmpty = Field(description="Template of the query.")
    relevance: RelevanceConfig | None = Field(None, description="Rank by grades that the model gives to the candidates.")
    likelihood: LikelihoodConfig | None = Field(
        None, description="Rank by the likelihood of the query given the candidate. Skipped if the server cannot compute it."
    )
    fusion_k: Positive = Field(
        60, description="Constant k of reciprocal rank fusion, which sums 1 / (k + rank) (Cormack et al. 2009)."
    )
    hard_negative: Literal["last", "random"] = Field(
        "last",
        description="Rank of the hard negative: the last one, or a random one below the best (Gecko, section 3.2). Candidates "
        "without a valid score have no rank.",
    )
    sampling: SamplingConfig = SamplingConfig(temperature=0, max_tokens=16)

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields that later templates can use."""
        return ("positive", "negative", "is_relabeled")

    @property
    def own_placeholders(self) -> frozenset[str]:
        """The text, title and id of the candidate."""
        return frozenset({"candidate.text", "candidate.title", "candidate.id"})

    def list_templates(self) -> dict[str, str]:
        """Return the templates of the step by key."""
        parts = {"relevance": self.relevance, "likelihood": self.likelihood}
        nested = {
            f"{key}.{name}": getattr(part, name)
            for key, part in parts.items()
            for name in ("system", "prompt")
            if part is not None and hasattr(part, name)
        }
        return {"query": self.query, **nested}

    @model_validator(mode="after")
    def _check_rankings(self) -> RankStepConfig:
        if self.relevance is None and self.likelihood is None:
            raise ValueError("a rank step needs relevance or likelihood. Set one of them.")
        return self


class RoundTripStepConfig(SearchStepConfig):
    """Keep a draft only if its document is among the nearest to its query (Alberti et al. 2019, arXiv:1906.05416)."""

    kind: Literal["round_trip"] = "round_trip"
    input: Name = Field(
        "documents", description="Name of the input to search. It must be the one that per of the first step names."
    )
    k: Positive = Field(1, description="Keep a draft if its document is among the k nearest.")


class FilterStepConfig(SynthesisStepConfig):
    """Keep a draft only if a value meets a condition."""

    kind: Literal["filter"] = "filter"
    value: NonEmpty = Field(description='Template of the value to check, such as "{judge.score}".')
    minimum: float | None = Field(None, description="Smallest number to keep. Default: no limit.")
    maximum: float | None = Field(None, description="Largest number to keep. Default: no limit.")
    allowed: tuple[str, ...] = Field((), description="Texts to keep. If set, minimum and maximum are not read.")

    def list_templates(self) -> dict[str, str]:
        """Return the templates of the step by key."""
        return {"value": self.value}

    @model_validator(mode="after")
    def _check_conditions(self) -> FilterStepConfig:
        if self.minimum is None and self.maximum is None and not self.allowed:
            raise ValueError("a filter step needs minimum, maximum, or allowed. Set one of them.")
        return self


AnySynthesisStep = Annotated[
    AskStepConfig | RetrieveStepConfig | RankStepConfig | RoundTripStepConfig | FilterStepConfig, Field(discriminator="kind")
]


def find_unknown_placeholder(template: str, known_names: frozenset[str], prefixes: frozenset[str]) -> str | None:
    """Return the first placeholder of a template that is not known, or None.

    Args:
        template: The template.
        known_names: Known placeholders.
        prefixes: Names of inputs, whose rows may have any fields.
    """
    placeholders = list_placeholders(template)
    return next((name for name in placeholders if name not in known_names and name.partition(".")[0] not in prefixes), None)
