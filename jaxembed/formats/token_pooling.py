"""Latent attention and self-attention before mean pooling, as a sentence-transformers module in PyTorch.

This file travels with exported models that have such a pooling and stands alone. It changes the token embeddings; the
stock Pooling module after it takes their mean. Names of weights are those of NV-Embed's release (Lee et al. 2024).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from sentence_transformers.base.modules.module import Module
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head attention to a context, without biases; keys come before values in `to_kv`."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class GatedGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * hidden), GatedGELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Block(nn.Module):
    """What a block computes (`fn`), with the norms of its input and, for latents, of its context."""

    def __init__(self, width: int, fn: nn.Module, context: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if context else None
        self.fn = fn


class TokenPooling(Module):
    """`kind`: latent_attention (the release's form), latent_attention_paper (the paper's equation 1), self_attention.

    `pooled_prompt_tokens`: how many of a prompt's last tokens are pooled although the prompt is not.
    """

    config_keys: ClassVar[list[str]] = ["width", "kind", "latent_count", "heads", "pooled_prompt_tokens"]

    def __init__(self, width: int, kind: str, latent_count: int, heads: int, pooled_prompt_tokens: int = 0):
        super().__init__()
        self.width, self.kind, self.latent_count, self.heads = width, kind, latent_count, heads
        self.pooled_prompt_tokens = pooled_prompt_tokens
        of_latents = kind != "self_attention"
        if of_latents:
            self.latents = nn.Parameter(torch.randn(latent_count, width))
        if kind == "latent_attention_paper":
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        else:
            attention = Attention(width, heads, width if of_latents else width // heads)
            blocks = [Block(width, attention, of_latents), Block(width, FeedForward(width, 4 * width))]
            self.cross_attend_blocks = nn.ModuleList(blocks)

    def forward(self, features: dict[str, torch.Tensor], **kwargs: object) -> dict[str, torch.Tensor]:
        if self.pooled_prompt_tokens and "prompt_length" in features:
            features["prompt_length"] = features["prompt_length"] - self.pooled_prompt_tokens
        x = features["token_embeddings"]
        features["token_embeddings"] = self._plain(x) if hasattr(self, "mlp") else self._blocks(x, features)
        return features

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        q, kv = (y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in (x, self.latents))
        weights = torch.softmax((q @ kv.transpose(-1, -2)).float(), dim=-1).to(x.dtype)
        return self.mlp((weights @ kv).transpose(1, 2).flatten(2))

    def _blocks(self, x: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        attend, feed_forward = self.cross_attend_blocks
        context, seen = attend.norm(x), features["attention_mask"].bool()[:, None, None]
        if attend.norm_context is not None:
            context, seen = attend.norm_context(self.latents).expand(len(x), -1, -1), None
        x = x + attend.fn(attend.norm(x), context, seen)
        return x + feed_forward.fn(feed_forward.norm(x))

    def get_embedding_dimension(self) -> int:
        return self.width

    def save(self, output_path: str, *args: object, safe_serialization: bool = True, **kwargs: object) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: object) -> TokenPooling:
        names = ("token", "cache_folder", "revision", "local_files_only")
        hub = {"subfolder": subfolder} | {name: kwargs[name] for name in names if name in kwargs}
        model = cls(**cls.load_config(model_name_or_path, **hub))
        return cls.load_torch_weights(model_name_or_path, model=model, **hub)
