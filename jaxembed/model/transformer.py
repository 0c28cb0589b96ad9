"""A transformer over packed rows, for decoders and encoders: embedding, stacked layers, final norm.

It has no language-model head and no key-value cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.config import DropoutConfig, LoraConfig
from jaxembed.data.packing import PackedTexts
from jaxembed.devices.collectives import embedding_lookup, shard_rows
from jaxembed.model.attention import Attention
from jaxembed.model.families import TransformerConfig
from jaxembed.model.layers import (
    MLP,
    build_rope_table,
    compute_rope_frequencies,
    compute_rope_magnitude,
    make_dropout,
    make_norm,
)
from jaxembed.model.lora import select_embedding_dtype
from jaxembed.model.masks import Mask, TokenInfo
from jaxembed.model.remat import REMAT_POLICIES


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How a transformer is executed. Without a "dropout" key these options change its outputs by rounding errors only.

    Attributes:
        dtype: Dtype of the computation.
        remat: Whether the backward pass recomputes the activations of a layer, to save memory.
        unroll: Whether the loop over the layers is unrolled. Steps are faster, compilation takes longer.
        attention_kernel: Name of the attention kernel (see `pick_kernel`).
        dropout: Rates of dropout. It is on where the caller passes a "dropout" key, as training does.
        remat_policy: Values of a layer that `remat` keeps (see `REMAT_POLICIES`).
    """

    dtype: Any = jnp.float32
    remat: bool = False
    unroll: bool = True
    attention_kernel: str = "auto"
    dropout: DropoutConfig = dataclasses.field(default_factory=DropoutConfig)
    remat_policy: str = "nothing"


