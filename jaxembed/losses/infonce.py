"""InfoNCE and its variants over the global batch.

Sources: van den Oord et al. 2018 (arXiv:1807.03748), and equation 1 of the survey arXiv:2406.01607.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.config import InfoNCEConfig
from jaxembed.losses.blockwise import HIGHEST_PRECISION, AnchorVectors, PairRules, TextVectors, log_sum_exp
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics
from jaxembed.losses.negatives import FalseNegativeRule, TextInfo, collect_text_info
from jaxembed.model.layers import l2_normalize

MIN_FOCAL_BASE = 1e-12  # the gradient of x^gamma is infinite at x = 0 for gamma below 1
MIN_LEARNED_TEMPERATURE = 0.01  # as in CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.5)


def info_nce(config: InfoNCEConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the mean over queries of -log(e^(s+/t) / (e^(s+/t) + sum over negatives of e^(s-/t))), with cosines s.

    The negatives of a query are its own further documents and, in every direction of `config.directions`, texts of other
    queries:

    - `query_document`: documents of others, compared with the query,
    - `document_query`: other queries, compared with the positive,
    - `query_query`: other queries, compared with the query,
    - `document_document`: documents of others, compared with the positive.

    All four in one denominator are GTE's loss (equations 2 and 3 of the survey). `query_document` with `query_query` is SamToNe
    (arXiv:2306.02516). With `per_direction`, the directions of the query and those of the positive have separate denominators,
    and the two losses are averaged; all four are UAE's in-batch objective (arXiv:2309.12871). A query without negatives has
    loss 0 (log 2 in GTE's loss, which counts the positive twice).

    Returns:
        The loss and metrics: `accuracy`, the fraction of queries closer to their positive than to any negative document;
        `negatives`, the mean number of negatives per query; and `temperature`, if it is learned.
    """
    scale = _compute_scale(config, encoded)
    anchors, candidates = _collect_texts(encoded)
    positive = anchors["query"].positive_scores
    rule = FalseNegativeRule(
        mask_same_label=config.mask_same_label, margin=config.margin, is_guided=config.guide is not None,
        guide_margin=config.guide_margin, is_guide_margin_relative=config.guide_margin_kind == "relative",
    )  # fmt: skip
    # A denominator is a list of the logarithms of its terms, [B] each. The first one holds the positive, the query's own
    # negatives and all directions. With `per_direction`, a second one holds the directions of the positive instead.
    denominators = [[scale * positive], []] if config.per_direction else [[scale * positive]]
    max_negative, count = jnp.full_like(positive, -jnp.inf), jnp.zeros_like(positive)

    # Stage 1: the query's own negatives.
    if config.negatives != "in_batch" and encoded.documents.shape[1] > 1:
        logits, scores, is_present = _score_own_negatives(
            config, encoded, rule, anchors["query"], candidates["document"].info, scale
        )
        denominators[0].append(jax.nn.logsumexp(jnp.where(is_present, logits, jnp.finfo(logits.dtype).min), axis=-1))
        max_negative, count = jnp.where(is_present, scores, -jnp.inf).max(axis=-1), count + is_present.sum(axis=-1)

    # Stage 2: texts of other queries, direction by direction.
    for direction in config.directions if config.negatives != "hard" else ():
        anchor_kind, candidate_kind = direction.split("_")
        hardness = _get_hardness(config, "in_batch") if direction == "query_document" else 0.0
        rules = PairRules(rule, hardness, encoded.shards)
        lse, max_score, negatives = log_sum_exp(rules, anchors[anchor_kind], candidates[candidate_kind], scale)
        if direction == "document_query":
            # The positive pair is a term of this direction too: in a shared denominator a second time (equation 3 of the
            # survey).
            denominators[-1].append(scale * positive)
        denominators[0 if anchor_kind == "query" else -1].append(lse)
        if direction == "query_document":
            max_negative = jnp.maximum(max_negative, max_score)
        count = count + negatives

    # Stage 3: log(denominator) - s+/t, averaged over denominators.
    losses = jnp.stack([functools.reduce(jnp.logaddexp, terms) for terms in denominators]).mean(axis=0) - scale * positive
    if config.focal:
        # Focal weight (1 - p)^gamma with the probability p = e^-loss of the positive (KaLM-Embedding-V2, arXiv:2506.20923).
        losses = losses * jnp.maximum(-jnp.expm1(-losses), MIN_FOCAL_BASE) ** config.focal
    weights = encoded.query_weights
    metrics = {"accuracy": jnp.sum(weights * (positive > max_negative)), "negatives": jnp.sum(weights * count)}
    if config.learn_temperature:
        metrics["temperature"] = 1 / scale
    return jnp.sum(weights * losses), metrics


def init_temperature(config: InfoNCEConfig) -> dict[str, Any]:
    """Return the parameters of the objective: `log_scale` = -log(temperature) if it is learned."""
    return {"log_scale": jnp.array(-math.log(config.temperature), float)} if config.learn_temperature else {}


