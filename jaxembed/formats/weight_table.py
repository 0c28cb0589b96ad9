"""The conversion table between Hugging Face tensors and our parameter tree, read both ways.

Linear weights are [out, in] in the files and [in, out] in the tree. The tree stacks the tensors of all layers on a leading
axis.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One row of the table: a parameter of our tree and its tensors in the files.

    Attributes:
        path: Path of the parameter in our tree, joined with "/".
        tensor_name: Name of the tensor in the files. "{i}" stands for the layer of a parameter that is stacked.
        is_transposed: Whether the file holds the transpose.
    """

    path: str
    tensor_name: str
    is_transposed: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks one tensor per layer."""
        return "{i}" in self.tensor_name


def _map_linear(path: str, module: str) -> tuple[TensorMapping, TensorMapping]:
    return TensorMapping(f"{path}/kernel", f"{module}.weight", True), TensorMapping(f"{path}/bias", f"{module}.bias")


def _map_layer_norm(path: str, module: str) -> tuple[TensorMapping, TensorMapping]:
    return TensorMapping(f"{path}/scale", f"{module}.weight"), TensorMapping(f"{path}/bias", f"{module}.bias")


LAYERS_PATH, LATENT_BLOCKS = "decoder/layers", "pooling.cross_attend_blocks"
TENSOR_MAPPINGS: tuple[TensorMapping, ...] = (
    TensorMapping("decoder/embedding", "embed_tokens.weight"),
    *_map_linear(f"{LAYERS_PATH}/attention/q", "layers.{i}.self_attn.q_proj"),
    *_map_linear(f"{LAYERS_PATH}/attention/k", "layers.{i}.self_attn.k_proj"),
    *_map_linear(f"{LAYERS_PATH}/attention/v", "layers.{i}.self_attn.v_proj"),
    *_map_linear(f"{LAYERS_PATH}/attention/out", "layers.{i}.self_attn.o_proj"),
    TensorMapping(f"{LAYERS_PATH}/attention/q_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
    TensorMapping(f"{LAYERS_PATH}/attention/k_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
    *_map_linear(f"{LAYERS_PATH}/mlp/gate", "layers.{i}.mlp.gate_proj"),
    *_map_linear(f"{LAYERS_PATH}/mlp/up", "layers.{i}.mlp.up_proj"),
    *_map_linear(f"{LAYERS_PATH}/mlp/down", "layers.{i}.mlp.down_proj"),
    TensorMapping(f"{LAYERS_PATH}/attention_norm/scale", "layers.{i}.input_layernorm.weight"),
    TensorMapping(f"{LAYERS_PATH}/mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    TensorMapping("decoder/norm/scale", "norm.weight"),
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
)
# Heads that transformers puts on these decoders: of language models, of classifiers and rerankers, of question answering.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")
HEAD_TENSORS = frozenset(f"{head}.{kind}" for head in HEADS for kind in ("weight", "bias"))
# Prefixes of tensor names in published files, and what the table has instead.
TENSOR_NAME_PREFIXES = {"model.": "", "embedding_model.": "", "latent_attention_model.": "pooling."}


def to_table_name(name: str) -> str:
    """Return the table's name of a tensor in a published file."""
    for prefix, table_prefix in TENSOR_NAME_PREFIXES.items():
        if name.startswith(prefix):
            return table_prefix + name.removeprefix(prefix)
    return name


def get_model_part(table_name: str) -> str:
    """Return the part of a model (decoder, pooling, projection) that a tensor belongs to."""
    first = table_name.partition(".")[0]
    return first if first in ("pooling", "projection") else "decoder"


def is_unused(table_name: str) -> bool:
    """Return whether an embedding model has no use for a tensor: a head on top of the decoder, or an old RoPE buffer."""
    return table_name in HEAD_TENSORS or table_name.endswith("rotary_emb.inv_freq")
