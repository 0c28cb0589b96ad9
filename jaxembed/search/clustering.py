"""Cluster unit vectors by spherical k-means (Dhillon and Modha 2001), with an exact search for the nearest center."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxembed.search.nearest import search

DRAWS_PER_CENTER = 4  # candidates for each initial center


class Clustering(NamedTuple):
    """Clusters of N vectors.

    Attributes:
        labels: Cluster of each vector, int64 [N]. Clusters are numbered by size, the largest is 0.
        centers: Unit vectors of the centers, float32 [K, D].
        similarities: Cosine of each vector with its center, float32 [N].
    """

    labels: Int[np.ndarray, " n"]
    centers: Float[np.ndarray, "k d"]
    similarities: Float[np.ndarray, " n"]


def cluster_vectors(vectors: Float[np.ndarray, "n d"], count: int, seed: int, iterations: int = 20) -> Clustering:
    """Cluster unit vectors.

    The initial centers are drawn by k-means++ (Arthur and Vassilvitskii 2007), with a probability that grows with the distance
    from the centers so far. A center that loses all its vectors does not move.

    Args:
        vectors: Unit vectors.
        count: Number of clusters, at most N.
        seed: Seed of the initial centers.
        iterations: Maximum number of iterations. They stop early if no vector changes its cluster.
    """
    centers = _draw_centers(vectors, count, np.random.default_rng(seed))
    labels = np.full(len(vectors), -1)
    for _ in range(iterations):
        nearest = search(vectors, centers, 1).indices[:, 0].astype(np.int64)
        if np.array_equal(labels, nearest):
            break
        labels, sums = nearest, np.zeros_like(centers)
        np.add.at(sums, labels, vectors)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centers)
    # Number the clusters by size.
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    centers, labels = centers[order], np.argsort(order)[labels]
    return Clustering(labels, centers, np.einsum("nd,nd->n", vectors, centers[labels]))


def _draw_centers(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the initial centers, float32 [count, D]. With fewer distinct vectors, some centers are equal."""
    centers = [int(rng.integers(len(vectors)))]
    distances = np.maximum(1 - vectors @ vectors[centers[0]], 0)
    while len(centers) < count:
        total = distances.sum()
        candidates = rng.choice(len(vectors), DRAWS_PER_CENTER, p=distances / total if total > 0 else None)
        # Take the draw after which vectors are nearest to their centers.
        new_distances = np.minimum(distances[:, None], np.maximum(1 - vectors @ vectors[candidates].T, 0))
        best = int(new_distances.sum(0).argmin())
        centers.append(int(candidates[best]))
        distances = new_distances[:, best]
    return vectors[centers].astype(np.float32)
