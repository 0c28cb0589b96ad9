"""The config of `jaxembed curate`: sources, the steps that process their rows, and the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.curation_models import ClusterStepConfig, JudgeStepConfig, MineStepConfig
from jaxembed.config.data import NonEmpty, SourceConfig, Where
from jaxembed.config.sections import Patterns, Positive, Section, parse_section, read_tree
from jaxembed.config.shipped import CURATION_FOLDER, find_config

Side = Literal["query", "positives", "negatives"]
ALL_SIDES: tuple[Side, ...] = ("query", "positives", "negatives")
KeepRule = Literal["longest", "most_negatives", "source_priority"]
RatioRules = Literal["gopher", "gopher_repetition", "c4", "fineweb"]
DEFAULT_THRESHOLDS = {"exact": 1.0, "near": 0.8, "semantic": 0.95}
Share = Annotated[float, Field(gt=0, le=1)]


class StepConfig(Section):
    """Base of the steps that read no model."""

    name: str


class CleanStepConfig(StepConfig):
    """Repair texts. Only texts that become empty are dropped."""

    name: Literal["clean"] = "clean"
    sides: tuple[Side, ...] = Field(ALL_SIDES, min_length=1, description="Sides of a row whose texts are cleaned.")
    repair: bool = Field(False, description="Repair text that was decoded with a wrong encoding, such as Ã¼ (ftfy).")
    html: bool = Field(False, description="Turn HTML into text: tags, scripts, styles and entities are removed.")
    unicode: Literal["none", "NFC", "NFKC"] = Field("NFC", description="Unicode normalization form.")
    control_chars: bool = Field(
        True, description="Remove control and zero-width characters, except joiners between other characters."
    )
    boilerplate: Patterns = Field(
        (), description="Regular expressions. A line is removed if one of them matches the whole line."
    )
    whitespace: bool = Field(
        True, description="Collapse runs of spaces and blank lines, and strip both ends. Indentation stays."
    )


class QualityStepConfig(StepConfig):
    """Drop texts by length, published rules and patterns, and rows by metadata."""

    name: Literal["quality"] = "quality"
    sides: tuple[Side, ...] = Field(("query", "positives"), min_length=1, description="Sides of a row whose texts are checked.")
    where: Where = Field({}, description="Value, or list of values, that a field of a row must have. Other rows are dropped.")
    min_chars: int = Field(0, ge=0, description="Minimum characters of a text.")
    max_chars: Positive | None = Field(None, description="Maximum characters of a text.")
    tokenizer: str = Field("", description="MODEL whose tokens are counted: a folder or hub id.")
    min_tokens: int = Field(0, ge=0, description="Minimum tokens of a text, without special tokens.")
    max_tokens: Positive | None = Field(None, description="Maximum tokens of a text, without special tokens.")
    rules: tuple[RatioRules, ...] = Field(
        (), description="Published rules for web documents. A text must pass all of them. They expect spaces between words."
    )
    max_symbols: Share | None = Field(
        None, description="Maximum share of characters that are neither letters, digits, marks, nor white space."
    )
    drop_patterns: Patterns = Field(
        (), description="Regular expressions, such as those of personal data. A text that contains a match is dropped."
    )

    @model_validator(mode="after")
    def _check_limits(self) -> QualityStepConfig:
        if (self.min_tokens or self.max_tokens) and not self.tokenizer:
            raise ValueError("min_tokens and max_tokens count the tokens of a model. Set tokenizer.")
        for unit in ("chars", "tokens"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high is not None and high < low:
                raise ValueError(f"max_{unit} is {high}, less than min_{unit}, {low}. Swap them.")
        return self


class LanguageStepConfig(StepConfig):
    """Drop texts by their language (py3langid). Short or doubtful texts are kept."""

    name: Literal["language"] = "language"
    sides: tuple[Side, ...] = Field(("query", "positives"), min_length=1, description="Sides of a row whose texts are checked.")
    languages: tuple[NonEmpty, ...] = Field((), description="ISO 639-1 codes of the languages to keep. Default: all.")
    pairs: Literal["any", "same", "different"] = Field(
        "any", description="Whether a query and a document must have the same language, or different ones."
    )
    language_pairs: tuple[tuple[NonEmpty, NonEmpty], ...] = Field(
        (), description="Pairs (language of the query, language of the document) to keep. Default: all."
    )
    min_bytes: int = Field(
        20,
        ge=0,
        description="Minimum UTF-8 bytes of a text to check. Shorter ones are kept. An English letter has 1, a Chinese one 3.",
    )
    min_confidence: float = Field(0.5, ge=0, le=1, description="Minimum probability of a language. Texts below it are kept.")

    @model_validator(mode="after")
    def _check_rules(self) -> LanguageStepConfig:
        if not self.languages and not self.language_pairs and self.pairs == "any":
            raise ValueError("a language step needs languages, pairs, or language_pairs. Set one of them.")
        if (self.pairs != "any" or self.language_pairs) and not {"positives", "negatives"} & {*self.sides}:
            raise ValueError("pairs and language_pairs judge documents, but sides has only query. Add positives or negatives.")
        return self


class DuplicatesStepConfig(StepConfig):
    """Drop all copies of a text but one."""

    name: Literal["duplicates"] = "duplicates"
    of: Literal["queries", "positives", "pairs"] = Field(
        "pairs",
        description="What must be unique: queries, positives, or pairs of both. For queries, the whole row of a copy is "
        "dropped; otherwise only the positive.",
    )
    match: Literal["exact", "near", "semantic"] = Field(
        "exact",
        description="exact: texts that training treats as equal. near: a Jaccard index of at least threshold. semantic: "
        "a cosine of at least threshold between the vectors of model.",
    )
    threshold: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        None,
        description="near: minimum Jaccard index of the character n-grams of two texts, estimated. Default: 0.8. semantic: "
        "minimum cosine of two texts. Default: 0.95.",
    )
    model: str = Field("", description="semantic: MODEL that encodes the texts: a run directory, folder, or hub id.")
    across_sources: bool = Field(True, description="Compare texts across sources. false: compare within each source.")
    keep: tuple[KeepRule, ...] = Field(
        ("longest",),
        max_length=3,
        description="Rules that choose the copy to keep; later rules break ties. source_priority: the copy from the "
        "source that is listed first.",
    )

    @model_validator(mode="after")
    def _check_model(self) -> DuplicatesStepConfig:
        if (self.match == "semantic") != bool(self.model):
            advice = "only semantic reads model. Remove it." if self.model else "it compares vectors of a model. Set model."
            raise ValueError(f"match is {self.match!r}: {advice}")
        return self

    @property
    def min_similarity(self) -> float:
        """The threshold, or its default for this kind of match."""
        return DEFAULT_THRESHOLDS[self.match] if self.threshold is None else self.threshold


class NegativesStepConfig(StepConfig):
    """Drop false negatives of pairs, and negatives beyond a limit."""

    name: Literal["negatives"] = "negatives"
    answer_field: str = Field(
        "",
        description="Field of a row with the answer, or a list of answers. A negative that contains one is dropped. "
        "Default: no field.",
    )
    max_negatives: Positive | None = Field(
        None, description="Maximum negatives of a row; the first ones are kept. Default: no limit."
    )
    min_negatives: int = Field(0, ge=0, description="Minimum negatives of a row. Rows with fewer are dropped.")

    @model_validator(mode="after")
    def _check_numbers(self) -> NegativesStepConfig:
        if self.max_negatives is not None and self.max_negatives < self.min_negatives:
            raise ValueError(
                f"max_negatives is {self.max_negatives}, less than min_negatives, {self.min_negatives}. Swap them."
            )
        return self


class DecontaminateStepConfig(StepConfig):
    """Drop texts that occur in evaluation sets."""

    name: Literal["decontaminate"] = "decontaminate"
    tasks: tuple[NonEmpty, ...] = Field((), description="Names of MTEB tasks.")
    beir: tuple[NonEmpty, ...] = Field(
        (),
        description="BEIR folders: their documents, and the queries of the first existing split of test, dev and train.",
    )
    files: tuple[NonEmpty, ...] = Field((), description="Files, folders, patterns, or datasets, as in the path of a source.")
    parts: tuple[Literal["queries", "documents"], ...] = Field(
        ("queries", "documents"),
        min_length=1,
        description="Parts of the evaluation sets to compare with. Texts that are neither queries nor documents are "
        "always used.",
    )
    sides: tuple[Side, ...] = Field(ALL_SIDES, min_length=1, description="Sides of a row whose texts are compared.")
    ngram_words: Annotated[int, Field(ge=3, le=100)] | None = Field(
        13,
        description="Also drop texts that share this many words in a row with an evaluation text (GPT-3: 13). A character "
        "of a script without spaces counts as a word. null: equal texts only.",
    )
    bm25_threshold: Share | None = Field(
        None,
        description="Also drop texts with at least this BM25 similarity to an evaluation text, from 0 to 1 (equal terms). "
        "Default: not compared.",
    )

    @model_validator(mode="after")
    def _check_sets(self) -> DecontaminateStepConfig:
        if not (self.tasks or self.beir or self.files):
            raise ValueError("a decontaminate step needs tasks, beir, or files. Set one of them.")
        return self


class FunctionStepConfig(StepConfig):
    """Pass every row through a Python function of the user."""

    name: Literal["function"] = "function"
    function: str = Field(
        description="Dotted path of a function, such as my_package.my_module.my_function. It gets a row and returns it, "
        "possibly changed, or None to drop it."
    )
    on_error: Literal["stop", "drop", "keep"] = Field(
        "stop", description="What to do if the function raises: end the command, drop the row, or keep it unchanged."
    )

    @field_validator("function")
    @classmethod
    def _check_dotted_path(cls, path: str) -> str:
        if not all(part.isidentifier() for part in path.split(".")) or "." not in path:
            raise ValueError("expected the dotted path of a function in a module, such as my_module.my_function")
        return path


class BalanceStepConfig(StepConfig):
    """Limit the rows of each source, label, or value of a field. The draw depends only on the seed and the rows' content."""

    name: Literal["balance"] = "balance"
    by: NonEmpty = Field(
        "source",
        description="Key by which rows are grouped: source, label, or another field of the rows. Rows without it form "
        "one group.",
    )
    max_rows: Positive | None = Field(None, description="Maximum rows of a group. Default: no limit.")
    share: Share = Field(1.0, description="Share of the rows to draw. max_rows applies after it.")
    rows: Positive | None = Field(
        None,
        description="Number of rows to draw in total, divided among the groups in proportion to weight * size^exponent. "
        "Default: no limit.",
    )
    exponent: float = Field(
        1.0, ge=0, le=1, description="rows: exponent of the group size. 1: groups keep their shares. 0: equal shares."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="rows: weight of each group, by its value, or the name of a source. Default: 1."
    )

    @model_validator(mode="after")
    def _check_limit(self) -> BalanceStepConfig:
        if self.max_rows is None and self.share == 1 and self.rows is None:
            raise ValueError("a balance step needs rows, max_rows or share. Set one of them.")
        if self.rows is None and (self.exponent != 1 or self.weights):
            raise ValueError("exponent and weights apply only to rows. Set rows.")
        if self.rows is not None and self.share != 1:
            raise ValueError("rows and share exclude each other. Remove one of them.")
        return self


