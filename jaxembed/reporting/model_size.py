"""The size of a model, from its config. No weights are read."""

from __future__ import annotations

import dataclasses
import math

import jax

from jaxembed.errors import UserError
from jaxembed.files import exists, expand_home
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.hub.base import Base
from jaxembed.hub.resolve import find_base, find_run
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.transformer import ComputeOptions

BYTES_PER_PARAMETER = 4  # float32, as Table 3 of the survey (Cao 2024, arXiv:2406.01607) counts memory


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The size of a model, with the settings that a report names beside it.

    Attributes:
        parameters: Number of parameters, with adapters merged.
        width: Width of its vectors.
        max_length: Maximum tokens of a text.
        pooling: Name of its pooling.
        attention: Its attention mask.
    """

    parameters: int
    width: int
    max_length: int
    pooling: str
    attention: str

    @property
    def memory_gib(self) -> float:
        """Memory of the parameters in float32, in GiB."""
        return self.parameters * BYTES_PER_PARAMETER / 2**30


def read_model_size(path: str) -> ModelSize | None:
    """Return the size of the model in a run directory or folder, or None if there is no such model here."""
    folder = expand_home(path)
    if not path or not exists(folder):
        return None
    try:
        base: Base = find_run(path, folder, "last") if exists(folder / BASE_RECORD_FILE) else find_base(path)
    except UserError:  # scores may outlive their model
        return None
    model = EmbeddingModel(base.transformer, base.spec, ComputeOptions())
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(infer_parameter_shapes(model)))
    return ModelSize(parameters, model.width, base.spec.max_length, base.spec.pooling, base.spec.attention)
