"""Read the results of MTEB tasks by item, from the predictions that mteb stores and the labels in the task's data."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxembed.errors import UserError, summarize
from jaxembed.evaluation.bootstrap import (
    ScoredItems,
    score_average_precision,
    score_equal_share,
    score_mean,
    score_spearman,
    score_weighted_f1,
)
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.labels import score_sampled_v_measure, score_v_measure
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.files import exists, read_json

if TYPE_CHECKING:
    from jaxembed.evaluation.mteb_tasks import MtebTask

MAX_DEVIATION = 1e-3  # largest difference between the score of the items and mteb's
RANKED_METRIC = re.compile(r"(ndcg|map|recall|precision)_at_(\d+)")
TREC_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}  # names in pytrec_eval
NO_ITEMS_REASON = "mteb gives no results by item for tasks of this kind"

Split = Any  # a split's data as mteb loads it


def score_task_items(task: MtebTask, encoder: TaskEncoder) -> ItemScores:
    """Return the scores of a model on an mteb task with the items that they are computed from.

    The predictions are stored next to the results, or in a temporary folder if results are not stored. A task whose result was
    stored without predictions is scored again.
    """
    with contextlib.ExitStack() as stack:
        if task.cache_folder:
            name = "-".join([encoder.results_revision, *map(str, encoder.widths[:1]), *encoder.precisions[:1]])
            folder = task.cache_folder.parent / "predictions" / name
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        summary = dataclasses.replace(task, prediction_folder=folder).score(encoder)
        with load_data(task.task):
            parts, missing_reason = read_items(task.task, folder, summary["score"])
    return ItemScores(summary, parts, missing_reason)


def explain_failed_download(task: Any, error: ConnectionError) -> UserError:
    """Return the error for a task whose data cannot be downloaded."""
    name, reason = task.metadata.name, summarize(error)
    return UserError(f"{name}: cannot download its data ({reason}). Connect to the network, or download it beforehand.")


@contextlib.contextmanager
def load_data(task: Any) -> Iterator[None]:
    """Load the data of an mteb task for the block. Data that was already loaded stays loaded.

    Raises:
        UserError: The data cannot be downloaded.
    """
    was_loaded = task.data_loaded
    if not was_loaded:
        try:
            task.load_data()
        except ConnectionError as error:
            raise explain_failed_download(task, error) from None
    try:
        yield
    finally:
        if not was_loaded:
            task.unload_data()


class NoItemsError(Exception):
    """Raised for a task whose score cannot be computed from stored predictions."""


def read_items(task: Any, folder: Path, score: float | None) -> tuple[list[ScoredItems], str]:
    """Return the items of a task's main score, part by part, from the predictions in a folder.

    Args:
        task: The mteb task, with its data loaded.
        folder: Folder of mteb's predictions.
        score: mteb's main score. The items must reproduce it.

    Returns:
        The items of each subset and split, and an empty string; or no items, and the reason.
    """
    path = folder / task.prediction_file_name
    if not exists(path):
        return [], NO_ITEMS_REASON
    predictions = {key: value for key, value in read_json(path).items() if key != "mteb_model_meta"}
    reset_random_state(task)  # so that the same samples of documents are drawn as by mteb
    try:
        parts = [
            part
            for subset, split, split_predictions in _iter_splits(task, predictions)
            for part in _build_items(task, subset, split, split_predictions)
        ]
    except NoItemsError as error:
        return [], str(error)
    item_score = float(np.mean([part.score for part in parts])) if parts else float("nan")
    if score is None or not abs(item_score - score) <= MAX_DEVIATION:
        return [], f"results by item give {item_score:.4f}, not the score of mteb"
    return parts, ""


def reset_random_state(task: Any) -> None:
    """Reset the random state of an mteb task, so that it draws the same samples as a new task."""
    for member in (task, *getattr(task, "taskname_to_task", {}).values()):
        member.rng_state, member.np_rng = random.Random(member.seed), np.random.default_rng(member.seed)


def _iter_splits(task: Any, predictions: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Yield the subsets and splits in the order in which mteb scores them, with their predictions."""
    for split in task.eval_splits:
        for subset, split_predictions in predictions.items():
            if split in split_predictions:
                yield subset, split, split_predictions[split]


