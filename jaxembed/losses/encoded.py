"""The input and output types of objectives."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array, Float

from jaxembed.data.batch import Batch


@flax.struct.dataclass
class EncodedBatch:
    """The vectors of a global batch, and everything else that an objective may use.

    Attributes:
        queries: Unit vectors of the queries, [B, D].
        documents: Unit vectors of the documents, positive first, [B, 1+K, D]; zero for absent documents.
        batch: The batch that was encoded.
        query_weights: Weight of each query in the mean, [B]: 1/n for the n queries of the objective's sources, 0 for others.
        key: Random key of the objective.
        shards: Number of equal, contiguous parts into which the queries are split over devices.
        params: Parameters of the objective itself.
    """

    queries: Any
    documents: Any
    batch: Batch
    query_weights: Any
    key: Any
    shards: int = flax.struct.field(default=1, pytree_node=False)
    params: Any = flax.struct.field(default_factory=dict)


LossAndMetrics = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
