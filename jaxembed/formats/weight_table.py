"""The conversion table between Hugging Face tensors and our parameter tree, used in both directions.

Linear weights are [out, in] in the files and [in, out] in the tree. The tree stacks the tensors of all layers on a leading
axis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable

from jaxembed.config.spec import MAX_HIDDEN_PROJECTIONS
from jaxembed.model.families import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One row of the table: a parameter of our tree and its tensors in the files.

    Attributes:
        path: Path of the parameter in our tree, joined with "/".
        tensor_name: Name of the tensor in the files. "{i}" stands for the layer of a parameter that is stacked.
        is_transposed: Whether the file holds the transpose.
        part: (index, count) of the parameter among the equal parts of the tensor, along its first axis.
        first_layer: First layer that has the tensor, if the parameter is stacked. Earlier layers do not use the parameter.
    """

    path: str
    tensor_name: str
    is_transposed: bool = False
    part: tuple[int, int] = (0, 1)
    first_layer: int = 0

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks one tensor per layer."""
        return "{i}" in self.tensor_name


def _map_linear(path: str, module: str) -> tuple[TensorMapping, TensorMapping]:
    return TensorMapping(f"{path}/kernel", f"{module}.weight", True), TensorMapping(f"{path}/bias", f"{module}.bias")


def _map_layer_norm(path: str, module: str) -> tuple[TensorMapping, TensorMapping]:
    return TensorMapping(f"{path}/scale", f"{module}.weight"), TensorMapping(f"{path}/bias", f"{module}.bias")


LATENT_BLOCKS = "pooling.cross_attend_blocks"
EMBEDDINGS = ("decoder/embedding", "decoder/positions", "decoder/token_types")  # tables, which are not transposed
LANGUAGE_MODEL_HEAD = TensorMapping("head/embedding", "lm_head.weight")
POOLING_AND_PROJECTION: tuple[TensorMapping, ...] = (
    # Poolings with weights use the tensor names of the NV-Embed release.
    TensorMapping("pooling/latents", "pooling.latents"),
    *_map_layer_norm("pooling/latent_norm", f"{LATENT_BLOCKS}.0.norm_context"),
    *_map_layer_norm("pooling/attention_norm", f"{LATENT_BLOCKS}.0.norm"),
    *_map_linear("pooling/attention/q", f"{LATENT_BLOCKS}.0.fn.to_q"),
    *_map_linear("pooling/attention/kv", f"{LATENT_BLOCKS}.0.fn.to_kv"),
    *_map_linear("pooling/attention/out", f"{LATENT_BLOCKS}.0.fn.to_out"),
    *_map_layer_norm("pooling/mlp_norm", f"{LATENT_BLOCKS}.1.norm"),
    *_map_linear("pooling/mlp/in", f"{LATENT_BLOCKS}.1.fn.net.0"),
    *_map_linear("pooling/mlp/out", f"{LATENT_BLOCKS}.1.fn.net.2"),
    *_map_linear("pooling/mlp_in", "pooling.mlp.0"),
    *_map_linear("pooling/mlp_out", "pooling.mlp.2"),
    *_map_linear("projection", "projection.linear"),
    *(
        row
        for i in range(MAX_HIDDEN_PROJECTIONS)
        for row in _map_linear(f"projection/hidden_{i}", f"projection.hidden_{i}.linear")
    ),
)


@functools.cache
def list_tensor_mappings(family: str) -> tuple[TensorMapping, ...]:
    """Return the rows of the table for a family. Head, pooling and projection have the same rows in all."""
    rows = itertools.chain.from_iterable(_map_module(FAMILIES[family], path) for path in FAMILIES[family].modules)
    return (*rows, LANGUAGE_MODEL_HEAD, *POOLING_AND_PROJECTION)


def _map_module(family: Family, path: str) -> Iterable[TensorMapping]:
    """Return the rows of the parameters at a path."""
    module = family.modules[path]
    if path in EMBEDDINGS:
        return [TensorMapping(path, f"{module}.weight")]
    if path.endswith("norm"):
        first_layer = int(path.endswith("/attention_norm") and bool(family.options.get("unnormed_first_layer")))
        return [dataclasses.replace(row, first_layer=first_layer) for row in _map_layer_norm(path, module)]
    parts = [other for other, other_module in family.modules.items() if other_module == module]
    return [dataclasses.replace(row, part=(parts.index(path), len(parts))) for row in _map_linear(path, module)]


# Heads that transformers puts on models: of language models, of classifiers and rerankers, of question answering; and the
# pooler of BERT, which sentence-transformers does not use.
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "cls", "pooler", "head", "decoder")
UNUSED_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids", "embeddings.token_type_ids")
# Prefixes of tensor names in published files, and what the table has instead.
TENSOR_NAME_PREFIXES = {
    "model.": "",
    "embedding_model.": "",
    "latent_attention_model.": "pooling.",
    "bert.": "",
    "roberta.": "",
}
# Old names of the parameters of LayerNorm.
LAYER_NORM_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def to_table_name(name: str) -> str:
    """Return the table's name of a tensor in a published file."""
    for old, new in LAYER_NORM_SUFFIXES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for prefix, table_prefix in TENSOR_NAME_PREFIXES.items():
        if name.startswith(prefix):
            return table_prefix + name.removeprefix(prefix)
    return name


def get_model_part(table_name: str) -> str:
    """Return the part of a model that a tensor belongs to: decoder (any transformer), head, pooling or projection."""
    first = table_name.partition(".")[0]
    if table_name == LANGUAGE_MODEL_HEAD.tensor_name:
        return "head"
    return first if first in ("pooling", "projection") else "decoder"


def is_unused(table_name: str) -> bool:
    """Return whether an embedding model does not use a tensor: a head on top of the transformer, or an old buffer."""
    return table_name.partition(".")[0] in HEADS or table_name.endswith(UNUSED_BUFFERS)