def _compute_scale(config: InfoNCEConfig, encoded: EncodedBatch) -> jax.Array:
    """Return the factor of scores, 1 / temperature, as a scalar in the dtype of the vectors."""
    if not config.learn_temperature:
        return jnp.array(1 / config.temperature, encoded.queries.dtype)
    return jnp.minimum(jnp.exp(encoded.params["log_scale"]), 1 / MIN_LEARNED_TEMPERATURE).astype(encoded.queries.dtype)


def _get_hardness(config: InfoNCEConfig, kind: str) -> float:
    """Return the hardness of negatives of a kind: "hard" or "in_batch"."""
    return config.hardness if config.hardness_of in (kind, "all") else 0.0


def _collect_texts(encoded: EncodedBatch) -> tuple[dict[str, AnchorVectors], dict[str, TextVectors]]:
    """Return the anchors and the candidates by kind.

    Anchors are the queries [B] ("query") and their positives [B] ("document"). Candidates are the queries [B] ("query") and
    all documents [B * (1+K)] ("document").
    """
    queries, documents = encoded.queries, encoded.documents
    query_info, document_info = collect_text_info(encoded.batch)
    positive_info = jax.tree.map(lambda x: x[:, 0], document_info).replace(positive_hashes=query_info.positive_hashes)
    positive_scores = jnp.sum(queries * documents[:, 0], axis=-1)
    guide_positive_scores = jnp.sum(query_info.guide * positive_info.guide, axis=-1)
    anchors = {
        "query": AnchorVectors(queries, query_info, positive_scores, guide_positive_scores),
        "document": AnchorVectors(documents[:, 0], positive_info, positive_scores, guide_positive_scores),
    }
    candidates = {
        "query": TextVectors(queries, query_info),
        "document": TextVectors(documents.reshape(-1, documents.shape[-1]), document_info.reshape(-1)),
    }
    return anchors, candidates


def _score_own_negatives(
    config: InfoNCEConfig,
    encoded: EncodedBatch,
    rule: FalseNegativeRule,
    queries: AnchorVectors,
    documents: TextInfo,
    scale: jax.Array,
) -> tuple[Float[Array, "b km"], Float[Array, "b km"], Bool[Array, "b km"]]:
    """Return logits, scores and presence, [B, KM] = [B, K + M], of each query's K own negatives and then its M mixed ones."""
    # Score the K negatives of each query, and find those that are probably positives.
    negatives = encoded.documents[:, 1:]
    scores = jnp.einsum("bd,bkd->bk", queries.vectors, negatives, precision=HIGHEST_PRECISION)
    anchor_info = queries.info.reshape(-1, 1)
    negative_info = jax.tree.map(lambda x: x[:, 1:], documents.reshape(*encoded.documents.shape[:2]))
    guide_scores = jnp.einsum("bg,bkg->bk", queries.info.guide, negative_info.guide, precision=HIGHEST_PRECISION)
    is_false_negative = rule(
        anchor_info, negative_info, jax.lax.stop_gradient(scores), guide_scores,
        queries.positive_scores[:, None], queries.guide_positive_scores[:, None],
    )  # fmt: skip
    is_present = negative_info.is_present & ~is_false_negative
    # Append the mixed negatives.
    if config.mixed_negatives:
        mixed, mixed_presence = _mix_negatives(config.mixed_negatives, negatives, is_present, encoded.key)
        mixed_scores = jnp.einsum("bd,bkd->bk", queries.vectors, mixed, precision=HIGHEST_PRECISION)
        scores = jnp.concatenate([scores, mixed_scores], axis=1)
        is_present = jnp.concatenate([is_present, mixed_presence], axis=1)
    # Multiply a negative's term by e^(hardness * s), without gradient through that weight (EmbeddingGemma, arXiv:2509.20354).
    return scale * scores + _get_hardness(config, "hard") * jax.lax.stop_gradient(scores), scores, is_present


def _mix_negatives(count: int, negatives: jax.Array, is_present: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mix `count` new negatives of unit length per query, each from two of its own negatives (KaLM-Embedding-V2).

    The mixing weight is drawn from Beta(2, 2) (arXiv:2506.20923). Queries with fewer than two negatives have none.

    Returns:
        The vectors [B, count, D] and their presence [B, count].
    """
    pair_key, weight_key = jax.random.split(key)
    # Draw two different present negatives: those with the two largest random numbers.
    random_ranks = jax.random.uniform(pair_key, (*is_present.shape[:1], count, is_present.shape[1]))
    pair = jax.lax.top_k(jnp.where(is_present[:, None], random_ranks, -1.0), 2)[1]
    first, second = (jnp.take_along_axis(negatives, pair[..., i, None], axis=1) for i in (0, 1))
    weight = jax.random.beta(weight_key, 2.0, 2.0, pair.shape[:2])[..., None].astype(negatives.dtype)
    has_two = jnp.broadcast_to((is_present.sum(axis=1) >= 2)[:, None], pair.shape[:2])
    return l2_normalize(weight * first + (1 - weight) * second), has_two