@flax.struct.dataclass
class LayerVariant:
    """The properties in which layers of a model differ. None: does not apply.

    Fields are Python values, or arrays if layers differ (see `Transformer`).

    Attributes:
        window: Sliding window in tokens.
        is_local: Whether the layer uses the second rotary table, for layers with a sliding window.
        has_attention_norm: Whether the attention has a norm before it. ModernBERT's first layer has none.
    """

    window: Any = None
    is_local: Any = None
    has_attention_norm: Any = None

    def pick_rope(self, ropes: tuple[Any, ...]) -> Any:
        """Return the rotary table of the layer; None without rotary positions."""
        if self.is_local is None:
            return next(iter(ropes), None)
        if isinstance(self.is_local, bool):
            return ropes[self.is_local]
        return jax.tree.map(lambda full, local: jnp.where(self.is_local, local, full), *ropes)

    def normalize_attention_input(self, norm: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """Return norm(x), or x in a layer without that norm."""
        if isinstance(self.has_attention_norm, bool):
            return norm(x) if self.has_attention_norm else x
        return norm(x) if self.has_attention_norm is None else jnp.where(self.has_attention_norm, norm(x), x)


def list_layer_variants(config: TransformerConfig, mask: Mask) -> list[LayerVariant]:
    """Return the variant of each layer, with Python values."""
    return [
        LayerVariant(
            window=window,
            is_local=None if config.local_rope_theta is None else window is not None,
            has_attention_norm=i > 0 if config.unnormed_first_layer else None,
        )
        for i, window in enumerate(config.get_windows(mask))
    ]


@flax.struct.dataclass
class LayerExits:
    """Hidden states at the exits, collected while the layers run. The states of other layers are not kept.

    Attributes:
        layers: Number of layers before each of E exits, int32 [E].
        hidden: Hidden states at each exit, [E, R * T, D]; zeros before its layer has run.
        layers_done: Number of layers that have run, an int32 scalar.
    """

    layers: Any
    hidden: Any
    layers_done: Any

    @classmethod
    def start(cls, layers: Int[Array, " e"], x: jax.Array) -> LayerExits:
        """Return the exits before the first layer, whose input is `x`."""
        return cls(layers, jnp.zeros((len(layers), *x.shape), x.dtype), jnp.zeros((), jnp.int32))

    def collect(self, x: jax.Array) -> LayerExits:
        """Return the exits after one more layer, whose output is `x`."""
        layers_done = self.layers_done + 1
        is_here = (self.layers == layers_done)[:, None, None]
        return dataclasses.replace(self, hidden=jnp.where(is_here, x, self.hidden), layers_done=layers_done)


class TransformerLayer(nn.Module):
    """Attention and MLP, each with a residual connection.

    By `TransformerConfig.norm_placement` a block computes x + block(norm(x)) ("pre"), norm(x + block(x)) ("post"), or
    x + norm(block(norm(x))) ("both").
    """

    config: TransformerConfig
    mask: Mask
    compute: ComputeOptions
    shards: int
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, LayerExits | None], token_info: TokenInfo, ropes: tuple[Any, ...], variant: LayerVariant
    ) -> tuple[tuple[jax.Array, LayerExits | None], None]:
        """Map hidden states [R * T, D] to those after this layer. `nn.scan` needs the second output, None.

        Args:
            carry: Hidden states, and the exits of the layers before, if any are wanted.
            token_info: Segments and positions of the tokens.
            ropes: Rotary tables (`build_rope_tables`).
            variant: The properties in which layers differ.
        """
        c, dtype = self.config, self.compute.dtype
        x, exits = carry
        attention = Attention(
            heads=c.heads, kv_heads=c.kv_heads, head_width=c.head_width, qkv_bias=c.qkv_bias, out_bias=c.out_bias,
            qk_norm=c.qk_norm, norm=c.norm, norm_epsilon=c.norm_epsilon, query_scale=c.query_scale,
            windows=c.list_distinct_windows(self.mask), mask=self.mask, dtype=dtype, kernel=self.compute.attention_kernel,
            dropout=self.compute.dropout.attention, lora=self.lora, name="attention",
        )  # fmt: skip
        mlp = MLP(c.mlp_width, dtype, c.activation, c.gated_mlp, c.mlp_bias, self.lora, name="mlp")
        rope = variant.pick_rope(ropes)
        x = self._add_block(x, "attention", lambda y: attention(y, token_info, rope, variant.window, self.shards), variant)
        is_text = token_info.segment.reshape(-1) > 0
        x = shard_rows(self._add_block(x, "mlp", lambda y: mlp(y, is_text), variant))
        return (x, None if exits is None else exits.collect(x)), None

    def _add_block(self, x: jax.Array, name: str, block: Callable[[jax.Array], jax.Array], variant: LayerVariant) -> jax.Array:
        """Add the output of a block to its input, with norms before, after, or around it."""
        c = self.config
        norm = make_norm(c.norm, c.norm_epsilon, self.compute.dtype, f"{name}_norm")
        drop = make_dropout(self, self.compute.dropout.hidden)
        if c.norm_placement == "post":
            return jnp.asarray(norm(x + drop(block(x))))
        normed = variant.normalize_attention_input(norm, x) if name == "attention" else norm(x)
        out = drop(block(normed))
        if c.norm_placement == "both":
            out = make_norm(c.norm, c.norm_epsilon, self.compute.dtype, f"{name}_out_norm")(out)
        return x + out


def build_rope_tables(config: TransformerConfig, positions: jax.Array, dtype: Any) -> tuple[Any, ...]:
    """Return the rotary tables of a model.

    There is one, and a second one if layers with a sliding window have their own base; none with learned positions.
    """
    if config.position_kind != "rope":
        return ()
    scaling: dict[str, Any] = dict(config.rope_scaling)
    bases = [(config.rope_theta, scaling)]
    bases += [] if config.local_rope_theta is None else [(config.local_rope_theta, {})]
    tables = []
    for theta, own_scaling in bases:
        table = build_rope_table(positions, compute_rope_frequencies(config.head_width, theta, own_scaling), dtype)
        magnitude = compute_rope_magnitude(own_scaling)
        tables.append(table if magnitude == 1 else tuple(magnitude * x for x in table))
    return tuple(tables)


