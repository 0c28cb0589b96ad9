"""The objectives by name, and their weighted sum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import (
    EmbeddingMatchingConfig,
    ExitsConfig,
    GradedObjectiveConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    QuantizationConfig,
    TokenObjectiveConfig,
)
from jaxembed.data.batch import Batch
from jaxembed.losses.distillation import embedding_matching, init_teacher_projection, kl_distillation, margin_mse
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics
from jaxembed.losses.exits import align_exits
from jaxembed.losses.graded import angle, cosent, cosine_regression
from jaxembed.losses.infonce import info_nce, init_temperature
from jaxembed.losses.quantized import quantize_straight_through
from jaxembed.losses.spread_out import spread_out
from jaxembed.model.layers import l2_normalize

VECTOR_OBJECTIVES: dict[str, Callable[[Any, EncodedBatch], LossAndMetrics]] = {
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

    There are two kinds of objectives. Vector objectives (`VECTOR_OBJECTIVES`) compare the vectors of texts: calling this object
    sums them. Token objectives (`TokenObjectiveConfig`) predict tokens from hidden states (`token_prediction_loss`).

    With Matryoshka widths (Kusupati et al. 2022, arXiv:2205.13147), an objective's loss is the loss of the whole vectors plus
    the weighted losses of vectors truncated to each width and normalized again. With early exits, the sum is that of the whole
    model plus the weighted sums of the vectors of each exit (`sum_over_exits`). Quantized vectors are treated like a width.

    Attributes:
        configs: The sections of the objectives.
        matryoshka: Widths and their weights.
        source_names: Names of the sources, in the order of `Batch.source`.
        exits: Early exits and their weights.
        quantization: Precisions and their weights.
        ranges: Lowest and highest value of each dimension, [2][D], for int8.
    """

    configs: Sequence[ObjectiveConfig]
    matryoshka: MatryoshkaConfig = dataclasses.field(default_factory=MatryoshkaConfig)
    source_names: Sequence[str] = ()
    exits: ExitsConfig = dataclasses.field(default_factory=ExitsConfig)
    quantization: QuantizationConfig = dataclasses.field(default_factory=QuantizationConfig)
    ranges: Sequence[Sequence[float]] = ()

    def __call__(
        self,
        queries: Float[Array, "b d"],
        documents: Float[Array, "b m d"],
        batch: Batch,
        key: jax.Array,
        params: Mapping[str, Any],
        shards: int,
    ) -> LossAndMetrics:
        """Compute the sum of all vector objectives.

        Args:
            queries: Unit vectors of the queries, [B, D].
            documents: Unit vectors of the documents, positive first, [B, 1+K, D].
            batch: The batch that was encoded.
            key: Random key of the step.
            params: Parameters of the objectives, by label.
            shards: Number of equal, contiguous parts into which the queries are split over devices.

        Returns:
            The sum, and metrics by label: the loss of each objective (LABEL), its own metrics (LABEL_METRIC), and its loss at
            each width (LABEL_WIDTH) and precision (LABEL_PRECISION).
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
            loss, own_metrics = VECTOR_OBJECTIVES[config.name](config, encoded)
            metrics |= {label: loss} | {f"{label}_{name}": value for name, value in own_metrics.items()}
            # Add the same loss of truncated or quantized vectors.
            for version, weight, convert in self._list_versions(config):
                converted = dataclasses.replace(encoded, queries=convert(queries), documents=convert(documents))
                version_loss, _ = VECTOR_OBJECTIVES[config.name](config, converted)
                metrics[f"{label}_{version}"] = version_loss
                loss = loss + weight * version_loss
            total = total + config.weight * loss
        return total, metrics

    def sum_over_exits(
        self, vectors: Float[Array, "b m x d"], batch: Batch, key: jax.Array, params: Mapping[str, Any], shards: int
    ) -> LossAndMetrics:
        """Compute the sum of all objectives for the whole model and its exits, and the alignment of the exits.

        Equations 7 to 11 of the survey arXiv:2406.01607 (2DMSE) are this sum with one random layer. All exits share the
        parameters of the objectives, and their random key.

        Args:
            vectors: Unit vectors of each query and its documents, from the whole model first, then from the E exits.
            batch: The batch that was encoded.
            key: Random key of the step.
            params: Parameters of the objectives, by label.
            shards: Number of equal, contiguous parts into which the queries are split over devices.

        Returns:
            The sum, and the metrics of the whole model; the sums of the exits (exit_LAYERS, exit_random, exit_random_2 and so
            on), and `exit_align`.
        """

        def sum_objectives(x: int) -> LossAndMetrics:
            return self(vectors[:, 0, x], vectors[:, 1:, x], batch, key, params, shards)

        total, metrics = sum_objectives(0)
        names = [f"exit_{layers}" for layers in self.exits.layers]
        names += [f"exit_random_{n}" if n > 1 else "exit_random" for n in range(1, self.exits.random + 1)]
        for x, (name, weight) in enumerate(zip(names, self.exits.all_weights, strict=True), start=1):
            metrics[name], _ = sum_objectives(x)
            total = total + weight * metrics[name]
        if self.exits.align:
            is_present = jnp.concatenate([jnp.ones_like(batch.doc_slot[:, :1], bool), batch.doc_slot >= 0], axis=1)
            metrics["exit_align"] = jnp.sum(align_exits(vectors, is_present, self.exits.align_temperature))
            total = total + self.exits.align * metrics["exit_align"]
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
        """Initialize the trained parameters of the objectives, by label. Objectives without parameters are left out.

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

    def _list_versions(self, config: ObjectiveConfig) -> list[tuple[str, float, Callable[[jax.Array], jax.Array]]]:
        """Return the converted versions of the vectors that an objective also applies to: name, weight, and conversion.

        These are the vectors at the Matryoshka widths, and the quantized vectors.
        """
        if config.name in FULL_WIDTH_OBJECTIVES:
            return []
        dims, precisions = self.matryoshka.dims, self.quantization.precisions
        conversions: dict[str, Callable[[jax.Array], jax.Array]] = {}
        conversions |= {str(width): functools.partial(_truncate, width=width) for width in dims}
        conversions |= {
            precision: functools.partial(quantize_straight_through, precision=precision, ranges=self.ranges)
            for precision in precisions
        }
        weights = (
            *(self.matryoshka.weights or (1.0,) * len(dims)),
            *(self.quantization.weights or (1.0,) * len(precisions)),
        )
        return [(name, weight, convert) for (name, convert), weight in zip(conversions.items(), weights, strict=True)]


def _truncate(vectors: Float[Array, "*b d"], width: int) -> Float[Array, "*b w"]:
    """Return the first `width` dimensions, normalized."""
    return l2_normalize(vectors[..., :width])
