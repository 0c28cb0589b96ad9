"""The steps of a curation that find or score documents with a model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxembed.config.data import NonEmpty
from jaxembed.config.fields import MAX_INTEGER
from jaxembed.config.mining import MineConfig
from jaxembed.config.sections import Positive, Section

QWEN3_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note "
    'that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n'
    "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
Ranker = Literal["vectors", "bm25", "judge"]


class JudgeConfig(Section):
    """A model that reads a query and a document together, and returns a score of their relevance."""

    kind: Literal["cross_encoder", "causal_lm", "server"] = Field(
        "cross_encoder",
        description="cross_encoder: one that sentence-transformers loads. causal_lm: a language model that answers yes or no, "
        "such as Qwen3-Reranker; the score is the probability of yes. server: one that an OpenAI-compatible server runs.",
    )
    model: NonEmpty = Field(description="MODEL: a folder or hub id. server: the name of the model there.")
    url: str = Field("", description="server: its URL. A key is read from the environment variable OPENAI_API_KEY.")
    instruction: str = Field(
        "Given a web search query, retrieve relevant passages that answer the query",
        description="causal_lm and server: what makes a document relevant. Default: that of Qwen3-Reranker.",
    )
    max_length: Positive = Field(
        1024,
        description="causal_lm: maximum tokens of the whole input. Longer documents are truncated. A query gets at most half.",
    )
    template: str = Field(
        QWEN3_TEMPLATE,
        description="causal_lm: input with {instruction}, {query} and {document}. Default: that of Qwen3-Reranker.",
    )
    answers: tuple[NonEmpty, NonEmpty] = Field(
        ("yes", "no"),
        description="causal_lm and server: the answers that mean relevant and not relevant. For causal_lm, each is one token.",
    )

    @model_validator(mode="after")
    def _check_template(self) -> JudgeConfig:
        if (self.kind == "server") != bool(self.url):
            raise ValueError(
                f"kind is {self.kind!r}: {'set the url of the server' if not self.url else 'only server reads url'}"
            )
        if self.template.count("{document}") != 1 or "{query}" not in self.split_template()[0]:
            raise ValueError("template must contain {query} and then {document}, each once")
        return self

    def split_template(self) -> tuple[str, str]:
        """Return the template before and after the document."""
        before, _, after = self.template.partition("{document}")
        return before, after


class MineStepConfig(MineConfig):
    """Mine negatives for pairs, remove positives that a model does not find, and replace positives with better documents."""

    name: Literal["mine"] = "mine"
    model: NonEmpty = Field(description="MODEL whose vectors find candidates: a run directory, folder, or hub id.")
    sources: tuple[str, ...] = Field((), description="Names of the sources to mine for. Default: all that have pairs.")
    negatives: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = Field(
        7, description="Maximum number of mined negatives per query. 0: only check or replace positives."
    )
    keep_negatives: bool = Field(True, description="Keep the negatives of a row, before the mined ones.")
    corpus: tuple[NonEmpty, ...] = Field(
        (), description="BEIR folders or files of texts to search. Default: positives and negatives of the source itself."
    )
    instruction: str = Field("", description="Instruction of queries whose row has no prompt.")
    rankers: tuple[Ranker, ...] = Field(
        ("vectors",),
        min_length=1,
        description="Rankings of the candidates. Several are combined by reciprocal rank fusion. If a judge is set but "
        "not listed here, its scores alone reorder the candidates.",
    )
    judge: JudgeConfig | None = Field(
        None, description="Model whose scores replace the cosines of candidates, positives and negatives. Default: cosines."
    )
    relabel: bool = Field(
        False, description="Replace the positives of a row with the best-scoring candidate, if it scores higher than they do."
    )
    relabel_margin: float = Field(
        0, ge=0, description="Minimum difference between the scores of that candidate and of the best positive."
    )

    @model_validator(mode="after")
    def _check_judge(self) -> MineStepConfig:
        if not {"vectors", "bm25"} & set(self.rankers):
            raise ValueError("a judge only reorders candidates. Add vectors or bm25 to rankers.")
        if self.judge is None and "judge" in self.rankers:
            raise ValueError("rankers needs the scores of a judge. Set judge.")
        return self


class JudgeStepConfig(Section):
    """Score the documents of pairs, write the scores, and drop documents by score."""

    name: Literal["judge"] = "judge"
    judge: JudgeConfig = Field(description="The model that scores.")
    min_positive: float | None = Field(None, description="Minimum score of a positive. Default: no limit.")
    max_negative: float | None = Field(None, description="Maximum score of a negative. Default: no limit.")
    negative_margin: float | None = Field(
        None,
        description="Minimum difference between the lowest "
        "score of a positive of the row and the score of a negative. Default: no limit.",
    )


class ClusterStepConfig(Section):
    """Cluster the vectors of rows by spherical k-means, and write the cluster of each row into a field."""

    name: Literal["cluster"] = "cluster"
    model: NonEmpty = Field(description="MODEL that encodes the texts: a run directory, folder, or hub id.")
    of: Literal["queries", "positives"] = Field(
        "queries", description="Text that represents a row: the query, or the first positive."
    )
    clusters: Annotated[int, Field(ge=2, le=2**20)] = Field(description="Number of clusters.")
    iterations: Positive = Field(20, description="Maximum iterations of k-means.")
    field: NonEmpty = Field("cluster", description="Field that is written.")
