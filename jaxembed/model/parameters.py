"""Trees of a model's parameters: their shapes and shardings on a mesh, and their layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxembed.devices.mesh import make_logical_axis_table, make_param_shardings
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes


def compute_shapes_and_shardings(model: EmbeddingModel, mesh: Mesh) -> tuple[Any, Any]:
    """Return a tree of `jax.ShapeDtypeStruct` and a tree of shardings of a model's parameters.

    Raises:
        UserError: The sizes of the mesh do not divide those of the model.
    """
    table = make_logical_axis_table(mesh, model.transformer.axis_sizes)
    with jax.set_mesh(None):  # under the mesh of a run that loads another model, Flax would look for the logical axes in it
        boxed = infer_parameter_shapes(model)
        shapes = nn.unbox(boxed)
    return shapes, make_param_shardings(mesh, nn.get_partition_spec(boxed), table)


def attach_shardings(shapes: Any, shardings: Any) -> Any:
    """Attach shardings to a tree of `jax.ShapeDtypeStruct`: the two trees of `compute_shapes_and_shardings`."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def replace_layers(params: Any, layers: Any) -> Any:
    """Return parameters with other transformer layers."""
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def stack_layers(params: Any) -> Any:
    """Return parameters in the form of the model: stack the layers, if they are a list."""
    layers = params["decoder"]["layers"]
    if not isinstance(layers, list):
        return params
    return replace_layers(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
