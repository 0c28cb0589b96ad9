"""The objectives by name, and their weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import (
    EmbeddingMatchingConfig,
    GradedObjectiveConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    TokenObjectiveConfig,
)
from jaxembed.data.batch import Batch
from jaxembed.losses.distillation import embedding_matching, init_teacher_projection, kl_distillation, margin_mse
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics
from jaxembed.losses.graded import angle, cosent, cosine_regression
from jaxembed.losses.infonce import info_nce, init_temperature
from jaxembed.losses.spread_out import spread_out
from jaxembed.model.layers import l2_normalize

OBJECTIVES: dict[str, Callable[[Any, EncodedBatch], LossAndMetrics]] = {
    "infonce": info_nce,
    "spread_out": spread_out,
    "kl_distillation": kl_distillation,
    "margin_mse": margin_mse,
    "embedding_matching": embedding_matching,
    "cosent": cosent,
    "angle": angle,
    "cosine_regression": cosine_regression,
}
FULL_WIDTH_OBJECTIVES = {"embedding_matching"}  # not applied to Matryoshka widths: the teacher has vectors of one width


@dataclasses.dataclass(frozen=True)
class Objectives:
    """The function that training minimizes: the weighted sum of a config's objectives.

    There are two kinds of objectives. Those of vectors (`OBJECTIVES`) compare the vectors of texts: calling this object sums
    them. Those of tokens (`TokenObjectiveConfig`) predict tokens from hidden states, by `token_prediction_loss`.

    With Matryoshka widths (Kusupati et al. 2022, arXiv:2205.13147), an objective's loss is the loss of the whole vectors plus
    the weighted losses of vectors truncated to each width and normalized again.

    Attributes:
        configs: The sections of the objectives.
        matryoshka: Widths and their weights.
        source_names: Names of the sources, in the order of `Batch.source`.
    """

    configs: Sequence[ObjectiveConfig]
    matryoshka: MatryoshkaConfig = dataclasses.field(default_factory=MatryoshkaConfig)
    source_names: Sequence[str] = ()

    def __call__(
        self,
        queries: Float[Array, "b d"],
        documents: Float[Array, "b m d"],
        batch: Batch,
        key: jax.Array,
        params: Mapping[str, Any],
        shards: int,
    ) -> LossAndMetrics:
        """Compute the sum of all objectives of vectors.

        Args:
            queries: Unit vectors of the queries, [B, D].
            documents: Unit vectors of the documents, positive first, [B, 1+K, D].
            batch: The batch that was encoded.
            key: Random key of the step.
            params: Parameters of the objectives, by label.
            shards: Number of equal, contiguous parts in which the queries are split over devices.

        Returns:
            The sum, and metrics by label: the loss of each objective (LABEL), its own metrics (LABEL_METRIC), and its loss at
            each width (LABEL_WIDTH).
        """
        total: jax.Array = jnp.zeros((), queries.dtype)
        metrics: dict[str, jax.Array] = {}
        for i, (label, config) in enumerate(self.label_configs()):
            if isinstance(config, TokenObjectiveConfig):
                continue
            weights = self._weight_queries(config, batch).astype(queries.dtype)
            encoded = EncodedBatch(
                queries=queries, documents=documents, batch=batch, query_weights=weights, key=jax.random.fold_in(key, i),
                shards=shards, params=params.get(label, {}),
            )  # fmt: skip
            loss, own_metrics = OBJECTIVES[config.name](config, encoded)
            metrics |= {label: loss} | {f"{label}_{name}": value for name, value in own_metrics.items()}
            for width, weight in self._list_widths(config):
                truncated = dataclasses.replace(
                    encoded, queries=_truncate(queries, width), documents=_truncate(documents, width)
                )
                width_loss, _ = OBJECTIVES[config.name](config, truncated)
                metrics[f"{label}_{width}"] = width_loss
                loss = loss + weight * width_loss
            total = total + config.weight * loss
        return total, metrics

    def label_configs(self) -> list[tuple[str, ObjectiveConfig]]:
        """Return each objective with its label: its name, numbered from the second of the same name (infonce, infonce_2)."""
        names = [config.name for config in self.configs]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        return [(f"{name}_{n}" if n > 1 else name, c) for name, n, c in zip(names, counts, self.configs, strict=True)]

    @property
    def token_configs(self) -> dict[str, TokenObjectiveConfig]:
        """The objectives that predict tokens, by label."""
        return {label: config for label, config in self.label_configs() if isinstance(config, TokenObjectiveConfig)}

    def init_params(self, width: int, teacher_width: int, key: jax.Array) -> dict[str, Any]:
        """Draw the parameters that the objectives train, by label. Objectives without parameters are left out.

        Args:
            width: Width of the model's vectors.
            teacher_width: Width of the teacher's vectors.
            key: Random key.
        """
        params = {}
        for i, (label, config) in enumerate(self.label_configs()):
            if isinstance(config, InfoNCEConfig):
                params[label] = init_temperature(config)
            if isinstance(config, EmbeddingMatchingConfig):
                params[label] = init_teacher_projection(width, teacher_width, jax.random.fold_in(key, i))
        return {label: own_params for label, own_params in params.items() if own_params}

    def _weight_queries(self, config: ObjectiveConfig, batch: Batch) -> Float[Array, " b"]:
        """Return each query's weight in the mean [B]: 1/n for the n queries that the objective applies to, 0 for others.

        These are the queries of the objective's sources: for InfoNCE those whose document 0 is a positive, for graded
        objectives those with a score.
        """
        is_counted = jnp.ones(batch.query_slot.shape, bool)
        if config.sources:
            is_counted = jnp.array([name in config.sources for name in self.source_names])[batch.source]
        if isinstance(config, InfoNCEConfig):
            is_counted &= batch.is_positive
        if isinstance(config, GradedObjectiveConfig):
            is_counted &= jnp.isfinite(batch.score)
        return is_counted / jnp.maximum(is_counted.sum(), 1)

    def _list_widths(self, config: ObjectiveConfig) -> list[tuple[int, float]]:
        """Return the Matryoshka widths of an objective with their weights."""
        if config.name in FULL_WIDTH_OBJECTIVES:
            return []
        weights = self.matryoshka.weights or (1.0,) * len(self.matryoshka.dims)
        return list(zip(self.matryoshka.dims, weights, strict=True))


def _truncate(vectors: Float[Array, "*b d"], width: int) -> Float[Array, "*b w"]:
    """Return the first `width` dimensions, scaled to unit length."""
    return l2_normalize(vectors[..., :width])