class CurriculumStepConfig(StepConfig):
    """Divide rows into levels of difficulty, written into a field. Stages of training select levels with `where`."""

    name: Literal["curriculum"] = "curriculum"
    by: NonEmpty = Field(
        "scores",
        description="Field with the difficulty, a number. scores: the highest score of a negative minus the lowest score of a "
        "positive, as mine and judge write them. Rows without a difficulty come first.",
    )
    levels: Annotated[int, Field(ge=2, le=100)] = Field(3, description="Number of levels, with equal numbers of rows.")
    descending: bool = Field(False, description="Put rows with large values first. Default: small values first, the easy rows.")
    field: NonEmpty = Field("level", description="Field that is written: 1 for the first level.")


AnyStep = Annotated[
    CleanStepConfig
    | QualityStepConfig
    | LanguageStepConfig
    | DuplicatesStepConfig
    | NegativesStepConfig
    | DecontaminateStepConfig
    | FunctionStepConfig
    | BalanceStepConfig
    | CurriculumStepConfig
    | MineStepConfig
    | JudgeStepConfig
    | ClusterStepConfig,
    Field(discriminator="name"),
]


class CurateConfig(Section):
    """The whole config of `jaxembed curate`."""

    out: NonEmpty = Field(description="Folder of the training files and the report. It must not exist.")
    format: Literal["jsonl", "array_record"] = Field("jsonl", description="Format of the training files.")
    metadata: tuple[str, ...] = Field((), description="Additional fields to write, besides those that training reads.")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Seed of the rows that balance draws, and of the samples in the report."
    )
    memory_mb: int = Field(
        512,
        ge=16,
        le=2**20,
        description="Memory in MiB for the data that a step compares at a time. Each text needs about one byte in addition.",
    )
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="Sources, as in the data section of training.")
    steps: tuple[AnyStep, ...] = Field(min_length=1)

    @property
    def output_metadata(self) -> tuple[str, ...]:
        """Fields to write in addition to those that training reads: `metadata`, and the fields that steps write."""
        fields = [step.field for step in self.steps if isinstance(step, CurriculumStepConfig | ClusterStepConfig)]
        return tuple(dict.fromkeys([*self.metadata, *fields]))


def load_curate_config(path: str | Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Read the YAML file of a curation, apply overrides, and check the result.

    Args:
        path: The YAML file, or the name of a shipped config.
        overrides: Settings of the form `key.sub=value`, applied in order.

    Raises:
        UserError: The file cannot be read, or a key is unknown or has a wrong value.
    """
    path = find_config(path, [CURATION_FOLDER])
    return parse_section(CurateConfig, read_tree(path, overrides), str(path))
