"""Scores of labeled texts, as in MTEB: accuracy of a classifier on their vectors, and V-measure of their clusters."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
from jaxtyping import Float, Int

from jaxembed.errors import UserError
from jaxembed.evaluation.bootstrap import count_codes

# Settings of MTEB's classification tasks.
MTEB_SEED = 42
TEXTS_PER_LABEL, NUM_CLASSIFIERS, NUM_FOLDS = 8, 10, 5
MAX_CLASSIFIER_ITERATIONS = 100
# Batch size of MTEB's clustering tasks. The mean over several seeds depends less on the initial centers.
KMEANS_BATCH_SIZE = 500
NUM_CLUSTERINGS = 10


def check_sklearn_installed() -> None:
    """Raise `UserError` if scikit-learn is not installed. It comes with the optional dependencies for evaluation."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("labels: scikit-learn is not installed. Run pip install '.[eval]'.") from None


def classify(
    vectors: Float[np.ndarray, "n d"],
    train_vectors: Float[np.ndarray, "m d"],
    train_labels: Int[np.ndarray, " m"],
) -> np.ndarray:
    """Predict labels by logistic regression on a few texts of each label, as MTEB's classification tasks do.

    Each of `NUM_CLASSIFIERS` classifiers is trained on `TEXTS_PER_LABEL` texts of each label, drawn from the training texts.

    Returns:
        Predicted labels, int64 [N, NUM_CLASSIFIERS].
    """
    order = list(range(len(train_labels)))
    predictions = []
    for _ in range(NUM_CLASSIFIERS):
        training_rows = _draw_training_texts(train_labels, order)
        predictions.append(_fit_and_predict(train_vectors[training_rows], train_labels[training_rows], vectors))
    return np.stack(predictions, axis=1)


def cross_validate(vectors: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> np.ndarray:
    """Predict the labels of each fold by logistic regression on a few texts of each label from the other folds.

    This is what MTEB does for tasks that have one split.

    Returns:
        Predicted labels, int64 [N, 1].
    """
    from sklearn.model_selection import KFold

    order: list[int] = []
    predictions = np.zeros((len(labels), 1), np.int64)
    for train, test in KFold(NUM_FOLDS, shuffle=True, random_state=MTEB_SEED).split(range(len(labels))):
        order = order or list(range(len(train)))
        training_rows = train[_draw_training_texts(labels[train], order)]
        predictions[test, 0] = _fit_and_predict(vectors[training_rows], labels[training_rows], vectors[test])
    return predictions


def _draw_training_texts(labels: np.ndarray, order: list[int]) -> list[int]:
    """Shuffle `order` in place, and return its first `TEXTS_PER_LABEL` texts of each label."""
    np.random.RandomState(MTEB_SEED).shuffle(order)
    counts: Counter[int] = Counter()
    indices = []
    for index in order:
        label = int(labels[index])
        if counts[label] < TEXTS_PER_LABEL:
            indices.append(index)
            counts[label] += 1
    return indices


def _fit_and_predict(train_vectors: np.ndarray, train_labels: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the labels that logistic regression predicts, int64 [N]."""
    from sklearn.linear_model import LogisticRegression

    if len(set(train_labels.tolist())) == 1:  # the other folds may have a single label
        return np.full(len(vectors), train_labels[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MTEB's iteration limit may stop it before it converges
        classifier = LogisticRegression(max_iter=MAX_CLASSIFIER_ITERATIONS, random_state=MTEB_SEED).fit(
            train_vectors, train_labels
        )
    return np.asarray(classifier.predict(vectors), np.int64)


def macro_f1(labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, "n e"]) -> float:
    """Return the macro F1 of each column of predicted labels, averaged over the columns."""
    from sklearn.metrics import f1_score

    return float(np.mean([f1_score(labels, column, average="macro") for column in predictions.T]))


def cluster(vectors: Float[np.ndarray, "n d"], count: int, clusterings: int = NUM_CLUSTERINGS) -> np.ndarray:
    """Cluster vectors by mini-batch k-means with the settings of MTEB's clustering tasks, once for each seed.

    Args:
        vectors: Vectors of N texts.
        count: Number of clusters.
        clusterings: Number of seeds.

    Returns:
        Clusters, int64 [N, clusterings].
    """
    from sklearn.cluster import MiniBatchKMeans

    def fit(seed: int) -> np.ndarray:
        model = MiniBatchKMeans(count, batch_size=KMEANS_BATCH_SIZE, n_init="auto", random_state=seed)
        return np.asarray(model.fit(vectors).labels_, np.int64)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fewer distinct vectors than clusters
        return np.stack([fit(seed) for seed in range(MTEB_SEED, MTEB_SEED + clusterings)], axis=1)


def score_v_measure(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the V-measure of clusters (Rosenberg and Hirschberg 2007), for each resample of the texts.

    Args:
        values: The label of each text, followed by its clusters in several clusterings. The result is the mean over these.
        indices: The texts of each resample.
    """
    labels, *clusterings = values.astype(np.int64).T
    label_entropy = _compute_entropy(labels, indices)
    scores = []
    for clusters in clusterings:
        joint_entropy = _compute_entropy(labels * (clusters.max() + 1) + clusters, indices)
        scores.append(_compute_v_measure(label_entropy + _compute_entropy(clusters, indices), joint_entropy))
    return np.mean(scores, axis=0)


def score_sampled_v_measure(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the mean V-measure of several clusterings, each of a sample of the texts, for each resample of the texts.

    Args:
        values: For each clustering: the label of each text, its cluster, and how often the sample has it.
        indices: The texts of each resample.
    """
    scores = []
    for labels, clusters, counts in values.astype(np.int64).T.reshape(-1, 3, len(values)):
        joint_entropy = _compute_entropy(labels * (clusters.max() + 1) + clusters, indices, counts)
        entropy_sum = _compute_entropy(labels, indices, counts) + _compute_entropy(clusters, indices, counts)
        scores.append(_compute_v_measure(entropy_sum, joint_entropy))
    return np.mean(scores, axis=0)


def _compute_v_measure(entropy_sum: np.ndarray, joint_entropy: np.ndarray) -> np.ndarray:
    """Return 2 - 2 H(labels, clusters) / (H(labels) + H(clusters)), float64 [R], and 1 where the sum is 0.

    This equals the harmonic mean of homogeneity and completeness.
    """
    with np.errstate(invalid="ignore"):
        return np.where(entropy_sum > 0, 2 - 2 * joint_entropy / entropy_sum, 1.0)


def _compute_entropy(codes: np.ndarray, indices: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the entropy in nats of the codes in each resample, float64 [R].

    Args:
        codes: Number of each item, such as its label or its cluster, int64 [N].
        indices: The items of each resample, int64 [R, N].
        weights: Weight of each item, [N]. Default: all weights are equal.
    """
    from scipy.special import xlogy

    distinct_codes, numbers = np.unique(codes, return_inverse=True)
    counts = count_codes(numbers, indices, len(distinct_codes), weights)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.asarray(-xlogy(shares, shares).sum(axis=1))
