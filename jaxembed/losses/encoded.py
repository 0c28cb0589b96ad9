"""What an objective is a function of."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array, Float

from jaxembed.data.batch import Batch


@flax.struct.dataclass
class Encoded:
    """The vectors of a global batch and all that an objective may know of it.

    Vectors are of unit length, and zero for absent documents. `share` is each query's part of the mean: 1/n of the n queries
    that the objective is for, 0 of others. `key` is for draws, `params` are the objective's own parameters.
    """

    queries: Any  # [B, D]
    documents: Any  # [B, 1+K, D]
    batch: Batch
    share: Any  # [B]
    key: Any
    shards: int = flax.struct.field(default=1, pytree_node=False)  # over which the queries are split, in order
    params: Any = flax.struct.field(default_factory=dict)


Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
