"""Describe the coverage of training data: rank, clusters and languages of sources, and their distance to each other.

All numbers are computed from the vectors of a sample of queries, evenly spread over the rows of each source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxembed.config import DataConfig
from jaxembed.config.curation import LanguageStepConfig
from jaxembed.curation.mining import embed_texts
from jaxembed.curation.steps.languages import open_identifier
from jaxembed.data.batch import EncoderInput
from jaxembed.data.sources import open_sources
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import FrozenEncoder
from jaxembed.search.clustering import cluster_vectors
from jaxembed.search.nearest import search

MAX_CLUSTER_TEXTS, MAX_CLUSTER_TEXT_CHARS = 3, 200  # texts that are shown of a cluster
# Minimum shares of near texts. Two samples of equal size from one distribution have a share of about one half;
# outliers of a target, which have no near neighbors, give unrelated sources up to 0.1.
MIN_IN_DOMAIN_SHARE, MIN_RELATED_SHARE = 0.25, 0.15
UNKNOWN_LANGUAGE = "uncertain"


class InsightOptions(NamedTuple):
    """Options of the description.

    Attributes:
        max_texts: Maximum number of queries of each source and evaluation set.
        clusters: Number of clusters of all sources together.
        seed: Seed of the clusters.
    """

    max_texts: int = 2000
    clusters: int = 20
    seed: int = 0


class TextSample(NamedTuple):
    """A sample of the queries of a source or evaluation set, with their vectors [N, D]."""

    name: str
    texts: list[str]
    vectors: np.ndarray


def describe_sources(
    data: DataConfig,
    evaluation_sets: Mapping[str, Sequence[str]],
    encoder: FrozenEncoder,
    cache: Path,
    options: InsightOptions,
) -> dict[str, Any]:
    """Describe the queries of sources by their vectors.

    Args:
        data: The sources.
        evaluation_sets: Queries of evaluation sets, by name.
        encoder: The model.
        cache: Folder for the row indexes.
        options: Sample size and clusters.

    Returns:
        "sources": effective rank, coverage and languages of each; "clusters", the largest first; "nearness" of each source to
        each other source, and "evaluation" to each evaluation set.

    Raises:
        UserError: There are fewer texts than clusters, or py3langid is not installed.
    """
    samples = []
    for source in open_sources(data, cache):
        queries = (row["query"] for row in source.iter_pairs(max_texts=1))
        samples.append(embed_sample(source.config.display_name, queries, len(source), encoder, options))
    targets = [embed_sample(name, texts, len(texts), encoder, options) for name, texts in evaluation_sets.items()]
    labels, clusters = describe_clusters(samples, options)
    identify = open_identifier(LanguageStepConfig(pairs="same"))
    sources = [
        {
            "source": sample.name,
            "texts": len(sample.texts),
            "effective_rank": round(compute_effective_rank(sample.vectors), 2),
            **describe_coverage(source_labels, len(clusters)),
            "languages": dict(Counter(identify(text) or UNKNOWN_LANGUAGE for text in sample.texts).most_common()),
        }
        for sample, source_labels in zip(samples, labels, strict=True)
    ]
    return {
        "sources": sources,
        "clusters": clusters,
        "nearness": [describe_nearness(first, second) for first, second in permutations(samples, 2)],
        "evaluation": [describe_nearness(sample, target) for target in targets for sample in samples],
    }


def embed_sample(name: str, texts: Iterable[str], count: int, encoder: FrozenEncoder, options: InsightOptions) -> TextSample:
    """Encode at most `options.max_texts` of `count` texts, evenly spread, as queries."""
    step = max(-(-count // options.max_texts), 1)
    sampled_texts = list(islice(texts, 0, None, step))
    inputs = [EncoderInput(text, "query", "") for text in sampled_texts]
    return TextSample(name, sampled_texts, embed_texts(inputs, encoder.encode, encoder.width, name))


def compute_effective_rank(vectors: Float[np.ndarray, "n d"]) -> float:
    """Return the effective rank of centered vectors: the exponential of the entropy of their normalized singular values.

    It lies between 1 (all on a line) and the width of the vectors (Roy and Vetterli 2007).
    """
    singular_values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    return compute_perplexity(singular_values)


def compute_perplexity(weights: Float[np.ndarray, " n"]) -> float:
    """Return the exponential of the entropy of weights, scaled to sum to 1: the number of equal weights with that entropy."""
    total = weights.sum()
    if total <= 0:
        return 1.0
    shares = weights[weights > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def describe_coverage(labels: np.ndarray, num_clusters: int) -> dict[str, float]:
    """Return the share of clusters that have a text of a source, and the effective number of clusters that it uses."""
    sizes = np.bincount(labels, minlength=num_clusters)
    return {
        "coverage": round(float((sizes > 0).mean()), 4),
        "effective_clusters": round(compute_perplexity(sizes.astype(float)), 2),
    }


def describe_clusters(samples: Sequence[TextSample], options: InsightOptions) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Cluster the texts of all sources. Return the clusters of the texts of each source, and a description of each cluster."""
    texts = [(sample.name, text) for sample in samples for text in sample.texts]
    if len(texts) < options.clusters:
        raise UserError(f"--clusters is {options.clusters}, but the sources have only {len(texts)} texts. Lower it.")
    vectors = np.concatenate([sample.vectors for sample in samples])
    clustering = cluster_vectors(vectors, options.clusters, options.seed)
    descriptions = []
    for number in range(options.clusters):
        members = np.flatnonzero(clustering.labels == number)
        central = members[np.argsort(-clustering.similarities[members], kind="stable")[:MAX_CLUSTER_TEXTS]]
        descriptions.append(
            {
                "texts": len(members),
                "sources": dict(Counter(texts[i][0] for i in members.tolist())),
                "samples": [texts[i][1][:MAX_CLUSTER_TEXT_CHARS] for i in central.tolist()],
            }
        )
    ends = np.cumsum([len(sample.texts) for sample in samples])[:-1]
    return np.split(clustering.labels, ends), descriptions


