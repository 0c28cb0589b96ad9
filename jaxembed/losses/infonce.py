"""InfoNCE over the global batch (van den Oord et al. 2018; equation 1 of the survey arXiv:2406.01607) and its relatives."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.config import InfoNCEConfig
from jaxembed.losses.blockwise import EXACT, Anchors, Pairs, Side, log_sum_exp
from jaxembed.losses.encoded import Encoded, Loss
from jaxembed.losses.negatives import FalseNegatives, Texts, texts_of
from jaxembed.model.layers import unit_length

TINY = 1e-12  # a power of zero has no gradient
LEAST_TEMPERATURE = 0.01  # of a learned one, as in CLIP (Radford et al. 2021, section 2.5)


def info_nce(config: InfoNCEConfig, encoded: Encoded) -> Loss:
    """Mean over queries of -log(e^(s+/t) / (e^(s+/t) + sum over negatives of e^(s-/t))), s being the cosine.

    The negatives of a query are its own further documents and, of every direction, texts of other queries: documents to the
    query (`query_document`), queries to its positive (`document_query`), and texts of one kind among themselves. All four in
    one denominator are GTE's loss (equations 2 and 3 of the survey); queries to queries beside the first are SamToNe's
    (arXiv:2306.02516). With `per_direction` each has a loss of its own, and they are averaged.

    Also returns `accuracy`, the share of queries nearer to their positive than to every negative document, and `negatives`,
    how many texts a query met on average. A query without negatives has loss 0 (log 2 in GTE's).
    """
    scale = _scale(config, encoded)
    anchors, others = _sides(encoded)
    positive = anchors["query"].positive
    relative = config.guide_margin_kind == "relative"
    rule = FalseNegatives(config.mask_same_label, config.margin, config.guide is not None, config.guide_margin, relative)
    denominators = [[scale * positive]]
    highest, met = jnp.full_like(positive, -jnp.inf), jnp.zeros_like(positive)
    if config.negatives != "in_batch" and encoded.documents.shape[1] > 1:
        logits, scores, present = _own_negatives(config, encoded, rule, anchors["query"], others["document"].texts, scale)
        denominators[0].append(jax.nn.logsumexp(jnp.where(present, logits, jnp.finfo(logits.dtype).min), axis=-1))
        highest, met = jnp.where(present, scores, -jnp.inf).max(axis=-1), met + present.sum(axis=-1)
    for direction in config.directions if config.negatives != "hard" else ():
        one, other = direction.split("_")
        pairs = Pairs(rule, _hardness(config, "in_batch") if direction == "query_document" else 0.0, encoded.shards)
        lse, top, count = log_sum_exp(pairs, anchors[one], others[other], scale)
        if direction == "document_query":
            # The pair itself is in this sum too: of its own denominator, or once more of the one for all (equation 3).
            denominators += [[]] if config.per_direction else []
            denominators[-1].append(scale * positive)
        denominators[-1].append(lse)
        highest, met = jnp.maximum(highest, top) if direction == "query_document" else highest, met + count
    losses = jnp.stack([functools.reduce(jnp.logaddexp, terms) for terms in denominators]).mean(axis=0) - scale * positive
    if config.focal:
        # (1 - p)^gamma, p being the probability of the positive: KaLM-Embedding-V2, arXiv:2506.20923.
        losses = losses * jnp.maximum(-jnp.expm1(-losses), TINY) ** config.focal
    metrics = {"accuracy": jnp.sum(encoded.share * (positive > highest)), "negatives": jnp.sum(encoded.share * met)}
    if config.learn_temperature:
        metrics["temperature"] = 1 / scale
    return jnp.sum(encoded.share * losses), metrics


def new_params(config: InfoNCEConfig) -> dict[str, Any]:
    """The parameters that the objective trains."""
    return {"log_scale": jnp.array(-math.log(config.temperature), float)} if config.learn_temperature else {}


def _scale(config: InfoNCEConfig, encoded: Encoded) -> jax.Array:
    """What scores are multiplied with: 1/t."""
    if not config.learn_temperature:
        return jnp.array(1 / config.temperature, encoded.queries.dtype)
    return jnp.minimum(jnp.exp(encoded.params["log_scale"]), 1 / LEAST_TEMPERATURE).astype(encoded.queries.dtype)


def _hardness(config: InfoNCEConfig, of: str) -> float:
    return config.hardness if config.hardness_of in (of, "all") else 0.0


def _sides(encoded: Encoded) -> tuple[dict[str, Anchors], dict[str, Side]]:
    """The anchors, [B] queries and their positives, and the others, [B] queries and [B(1+K)] documents."""
    queries, documents = encoded.queries, encoded.documents
    of_queries, of_documents = texts_of(encoded.batch)
    of_positives = jax.tree.map(lambda x: x[:, 0], of_documents).replace(positives=of_queries.positives)
    positive = jnp.sum(queries * documents[:, 0], axis=-1)
    guide = jnp.sum(of_queries.guide * of_positives.guide, axis=-1)
    anchors = {
        "query": Anchors(queries, of_queries, positive, guide),
        "document": Anchors(documents[:, 0], of_positives, positive, guide),
    }
    others = {
        "query": Side(queries, of_queries),
        "document": Side(documents.reshape(-1, documents.shape[-1]), of_documents.reshape(-1)),
    }
    return anchors, others


def _own_negatives(
    config: InfoNCEConfig, encoded: Encoded, rule: FalseNegatives, side: Anchors, documents: Texts, scale: jax.Array
) -> tuple[Float[Array, "b k"], Float[Array, "b k"], Bool[Array, "b k"]]:
    """Logits, scores and presence of each query's own negatives, mixed ones behind them."""
    negatives = encoded.documents[:, 1:]
    scores = jnp.einsum("bd,bkd->bk", side.vectors, negatives, precision=EXACT)
    anchors = side.texts.reshape(-1, 1)
    others = jax.tree.map(lambda x: x[:, 1:], documents.reshape(*encoded.documents.shape[:2]))
    guide = jnp.einsum("bg,bkg->bk", side.texts.guide, others.guide, precision=EXACT)
    false = rule(anchors, others, jax.lax.stop_gradient(scores), guide, side.positive[:, None], side.guide_positive[:, None])
    present = others.present & ~false
    if config.mixed_negatives:
        mixed, of_mixed = _mixed(config.mixed_negatives, negatives, present, encoded.key)
        scores = jnp.concatenate([scores, jnp.einsum("bd,bkd->bk", side.vectors, mixed, precision=EXACT)], axis=1)
        present = jnp.concatenate([present, of_mixed], axis=1)
    # e^(alpha s) times as heavy: EmbeddingGemma, arXiv:2509.20354.
    return scale * scores + _hardness(config, "hard") * jax.lax.stop_gradient(scores), scores, present


def _mixed(count: int, negatives: jax.Array, present: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`count` negatives a query, each a mixture of two of its own, of unit length: KaLM-Embedding-V2, arXiv:2506.20923.

    The weights of the two are drawn from Beta(2, 2); queries with less than two have none.
    """
    of_pair, of_weight = jax.random.split(key)
    # Two different ones of those present: the two highest of random numbers.
    rank = jax.random.uniform(of_pair, (*present.shape[:1], count, present.shape[1]))
    pair = jax.lax.top_k(jnp.where(present[:, None], rank, -1.0), 2)[1]
    first, second = (jnp.take_along_axis(negatives, pair[..., i, None], axis=1) for i in (0, 1))
    weight = jax.random.beta(of_weight, 2.0, 2.0, pair.shape[:2])[..., None].astype(negatives.dtype)
    enough = jnp.broadcast_to((present.sum(axis=1) >= 2)[:, None], pair.shape[:2])
    return unit_length(weight * first + (1 - weight) * second), enough
