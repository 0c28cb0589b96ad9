"""Held-out sets: opened once, and scored during training or by `evaluate`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from jaxembed.config import EvalSetConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.beir import EVALUATION_SPLITS, open_beir
from jaxembed.data.containers import name_split, open_container
from jaxembed.data.labels import find_unlabeled
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import iter_rows
from jaxembed.data.sources import ROW_SCHEMAS
from jaxembed.errors import UserError
from jaxembed.evaluation.bootstrap import ScoredItems, score_mean, score_pearson, score_spearman
from jaxembed.evaluation.labels import (
    NUM_FOLDS,
    check_sklearn_installed,
    classify,
    cluster,
    cross_validate,
    macro_f1,
    score_v_measure,
)
from jaxembed.evaluation.retrieval import Encode, average_precision, ndcg, recall, reciprocal_rank
from jaxembed.files import exists
from jaxembed.search import bm25
from jaxembed.search.nearest import search

CUTOFF, DEEP_CUTOFF = 10, 100  # k of nDCG@k, recall@k and MRR@k; k of recall@k and MAP@k

Role = Literal["queries", "documents", "texts", "training texts"]


@dataclasses.dataclass(frozen=True)
class TextInput:
    """Texts of a held-out set that are encoded under one instruction.

    Attributes:
        role: Role of the texts in the set. The classifier is fitted on the training texts.
        texts: The texts.
        instruction: Their instruction.
    """

    role: Role
    texts: Sequence[str]
    instruction: str

    @property
    def side(self) -> str:
        """The side of the texts, `document` or `query`. Some models have one prompt for each."""
        return "document" if self.role == "documents" else "query"

    def build_prompt(self, spec: EmbeddingSpec) -> str:
        """Return the complete prompt of the texts: that of their instruction, or of their side."""
        return spec.build_prompt(self.instruction, side=self.side)


@dataclasses.dataclass(frozen=True)
class SetScores:
    """The scores of a model on a held-out set.

    Attributes:
        scores: Score by metric.
        items: The items that the main score is computed from.
    """

    scores: dict[str, float]
    items: ScoredItems


class HeldOutSet(Protocol):
    """A set that scores the vectors of its texts.

    Attributes:
        task_type: The type of such tasks in MTEB.
        metric: Name of the main score.
        training_metrics: The scores that are logged during training.
    """

    task_type: ClassVar[str]
    metric: ClassVar[str]
    training_metrics: ClassVar[tuple[str, ...]]

    @property
    def config(self) -> EvalSetConfig:
        """The config section of the set."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""
        ...

    @property
    def inputs(self) -> list[TextInput]:
        """The texts to encode, in the order of the vectors that `score` takes."""
        ...

    def score(self, vectors: Sequence[np.ndarray]) -> SetScores:
        """Score the vectors of the inputs."""
        ...


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and relevance judgments (qrels).

    Attributes:
        config: The config section of the set.
        queries: Texts of the queries.
        corpus: Texts of the documents.
        relevant: For each query, the relevance of each relevant document by its index in the corpus. Negative indices are
            documents that the corpus lacks.
        digest: SHA-256 of the data.
    """

    task_type: ClassVar[str] = "Retrieval"
    metric: ClassVar[str] = "ndcg_at_10"
    training_metrics: ClassVar[tuple[str, ...]] = ("ndcg_at_10", "recall_at_10")

    config: EvalSetConfig
    queries: Sequence[str]
    corpus: Sequence[str]
    relevant: Sequence[dict[int, float]]
    digest: str = ""

    @property
    def inputs(self) -> list[TextInput]:
        """The queries and the documents."""
        return [
            TextInput("queries", self.queries, self.config.instruction),
            TextInput("documents", self.corpus, self.config.document_instruction),
        ]

    def score(self, vectors: Sequence[np.ndarray]) -> SetScores:
        """Return nDCG, recall, MRR and MAP, each from 0 to 1."""
        queries, documents = vectors
        return self._score_ranking(search(queries, documents, DEEP_CUTOFF).indices)

    def score_bm25(self) -> SetScores:
        """Return the same scores for BM25, the lexical baseline."""
        return self._score_ranking(bm25.rank_documents(self.corpus, self.queries, DEEP_CUTOFF))

    def _score_ranking(self, ranked_rows: np.ndarray) -> SetScores:
        """Return the scores of a ranking, given the corpus rows of each query's top documents, best first, int [Q, k]."""
        top_rows = ranked_rows[:, :CUTOFF]
        ndcg_values = ndcg(self.relevant, top_rows)
        values_by_metric = {
            "ndcg_at_10": ndcg_values,
            "recall_at_10": recall(self.relevant, top_rows),
            "recall_at_100": recall(self.relevant, ranked_rows),
            "mrr_at_10": reciprocal_rank(self.relevant, top_rows),
            "map_at_100": average_precision(self.relevant, ranked_rows),
        }
        scores = {metric: float(values.mean()) for metric, values in values_by_metric.items()}
        return SetScores(scores, ScoredItems(ndcg_values[:, None], score_mean, "queries"))


