"""Transformer plus pooling: maps packed texts to one vector per text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import PackedTexts
from jaxembed.errors import UserError
from jaxembed.model.families import FAMILIES, TransformerConfig
from jaxembed.model.layers import Linear, l2_normalize
from jaxembed.model.lora import select_embedding_dtype
from jaxembed.model.masks import MASKS, Mask, TokenInfo
from jaxembed.model.pooling import make_pooling, make_segment_mask
from jaxembed.model.transformer import ComputeOptions, Transformer

# Fields of the spec that the compiled program does not depend on. Most of them are for tokenization.
TEXT_FIELDS = (
    "prompts", "fixed_prompts", "plain_prompt", "instruction_template", "instruction_table", "query_suffix",
    "example_template", "echo", "plain_echo", "append_eos", "eos_as_text", "pool_last_instruction_token", "pool_text_tokens",
    "max_length", "text_length", "matryoshka_dims", "exit_layers",
)  # fmt: skip
# Fields of the spec that the program depends on, but not the parameters.
PROGRAM_FIELDS = ("attention", "include_instruction", "normalize")
# Activations after the projection, by their names in the spec.
PROJECTION_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"identity": lambda x: x, "tanh": jnp.tanh}


class Projection(nn.Module):
    """The linear layers after the pooling, each with its activation. The last one has the parameters of the module itself."""

    spec: EmbeddingSpec

    @nn.compact
    def __call__(self, x: Float[Array, "r s d"]) -> Float[Array, "r s p"]:
        """Map each vector."""
        axes, dtype = ("embed", "projected"), x.dtype
        for i, hidden in enumerate(self.spec.hidden_projections):
            x = Linear(hidden.width, axes, dtype, hidden.bias, name=f"hidden_{i}")(x)
            x = PROJECTION_ACTIVATIONS[hidden.activation](x)
        last = Linear(self.spec.projection, axes, dtype, self.spec.projection_bias)
        nn.share_scope(self, last)
        return PROJECTION_ACTIVATIONS[self.spec.projection_activation](last(x))


class LanguageModelHead(nn.Module):
    """The kernel [V, D] of a language-model head, in the layout of the token embedding. Token losses multiply by it."""

    transformer: TransformerConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self) -> Float[Array, "v d"]:
        """Return the kernel."""
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (self.transformer.vocab_size, self.transformer.width)
        return self.param("embedding", init, shape, select_embedding_dtype(self.lora))


class EmbeddingModel(nn.Module):
    """Maps packed texts to vectors [R, S, D], or [R, S, P] where the spec has a projection to width P. At least float32.

    The vectors of absent texts are zeros, or the projection of zeros.

    Attributes:
        transformer: Sizes of the transformer.
        spec: How texts become vectors: mask, pooling, projection, normalization.
        compute: How the transformer is executed.
        lora: Adapters of the transformer, if any.
        has_head: Whether there is an untied language-model head. Vectors do not depend on it.
    """

    transformer: TransformerConfig
    spec: EmbeddingSpec
    compute: ComputeOptions = ComputeOptions()
    lora: LoraConfig | None = None
    has_head: bool = False

    @property
    def width(self) -> int:
        """The width of the vectors."""
        return self.spec.projection or self.transformer.width

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters. Empty without adapters, and with a single adapter that has no name."""
        return () if self.lora is None else self.lora.names

    def drop_text_fields(self) -> EmbeddingModel:
        """Return the same model with the defaults of TEXT_FIELDS. Models with the same program become equal."""
        return self.clone(spec=_reset(self.spec, TEXT_FIELDS))

    def drop_program_fields(self) -> EmbeddingModel:
        """Return a model with the same parameters and initialization. Models with the same parameters become equal."""
        compute = ComputeOptions(self.compute.dtype, unroll=False, attention_kernel="einsum")
        return self.clone(spec=_reset(self.spec, (*TEXT_FIELDS, *PROGRAM_FIELDS)), compute=compute)

    @nn.compact
    def __call__(
        self,
        texts: PackedTexts,
        hidden: Float[Array, "r t d"] | None = None,
        exit_layers: Int[Array, " e"] | None = None,
    ) -> Float[Array, "r s *x p"]:
        """Return the vector of every text. A "dropout" key among `rngs` turns on all dropout.

        Args:
            texts: The texts.
            hidden: Hidden states of their tokens, if the transformer has run already.
            exit_layers: Numbers of layers after which vectors are also returned (early exits).

        Returns:
            Vectors [R, S, P]. With exits [R, S, 1+E, P], the whole model first.
        """
        if hidden is None:
            mask = MASKS[self.spec.attention]
            # Checkpoints hold the parameters of every transformer under "decoder", also those of encoders.
            hidden = Transformer(self.transformer, mask, self.compute, self.lora, name="decoder")(texts, exit_layers)
        if self.has_head and self.is_initializing():
            LanguageModelHead(self.transformer, self.lora, name="head")()
        pool_mask = (texts.segment_ids > 0) if self.spec.include_instruction else texts.pool_mask
        segment_mask = make_segment_mask(texts.segment_ids, pool_mask, texts.segments)
        pooling = make_pooling(self.spec.pooling, self.spec.latents, self.spec.pooling_heads, name="pooling")
        token_info = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
        if exit_layers is None:
            vectors = pooling(hidden, segment_mask, token_info)
        else:
            vectors = jnp.stack([pooling(x, segment_mask, token_info) for x in hidden], axis=2)
        if self.spec.projection:
            vectors = Projection(self.spec, name="projection")(vectors)
        return l2_normalize(vectors) if self.spec.normalize else vectors


