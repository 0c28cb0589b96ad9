"""The objectives by name, and their weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import EmbeddingMatchingConfig, InfoNCEConfig, MatryoshkaConfig, ObjectiveConfig
from jaxembed.data.batch import Batch
from jaxembed.losses import distillation, infonce
from jaxembed.losses.distillation import embedding_matching, kl_distillation, margin_mse
from jaxembed.losses.encoded import Encoded, Loss
from jaxembed.losses.infonce import info_nce
from jaxembed.losses.spread_out import spread_out
from jaxembed.model.layers import unit_length

OBJECTIVES: dict[str, Callable[[Any, Encoded], Loss]] = {
    "infonce": info_nce,
    "spread_out": spread_out,
    "kl_distillation": kl_distillation,
    "margin_mse": margin_mse,
    "embedding_matching": embedding_matching,
}
WHOLE_ALONE = {"embedding_matching"}  # objectives that have no meaning for the first dimensions of a vector


@dataclasses.dataclass(frozen=True)
class Objectives:
    """What a step minimises: the weighted sum of a config's objectives. `source_names` are those of a batch's sources.

    With Matryoshka widths (Kusupati et al. 2022) each objective's loss is that of the whole vectors plus the weighted losses
    of their first dimensions, of unit length again.
    """

    chosen: Sequence[ObjectiveConfig]
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
    ) -> Loss:
        """The sum, and its parts by label: each objective's loss, what it tells of itself, and LABEL_WIDTH of a width.

        The queries are split over so many shards, in order; `params` are the objectives' own, by label.
        """
        total: jax.Array = jnp.zeros((), queries.dtype)
        parts: dict[str, jax.Array] = {}
        for i, (label, objective) in enumerate(self.labelled()):
            share = self._share(objective, batch).astype(queries.dtype)
            whole = Encoded(queries, documents, batch, share, jax.random.fold_in(key, i), shards, params.get(label, {}))
            loss, told = OBJECTIVES[objective.name](objective, whole)
            parts |= {label: loss} | {f"{label}_{name}": value for name, value in told.items()}
            for width, weight in self._widths(objective):
                first = dataclasses.replace(whole, queries=_first(queries, width), documents=_first(documents, width))
                of_width, _ = OBJECTIVES[objective.name](objective, first)
                parts[f"{label}_{width}"] = of_width
                loss = loss + weight * of_width
            total = total + objective.weight * loss
        return total, parts

    def labelled(self) -> list[tuple[str, ObjectiveConfig]]:
        """Each objective under its name, with a number from the second of a name on: infonce, infonce_2."""
        names = [objective.name for objective in self.chosen]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        return [(f"{name}_{n}" if n > 1 else name, o) for name, n, o in zip(names, counts, self.chosen, strict=True)]

    def new_params(self, width: int, teacher_width: int, key: jax.Array) -> dict[str, Any]:
        """The parameters that the objectives train, by label; those that have none are left out."""
        made = {}
        for i, (label, objective) in enumerate(self.labelled()):
            if isinstance(objective, InfoNCEConfig):
                made[label] = infonce.new_params(objective)
            if isinstance(objective, EmbeddingMatchingConfig):
                made[label] = distillation.new_projection(width, teacher_width, jax.random.fold_in(key, i))
        return {label: params for label, params in made.items() if params}

    def _share(self, objective: ObjectiveConfig, batch: Batch) -> Float[Array, " b"]:
        """Each query's part of the mean over the queries of the objective's sources."""
        if not objective.sources:
            return jnp.full(batch.query_slot.shape, 1 / batch.query_slot.shape[0])
        chosen = jnp.array([name in objective.sources for name in self.source_names])[batch.source]
        return chosen / jnp.maximum(chosen.sum(), 1)

    def _widths(self, objective: ObjectiveConfig) -> list[tuple[int, float]]:
        if objective.name in WHOLE_ALONE:
            return []
        weights = self.matryoshka.weights or (1.0,) * len(self.matryoshka.dims)
        return list(zip(self.matryoshka.dims, weights, strict=True))


def _first(vectors: Float[Array, "*b d"], width: int) -> Float[Array, "*b w"]:
    return unit_length(vectors[..., :width])