def _build_items(task: Any, subset: str, split: str, predictions: Any) -> list[ScoredItems]:
    """Return the items of a split."""
    from mteb import abstasks
    from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining
    from mteb.abstasks.text.summarization import AbsTaskSummarization

    builders: dict[Any, Callable[[Any, Split, Any], list[ScoredItems]]] = {
        abstasks.AbsTaskRetrieval: _build_retrieval,
        abstasks.AbsTaskSTS: _build_sts,
        abstasks.AbsTaskClassification: _build_classification,
        abstasks.AbsTaskPairClassification: _build_pair_classification,
        abstasks.AbsTaskClusteringLegacy: _build_clustering,
        abstasks.AbsTaskClustering: _build_sampled_clustering,
        AbsTaskBitextMining: _build_bitext_mining,
        AbsTaskSummarization: _build_summarization,
    }
    build = next((builder for kind, builder in builders.items() if isinstance(task, kind)), None)
    if build is None:
        raise NoItemsError(NO_ITEMS_REASON)
    return build(task, get_split(task, subset, split), predictions)


def get_split(task: Any, subset: str, split: str) -> Split:
    """Return the data of a subset's split of an mteb task."""
    return task.dataset.get(subset, task.dataset)[split]


def _build_retrieval(task: Any, split: Split, predictions: Mapping[str, Mapping[str, float]]) -> list[ScoredItems]:
    """Return the queries, each with its value of the main score. Predictions are the scores of documents by query."""
    match = RANKED_METRIC.fullmatch(task.metadata.main_score)
    if match is None or task.skip_first_result or task.ignore_identical_ids:
        raise NoItemsError(f"results by item are not known for {task.metadata.main_score} of this task")
    import pytrec_eval

    name, cutoff = TREC_NAMES[match[1]], match[2]
    relevant = {
        query: {document: int(grade) for document, grade in grades.items()} for query, grades in split["relevant_docs"].items()
    }
    scores = pytrec_eval.RelevanceEvaluator(relevant, {f"{name}.{cutoff}"}).evaluate(predictions)
    values = [scores[query][f"{name}_{cutoff}"] for query in sorted(scores)]
    return [ScoredItems(np.array(values)[:, None], score_mean, "queries")]


def _build_sts(task: Any, split: Split, predictions: Mapping[str, Sequence[float]]) -> list[ScoredItems]:
    similarities = predictions["cosine_scores" if task.metadata.main_score.startswith("cosine") else "similarity_scores"]
    return [ScoredItems(np.array([similarities, split["score"]], np.float64).T, score_spearman, "pairs")]


def _build_classification(task: Any, split: Split, predictions: Sequence[Sequence[Any]]) -> list[ScoredItems]:
    """Return the texts, each with the share of the classifiers that predict its label."""
    labels = list(split[task.label_column_name])
    if task.metadata.main_score != "accuracy" or task.is_cross_validation:
        raise NoItemsError(f"{task.metadata.main_score} of this task is not a mean over texts")
    hits = [[a == b for a, b in zip(labels, predicted_labels, strict=True)] for predicted_labels in predictions]
    shares = np.mean(hits, axis=0)
    return [ScoredItems(shares[:, None], score_mean, "texts")]


def _build_pair_classification(task: Any, split: Split, predictions: Mapping[str, Sequence[float]]) -> list[ScoredItems]:
    if not task.metadata.main_score.endswith("_ap"):
        raise NoItemsError(f"results by item are not known for {task.metadata.main_score}")
    labels = split[task.label_column_name]
    labels = labels[0] if len(labels) == 1 else labels  # all pairs in one row, as in earlier versions of mteb
    values = np.array([predictions["cosine_scores"], labels], np.float64).T
    return [ScoredItems(values, score_average_precision, "pairs")]