def make_transformer(model: EmbeddingModel, mask: Mask) -> Transformer:
    """Return the transformer of a model with a mask. It takes the parameters under "decoder"."""
    return Transformer(model.transformer, mask, model.compute, model.lora)


def get_head_table(model: EmbeddingModel, params: Any) -> jax.Array:
    """Return the kernel [V, D] of the language-model head: its own, or the token embedding."""
    return jnp.asarray(params["head" if model.has_head else "decoder"]["embedding"])


def _reset(spec: EmbeddingSpec, fields: Sequence[str]) -> EmbeddingSpec:
    """Return a spec with the defaults of some fields."""
    defaults = EmbeddingSpec()
    return spec.replace(**{name: getattr(defaults, name) for name in fields})


def make_example_texts(row_length: int = 8) -> PackedTexts:
    """Return one row of padding, enough to trace a model's shapes."""
    zeros = jnp.zeros((1, row_length), jnp.int32)
    return PackedTexts(zeros, zeros, zeros, zeros.astype(bool), segments=1, shards=1)


def infer_parameter_shapes(model: EmbeddingModel) -> Any:
    """Return the tree of parameters as ShapeDtypeStructs, boxed with their logical axes. Allocates no arrays.

    A run needs the tree in several places, but traces the model for it once. Do not change the tree in place.

    Raises:
        UserError: The number of pooling heads does not divide the width of the transformer, or an encoder has another mask.
    """
    if FAMILIES[model.transformer.family].is_encoder and model.spec.attention != "bidirectional":
        raise UserError(
            f"model.attention: {model.transformer.family} is an encoder (found {model.spec.attention}; expected "
            "bidirectional). Remove the key, or use a decoder."
        )
    heads, width = model.spec.pooling_heads, model.transformer.width
    if model.spec.pooling in ("latent_attention_paper", "self_attention") and width % heads:
        raise UserError(
            f"model.pooling.heads: {model.spec.pooling} cannot split the model's width {width} into heads "
            f"(found {heads}; expected a divisor of {width}). Choose another number."
        )
    return _trace_parameter_shapes(model.drop_program_fields())


@functools.lru_cache(maxsize=64)
def _trace_parameter_shapes(model: EmbeddingModel) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), make_example_texts())["params"]


def init_params(model: EmbeddingModel, key: jax.Array, shardings: Any) -> Any:
    """Draw random parameters directly into their shardings.

    Args:
        model: The model.
        key: A random key, or N keys [N] to draw N sets of parameters, stacked along a first axis.
        shardings: Shardings of the parameters to draw. Parameters that are missing in this tree are not drawn.
    """
    flat_shardings = flatten_dict(shardings)
    if not flat_shardings:
        return {}
    init = _make_init_program(model.drop_program_fields(), tuple(flat_shardings.items()), is_stacked=key.ndim > 0)
    return unflatten_dict(init(key))


@functools.lru_cache(maxsize=8)
def _make_init_program(
    model: EmbeddingModel, flat_shardings: tuple[tuple[tuple[str, ...], jax.sharding.Sharding], ...], is_stacked: bool
) -> Callable[[jax.Array], dict[tuple[str, ...], jax.Array]]:
    """Return the program that draws parameters, given their paths and shardings. Models with equal parameters share it."""

    def init(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        params = flatten_dict(nn.unbox(model.init(key, make_example_texts())["params"]))
        return {path: params[path] for path, _ in flat_shardings}

    return jax.jit(jax.vmap(init) if is_stacked else init, out_shardings=dict(flat_shardings))
