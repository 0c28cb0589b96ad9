"""Tiny models with low-rank adapters that are not zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from helpers.loading import load_model
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.model.embedder import EmbeddingModel


def load_adapted(base: Path, lora: LoraConfig, seed: int = 0) -> tuple[EmbeddingModel, Any]:
    """Load a base with random adapters. `lora_b` is random too, because adapters with its initial zeros do nothing."""
    model, params = load_model(base, EmbeddingSpec(), lora=lora, unroll=False)
    random, flat = np.random.default_rng(seed), flatten_dict(params)
    drawn = {path: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype) for path, x in flat.items() if "lora" in path[-1]}
    return model, unflatten_dict(flat | drawn)