def find_position_rows(texts: PackedTexts, offset: int) -> jax.Array:
    """Return each token's row in the table of learned positions, [R, T].

    With an offset, as in RoBERTa, row `offset` - 1 belongs to the padding token. A padding token inside a text has this row,
    and does not advance the positions of the tokens after it.
    """
    if not offset:
        return jnp.asarray(texts.positions)
    is_padding = texts.tokens == offset - 1
    padding_before = jnp.cumsum(is_padding, axis=1) - is_padding
    starts = jnp.arange(texts.tokens.shape[1]) - texts.positions
    padding_in_text = padding_before - jnp.take_along_axis(padding_before, starts, axis=1)
    return jnp.where(is_padding, offset - 1, texts.positions - padding_in_text + offset)


class Embedding(nn.Module):
    """Looks up token embeddings. If configured, adds learned positions and the token type, and applies a norm to the sum."""

    config: TransformerConfig
    dtype: Any
    storage_dtype: Any

    @nn.compact
    def __call__(self, texts: PackedTexts) -> Float[Array, "tokens d"]:
        """Return the embeddings of all tokens, [R * T, D]."""
        c = self.config

        def make_table(name: str, rows: int) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
            return self.param(name, init, (rows, c.width), self.storage_dtype)

        x = embedding_lookup(make_table("embedding", c.vocab_size), texts.tokens.reshape(-1), self.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        if c.token_types:
            x = x + make_table("token_types", c.token_types)[0].astype(self.dtype)
        if c.position_kind == "learned":
            table = make_table("positions", c.max_positions + c.position_offset)
            x = x + embedding_lookup(table, find_position_rows(texts, c.position_offset).reshape(-1), self.dtype)
        return make_norm(c.norm, c.norm_epsilon, self.dtype, "embedding_norm")(x) if c.embedding_norm else x


class Transformer(nn.Module):
    """Maps packed texts to hidden states [R, T, D] after the last norm, in the dtype of the computation."""

    config: TransformerConfig
    mask: Mask
    compute: ComputeOptions = ComputeOptions()
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, texts: PackedTexts, exit_layers: Int[Array, " e"] | None = None) -> Float[Array, "*x r t d"]:
        """Return the hidden states of all tokens.

        Args:
            texts: The texts.
            exit_layers: Numbers of layers after which states are also returned, followed by the last norm.

        Returns:
            Hidden states [R, T, D]. With exits [1+E, R, T, D], the whole model first.
        """
        c, dtype = self.config, self.compute.dtype
        embedding = Embedding(c, dtype, select_embedding_dtype(self.lora))
        nn.share_scope(self, embedding)
        x = make_dropout(self, self.compute.dropout.hidden)(embedding(texts))
        token_info = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
        # If layers differ, their variants become arrays [L], which `nn.scan` slices. Arrays have no None, so a layer without a
        # window gets one as long as the longest text. Otherwise Python values stay: some kernels need a static window.
        variants = list_layer_variants(c, self.mask)
        is_mixed, variant = len(set(variants)) > 1, variants[0]
        if is_mixed:
            variants = [dataclasses.replace(v, window=v.window or c.max_positions) for v in variants]
            variant = jax.tree.map(lambda *values: jnp.array(values), *variants)
        layer = TransformerLayer
        if self.compute.remat:
            policy = REMAT_POLICIES[self.compute.remat_policy]
            static = () if is_mixed else (4,)  # the variant
            layer = nn.remat(TransformerLayer, prevent_cse=False, static_argnums=static, policy=policy)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},  # "intermediates" is for `capture_intermediates`
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0 if is_mixed else nn.broadcast),
            length=c.layers,
            unroll=c.layers if self.compute.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        ropes = build_rope_tables(c, texts.positions, dtype)
        layers = stack(c, self.mask, self.compute, texts.shards, self.lora, name="layers")
        exits = None if exit_layers is None else LayerExits.start(exit_layers, x)
        (x, exits), _ = layers((x, exits), token_info, ropes, variant)
        if exits is not None:
            x = jnp.concatenate([x[None], exits.hidden])
        if c.norm_placement != "post":
            x = make_norm(c.norm, c.norm_epsilon, dtype, "norm")(x)
        return x.reshape(*x.shape[:-2], *texts.tokens.shape, c.width)