@dataclasses.dataclass(frozen=True)
class SimilaritySet:
    """Sentence pairs with graded similarity.

    Attributes:
        config: The config section of the set.
        first: First sentence of each pair.
        second: Second sentence of each pair.
        scores: Similarity of each pair, float64 [N].
        digest: SHA-256 of the data.
    """

    task_type: ClassVar[str] = "STS"
    metric: ClassVar[str] = "spearman"
    training_metrics: ClassVar[tuple[str, ...]] = ("spearman",)

    config: EvalSetConfig
    first: Sequence[str]
    second: Sequence[str]
    scores: np.ndarray
    digest: str = ""

    @property
    def inputs(self) -> list[TextInput]:
        """The first and the second sentences."""
        return [TextInput("texts", texts, self.config.instruction) for texts in (self.first, self.second)]

    def score(self, vectors: Sequence[np.ndarray]) -> SetScores:
        """Return Spearman's and Pearson's correlation of the cosine with the annotated similarity, each from -1 to 1."""
        first, second = vectors
        pairs = np.stack([np.sum(first * second, axis=1, dtype=np.float64), self.scores], axis=1)
        items = ScoredItems(pairs, score_spearman, "pairs")
        pearson = ScoredItems(pairs, score_pearson, "pairs").score
        return SetScores({"spearman": items.score, "pearson": pearson}, items)


@dataclasses.dataclass(frozen=True)
class ClassificationSet:
    """Labeled texts whose labels a classifier predicts from their vectors.

    Attributes:
        config: The config section of the set.
        texts: The texts.
        labels: The label of each, int64 [N].
        train_texts: The texts that the classifier is trained on. None: the texts are cross-validated.
        train_labels: Their labels.
        digest: SHA-256 of the data.
    """

    task_type: ClassVar[str] = "Classification"
    metric: ClassVar[str] = "accuracy"
    training_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    config: EvalSetConfig
    texts: Sequence[str]
    labels: np.ndarray
    train_texts: Sequence[str] | None = None
    train_labels: np.ndarray | None = None
    digest: str = ""

    @property
    def inputs(self) -> list[TextInput]:
        """The texts, and the training texts."""
        train = [] if self.train_texts is None else [TextInput("training texts", self.train_texts, self.config.instruction)]
        return [TextInput("texts", self.texts, self.config.instruction), *train]

    def score(self, vectors: Sequence[np.ndarray]) -> SetScores:
        """Return the accuracy and the macro F1 of the predicted labels, each from 0 to 1."""
        texts, *train = vectors
        if self.train_labels is None:
            predictions = cross_validate(texts, self.labels)
        else:
            predictions = classify(texts, train[0], self.train_labels)
        accuracies = (predictions == self.labels[:, None]).mean(axis=1, keepdims=True)  # of each text over the classifiers
        items = ScoredItems(accuracies, score_mean, "texts")
        return SetScores({"accuracy": items.score, "f1": macro_f1(self.labels, predictions)}, items)


@dataclasses.dataclass(frozen=True)
class ClusteringSet:
    """Labeled texts whose vectors are clustered.

    Attributes:
        config: The config section of the set.
        texts: The texts.
        labels: The label of each, int64 [N].
        digest: SHA-256 of the data.
    """

    task_type: ClassVar[str] = "Clustering"
    metric: ClassVar[str] = "v_measure"
    training_metrics: ClassVar[tuple[str, ...]] = ("v_measure",)

    config: EvalSetConfig
    texts: Sequence[str]
    labels: np.ndarray
    digest: str = ""

    @property
    def inputs(self) -> list[TextInput]:
        """The texts."""
        return [TextInput("texts", self.texts, self.config.instruction)]

    def score(self, vectors: Sequence[np.ndarray]) -> SetScores:
        """Return the V-measure of the clusters, from 0 to 1. There are as many clusters as labels."""
        (texts,) = vectors
        clusters = cluster(texts, len(np.unique(self.labels)))
        items = ScoredItems(np.column_stack([self.labels, clusters]).astype(np.float64), score_v_measure, "texts")
        return SetScores({"v_measure": items.score}, items)


def open_held_out_sets(configs: Sequence[EvalSetConfig], cache: Path, where: str = "eval.sets") -> list[HeldOutSet]:
    """Open and check held-out sets.

    Args:
        configs: The config section of each set.
        cache: Folder of the indexes of files.
        where: The config key or command that names the sets, for errors.

    Raises:
        UserError: A set does not exist or is malformed.
    """
    return [_open_set(config, cache, where) for config in configs]


