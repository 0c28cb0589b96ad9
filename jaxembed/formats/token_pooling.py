"""Latent attention and self-attention before mean pooling, as a sentence-transformers module in PyTorch.

This file is copied beside exported models that have such a pooling, so it imports nothing from jaxembed. It changes the
token embeddings; the stock Pooling module after it takes their mean. Weights have the names of NV-Embed's release (Lee et
al. 2024). Shapes: B texts, T tokens, M latents, N heads, H head width, D model width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

try:
    from sentence_transformers.base.modules.module import Module  # versions from 5.4
except ImportError:
    try:
        from sentence_transformers.models import Module  # versions 5.0 to 5.3
    except ImportError:

        class Module(nn.Module):  # type: ignore[no-redef]
            """What versions 3 and 4 lack: a module that is saved to a local folder, and loaded from it."""

            config_keys: ClassVar[list[str]] = []

            @classmethod
            def load_config(cls, folder: str, **kwargs: object) -> dict[str, Any]:
                """Read the arguments of the constructor."""
                return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

            @classmethod
            def load_torch_weights(cls, folder: str, model: nn.Module, **kwargs: object) -> nn.Module:
                """Read the weights into `model`."""
                load_model(model, str(Path(folder) / "model.safetensors"))
                return model

            def save_config(self, folder: str) -> None:
                """Write the arguments of the constructor."""
                config = {key: getattr(self, key) for key in self.config_keys}
                (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

            def save_torch_weights(self, folder: str, safe_serialization: bool = True) -> None:
                """Write the weights."""
                save_model(self, str(Path(folder) / "model.safetensors"))


class MultiHeadAttention(nn.Module):
    """Multi-head attention to a context, without biases. `to_kv` computes the keys first, then the values."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend from `x` [B, T, D] to `context` [B, S, D], where `mask` (broadcast to [B, N, T, S]) is true."""
        projections = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        q, k, v = (projection.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection in projections)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class GatedGELU(nn.Module):
    """The first half of the features times the GELU of the second half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., F] for `x` [..., 2 F]."""
        value, gate = x.chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """A feed-forward layer with a gated GELU."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * hidden_width), GatedGELU(), nn.Linear(hidden_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., D] for `x` [..., D]."""
        return self.net(x)


class PreNorm(nn.Module):
    """A layer (`fn`) with the norm of its input and, if it attends to latents, the norm of its context."""

    def __init__(self, width: int, fn: nn.Module, has_context: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if has_context else None
        self.fn = fn


class TokenPooling(Module):
    """Multi-head attention over token embeddings, before their mean.

    Args:
        width: Width of the token embeddings.
        kind: "latent_attention" (as in the release of NV-Embed), "latent_attention_paper" (equation 1 of the paper) or
            "self_attention".
        latent_count: Number of latents.
        heads: Number of attention heads.
        pooled_prompt_tokens: Number of the last prompt tokens that are pooled although the prompt is not.
    """

    config_keys: ClassVar[list[str]] = ["width", "kind", "latent_count", "heads", "pooled_prompt_tokens"]

    def __init__(self, width: int, kind: str, latent_count: int, heads: int, pooled_prompt_tokens: int = 0):
        super().__init__()
        self.width, self.kind, self.latent_count, self.heads = width, kind, latent_count, heads
        self.pooled_prompt_tokens = pooled_prompt_tokens
        has_latents = kind != "self_attention"
        if has_latents:
            self.latents = nn.Parameter(torch.randn(latent_count, width))
        if kind == "latent_attention_paper":
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        else:
            attention = MultiHeadAttention(width, heads, width if has_latents else width // heads)
            blocks = [PreNorm(width, attention, has_latents), PreNorm(width, FeedForward(width, 4 * width))]
            self.cross_attend_blocks = nn.ModuleList(blocks)

    def forward(self, features: dict[str, torch.Tensor], **kwargs: object) -> dict[str, torch.Tensor]:
        """Replace the token embeddings [B, T, D] among the features."""
        if self.pooled_prompt_tokens and "prompt_length" in features:
            features["prompt_length"] = features["prompt_length"] - self.pooled_prompt_tokens
        x = features["token_embeddings"]
        if self.kind == "latent_attention_paper":
            features["token_embeddings"] = self._apply_paper_attention(x)
        else:
            features["token_embeddings"] = self._apply_blocks(x, features["attention_mask"])
        return features

    def _apply_paper_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to the latents without projections, scaling or residuals (equation 1 of the paper)."""
        q, kv = (y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in (x, self.latents))  # [B, N, T, H], [N, M, H]
        weights = torch.softmax((q @ kv.transpose(-1, -2)).float(), dim=-1).to(x.dtype)
        return self.mlp((weights @ kv).transpose(1, 2).flatten(2))

    def _apply_blocks(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Attend to the latents or, without latents, to the tokens; then apply the feed-forward layer."""
        attend, feed_forward = self.cross_attend_blocks
        if attend.norm_context is None:
            context, mask = attend.norm(x), attention_mask.bool()[:, None, None]
        else:
            context, mask = attend.norm_context(self.latents).expand(x.shape[0], -1, -1), None
        x = x + attend.fn(attend.norm(x), context, mask)
        return x + feed_forward.fn(feed_forward.norm(x))

    def get_embedding_dimension(self) -> int:
        """Return the width of the token embeddings."""
        return self.width

    def save(self, output_path: str, *args: object, safe_serialization: bool = True, **kwargs: object) -> None:
        """Write config and weights to a folder."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: object) -> TokenPooling:
        """Read config and weights from a folder or the hub."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        hub_options = {"subfolder": subfolder} | {name: kwargs[name] for name in names if name in kwargs}
        model = cls(**cls.load_config(model_name_or_path, **hub_options))
        return cls.load_torch_weights(model_name_or_path, model=model, **hub_options)