def describe_nearness(source: TextSample, target: TextSample) -> dict[str, Any]:
    """Return how near the texts of a source are to those of a target.

    A target text counts as near if some text of the source is at least as similar to it as its nearest neighbor in the target
    itself. This needs no threshold that depends on the model.
    """
    target_scores = search(target.vectors, target.vectors, 2).scores[:, -1]  # the first one is the text itself
    source_scores = search(target.vectors, source.vectors, 1).scores[:, 0]
    share = float((source_scores >= target_scores).mean())
    relation = "in-domain" if share >= MIN_IN_DOMAIN_SHARE else "related" if share >= MIN_RELATED_SHARE else "out-of-domain"
    return {
        "source": source.name,
        "target": target.name,
        "near_share": round(share, 4),
        "mean_cosine": round(float(source_scores.mean()), 4),
        "own_mean_cosine": round(float(target_scores.mean()), 4),
        "relation": relation,
    }


def format_tables(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables of a report of `describe_sources`."""
    yield "| source | texts | effective rank | coverage | effective clusters | languages |\n|---|---|---|---|---|---|"
    for row in report["sources"]:
        languages = ", ".join(f"{name} {count}" for name, count in list(row["languages"].items())[:MAX_CLUSTER_TEXTS])
        numbers = f"{row['texts']:,} | {row['effective_rank']} | {row['coverage']} | {row['effective_clusters']}"
        yield f"| {row['source']} | {numbers} | {languages} |"
    yield "\n| source | target | near share | mean cosine | target's own mean cosine | relation |\n|---|---|---|---|---|---|"
    for row in [*report["nearness"], *report["evaluation"]]:
        numbers = f"{row['near_share']} | {row['mean_cosine']} | {row['own_mean_cosine']}"
        yield f"| {row['source']} | {row['target']} | {numbers} | {row['relation']} |"