def _open_set(config: EvalSetConfig, cache: Path, where: str) -> HeldOutSet:
    if config.kind == "sts":
        return _read_similarity_set(config, cache)
    if config.kind == "classification":
        return _read_classification_set(config, cache)
    if config.kind == "clustering":
        return _read_clustering_set(config, cache)
    if exists(Path(config.path)):
        return _read_retrieval_set(config)
    raise UserError(f"{where}: {config.name}: no such file or folder {config.path!r}")


def _read_retrieval_set(config: EvalSetConfig) -> RetrievalSet:
    beir = open_beir(Path(config.path), EVALUATION_SPLITS, config.split)
    queries = [beir.get_query_text(i) for i in range(len(beir.query_rows))]
    corpus = [beir.get_document_text(row) for row in range(len(beir.corpus))]
    return RetrievalSet(config, queries, corpus, beir.relevant, beir.digest)


def _read_similarity_set(config: EvalSetConfig, cache: Path) -> SimilaritySet:
    rows = IndexedRows(open_container(name_split(config.path, config.split)), ROW_SCHEMAS["scored_pairs"], cache)
    first, second = zip(*((row["sentence1"], row["sentence2"]) for row in iter_rows(rows)), strict=True)
    return SimilaritySet(config, first, second, np.array(rows.index_values), rows.digest)


def _read_clustering_set(config: EvalSetConfig, cache: Path) -> ClusteringSet:
    labeled = _read_labeled_texts(config.path, config.split, cache)
    return ClusteringSet(config, labeled.texts, labeled.labels, labeled.digest)


def _read_classification_set(config: EvalSetConfig, cache: Path) -> ClassificationSet:
    """Read labeled texts, and the training texts if the config names them. Both share one numbering of the labels."""
    labeled = _read_labeled_texts(config.path, config.split, cache)
    if config.train_path:
        train = _read_labeled_texts(config.train_path, config.train_split, cache)
        numbers = {name: number for number, name in enumerate(dict.fromkeys((*labeled.names, *train.names)))}
        labels, train_labels = (np.array([numbers[name] for name in side.names])[side.labels] for side in (labeled, train))
        digest = hashlib.sha256((labeled.digest + train.digest).encode()).hexdigest()
        return ClassificationSet(config, labeled.texts, labels, train.texts, train_labels, digest)
    if len(labeled.texts) < NUM_FOLDS:
        raise UserError(
            f"{config.path}: {len(labeled.texts)} labeled texts (expected at least {NUM_FOLDS}, for cross-validation). "
            "Add texts."
        )
    return ClassificationSet(config, labeled.texts, labeled.labels, digest=labeled.digest)


class LabeledTexts(NamedTuple):
    """The labeled texts of a file.

    Attributes:
        texts: The texts.
        labels: The label of each as an index into `names`, int64 [N].
        digest: SHA-256 of the file.
        names: Names of the labels, sorted.
    """

    texts: list[str]
    labels: np.ndarray
    digest: str
    names: Sequence[str]


def _read_labeled_texts(path: str, split: str, cache: Path) -> LabeledTexts:
    """Read labeled texts. Leave out those whose label means "unlabeled" (`find_unlabeled`).

    Raises:
        UserError: There are fewer than two labels.
    """
    check_sklearn_installed()
    rows = IndexedRows(open_container(name_split(path, split)), ROW_SCHEMAS["labels"], cache)
    labels = np.array(rows.index_values, np.int64)
    unlabeled_index = find_unlabeled(rows.label_names)
    indices = np.flatnonzero(labels != unlabeled_index) if unlabeled_index is not None else np.arange(len(rows))
    distinct_labels = np.unique(labels[indices])
    if len(distinct_labels) < 2:
        label = rows.label_names[distinct_labels[0]]
        raise UserError(f"{path}: all {len(indices):,} texts have one label, {label!r} (expected two labels or more)")
    return LabeledTexts([rows[int(i)]["text"] for i in indices], labels[indices], rows.digest, rows.label_names)


def score_set(held_out: HeldOutSet, encode: Encode) -> SetScores:
    """Encode the texts of a set, and score their vectors."""
    return held_out.score([encode(text_input.texts, text_input.instruction) for text_input in held_out.inputs])


def select_training_scores(held_out: HeldOutSet, result: SetScores) -> dict[str, float]:
    """Return the scores of a set that are logged during training, by SET/METRIC."""
    return {f"{held_out.config.name}/{metric}": result.scores[metric] for metric in held_out.training_metrics}


def score_sets(sets: Sequence[HeldOutSet], encode: Encode) -> dict[str, float]:
    """Return the scores of every set that are logged during training, by SET/METRIC."""
    scores: dict[str, float] = {}
    for held_out in sets:
        scores |= select_training_scores(held_out, score_set(held_out, encode))
    return scores
