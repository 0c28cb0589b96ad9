"""Decoder plus pooling: packed texts in, one vector a text out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import PackedTexts
from jaxembed.errors import UserError
from jaxembed.model.decoder import Compute, Decoder
from jaxembed.model.families import DecoderConfig
from jaxembed.model.layers import Linear, unit_length
from jaxembed.model.lora import LoRA
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.model.pooling import make_pooling, segment_mask

# What may follow the projection, by name.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"identity": lambda x: x, "tanh": jnp.tanh}


class EmbeddingModel(nn.Module):
    """Vectors [R, S, D] of the texts of packed rows, in at least float32; [R, S, P] where the spec has a projection.

    Absent texts give zeros, or what the projection makes of zeros.
    """

    decoder: DecoderConfig
    spec: EmbeddingSpec
    compute: Compute = Compute()
    lora: LoRA | None = None

    @property
    def width(self) -> int:
        """The width of the vectors."""
        return self.spec.projection or self.decoder.width

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters where there are several."""
        return () if self.lora is None else self.lora.names

    @nn.compact
    def __call__(self, texts: PackedTexts) -> Float[Array, "r s p"]:
        hidden = Decoder(self.decoder, MASKS[self.spec.attention], self.compute, self.lora, name="decoder")(texts)
        pool_mask = (texts.segment_ids > 0) if self.spec.include_instruction else texts.pool_mask
        members = segment_mask(texts.segment_ids, pool_mask, texts.segments)
        pooling = make_pooling(self.spec.pooling, self.spec.latents, self.spec.pooling_heads, name="pooling")
        vectors = pooling(hidden, members, TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask))
        if self.spec.projection:
            axes, bias = ("embed", "projected"), self.spec.projection_bias
            projected = Linear(self.spec.projection, axes, vectors.dtype, bias, name="projection")(vectors)
            vectors = ACTIVATIONS[self.spec.projection_activation](projected)
        return unit_length(vectors) if self.spec.normalize else vectors


def example_texts(row_length: int = 8) -> PackedTexts:
    """One row of padding: enough to trace a model's shapes."""
    zeros = jnp.zeros((1, row_length), jnp.int32)
    return PackedTexts(zeros, zeros, zeros, zeros.astype(bool), segments=1, shards=1)


def parameter_shapes(model: EmbeddingModel) -> Any:
    """The tree of ShapeDtypeStructs, boxed with the logical axes that each parameter declares; needs no memory.

    `UserError` where the pooling does not fit the decoder.
    """
    heads, width = model.spec.pooling_heads, model.decoder.width
    if model.spec.pooling in ("latent_attention_paper", "self_attention") and width % heads:
        raise UserError(f"model.pooling.heads is {heads}, which does not divide the model's width {width}")
    return jax.eval_shape(model.init, jax.random.key(0), example_texts())["params"]


def init_params(model: EmbeddingModel, key: jax.Array, shardings: Any) -> Any:
    """Random parameters, placed as `shardings` says while they are made: those of the model that it names.

    Of several keys [N] there are as many draws, stacked on a first axis.
    """
    wanted = flatten_dict(shardings)
    if not wanted:
        return {}

    def init(key: jax.Array) -> Any:
        params = flatten_dict(nn.unbox(model.init(key, example_texts())["params"]))
        return {path: params[path] for path in wanted}

    return unflatten_dict(jax.jit(jax.vmap(init) if key.ndim else init, out_shardings=wanted)(key))