def _build_clustering(task: Any, split: Split, predictions: Sequence[Sequence[int]]) -> list[ScoredItems]:
    """Return the texts of each clustering, each with its label and its cluster."""
    parts = []
    for labels, clusters in zip(split[task.label_column_name], predictions, strict=True):
        label_numbers = np.unique(labels, return_inverse=True)[1]
        parts.append(ScoredItems(np.column_stack([label_numbers, clusters]).astype(np.float64), score_v_measure, "texts"))
    return parts


def _build_sampled_clustering(task: Any, split: Split, predictions: Mapping[str, Sequence[Sequence[int]]]) -> list[ScoredItems]:
    """Return the texts of a task that clusters samples of them, at each level of the labels. An item is a text.

    mteb stores the clusters but not the samples. They are drawn again, in the order in which mteb draws them.
    """
    rows = (
        task.rng_state.sample(range(len(split)), k=size)
        if (size := _count_drawn_texts(task, len(split)))
        else range(len(split))
    )
    all_labels = split[task.label_column_name]
    labels = [label if isinstance(label, list) else [label] for label in (all_labels[row] for row in rows)]
    columns: list[np.ndarray] = []
    for level, clusterings in enumerate(predictions.values()):
        level_labels = np.array([label[level] if len(label) > level else -1 for label in labels])
        texts = np.flatnonzero([label != -1 for label in level_labels])
        label_numbers = np.unique(level_labels, return_inverse=True)[1]
        for clusters in clusterings:
            drawn_texts = texts[task.rng_state.choices(range(len(texts)), k=task.max_documents_per_cluster)]
            cluster_by_text = np.zeros(len(labels), np.int64)
            cluster_by_text[drawn_texts] = clusters
            columns += [label_numbers, cluster_by_text, np.bincount(drawn_texts, minlength=len(labels))]
    return [ScoredItems(np.column_stack(columns).astype(np.float64), score_sampled_v_measure, "texts")]


def _count_drawn_texts(task: Any, count: int) -> int:
    """Return how many of a split's `count` texts an mteb task draws and clusters. 0: all of them, in their order."""
    if task.max_fraction_of_documents_to_embed is not None:
        return min(count, int(task.max_fraction_of_documents_to_embed * count))
    return min(count, task.max_document_to_embed or 0)


def _build_bitext_mining(
    task: Any, split: Split, predictions: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[ScoredItems]:
    """Return the texts of each pair of languages, each with its translation and the text that was found."""
    statistic = {"f1": score_weighted_f1, "accuracy": score_equal_share}.get(task.metadata.main_score)
    if statistic is None:
        raise NoItemsError(f"results by item are not known for {task.metadata.main_score}")
    parts = []
    for neighbors in predictions.values():
        gold = [target for _, target in split["gold"]] if "gold" in split else range(len(neighbors))
        values = np.array([gold, [neighbor["corpus_id"] for neighbor in neighbors]], np.float64).T
        parts.append(ScoredItems(values, statistic, "texts"))
    return parts


def _build_summarization(task: Any, split: Split, predictions: Mapping[str, Sequence[Sequence[float]]]) -> list[ScoredItems]:
    """Return the texts, each with the correlation of its summaries' similarities and ratings."""
    from scipy import stats

    kind, _, correlation = task.metadata.main_score.partition("_")
    correlate = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}.get(correlation)
    if correlate is None:
        raise NoItemsError(f"results by item are not known for {task.metadata.main_score}")
    if len(predictions["human_scores"]) < sum(len(set(ratings)) > 1 for ratings in split[task.relevancy_column_name]):
        raise NoItemsError("mteb left out texts all of whose summaries are equally similar")
    pairs = zip(predictions["human_scores"], predictions[f"{kind}_scores"], strict=True)
    values = [float(correlate(ratings, similarities).statistic) for ratings, similarities in pairs]
    return [ScoredItems(np.array(values)[:, None], score_mean, "texts")]
