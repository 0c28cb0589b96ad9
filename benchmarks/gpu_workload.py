"""Models and texts that both sides of benchmarks/gpu.py share. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.model.presets import find_preset

MAX_TOKENS, MIN_TOKENS = 512, 8
LENGTH_SPREAD = 0.8  # standard deviation of the logarithm of the lengths
LORA_RANK, LORA_ALPHA = 16, 32
TINY_SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training or encoding job.

    Attributes:
        preset: Preset of the transformer.
        texts: Texts of a step, half of them queries; or texts to encode.
        mean_tokens: Mean length of the texts before they are truncated to MAX_TOKENS.
        steps: Timed steps, or timed rounds of encoding.
        lora: Whether adapters are trained on a frozen bfloat16 base, instead of all parameters.
        recompute: Whether the activations of each layer are recomputed in the backward pass.
        chunk_rows: Rows that are encoded at a time (gradient caching); None for all.
        is_tiny: Whether the model is reduced to a size for a dry run.
    """

    preset: str
    texts: int
    mean_tokens: int = 128
    steps: int = 10
    lora: bool = False
    recompute: bool = False
    chunk_rows: int | None = None
    is_tiny: bool = False

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The Hugging Face config of the transformer."""
        return {**find_preset(self.preset), **(TINY_SIZES if self.is_tiny else {})}

    def shrink(self) -> Workload:
        """Return the same job at a size that a CPU finishes in seconds."""
        chunk_rows = self.chunk_rows and 1
        return dataclasses.replace(self, preset="tiny", texts=16, steps=1, mean_tokens=16, chunk_rows=chunk_rows, is_tiny=True)

    def draw_texts(self) -> list[np.ndarray]:
        """Draw the token ids of each text. Lengths are log-normal, at most MAX_TOKENS."""
        random = np.random.default_rng(0)
        mean = np.log(self.mean_tokens) - LENGTH_SPREAD**2 / 2
        lengths = np.exp(random.normal(mean, LENGTH_SPREAD, self.texts)).astype(int).clip(MIN_TOKENS, MAX_TOKENS)
        return [random.integers(0, self.hf_config["vocab_size"], length, np.int32) for length in lengths]

    def count_flops(self, texts: list[np.ndarray]) -> float:
        """Return the FLOPs of the matmuls of a training step, without recomputation (as `jaxembed.training.mfu` counts)."""
        c = self.hf_config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        head_width = c.get("head_dim", c["hidden_size"] // heads)
        attention_weights = c["hidden_size"] * head_width * (2 * heads + 2 * kv_heads)
        weights = attention_weights + 3 * c["hidden_size"] * c["intermediate_size"]
        lengths = np.array([len(text) for text in texts], np.float64)
        # 2 FLOPs per token and weight for each matmul: forward, gradient of the inputs, and gradient of trained weights.
        weight_flops = (4 if self.lora else 6) * weights * lengths.sum()
        attention_flops = 12 * head_width * heads * (lengths**2).sum()
        return float(c["num_hidden_layers"] * (weight_flops + attention_flops))


WORKLOADS = {
    "full": Workload("qwen2-0.5b", texts=128, steps=20),
    "lora": Workload("mistral-7b", texts=64, steps=5, lora=True, recompute=True),
    "large_batch": Workload("qwen2-0.5b", texts=65_536, mean_tokens=64, steps=1, chunk_rows=64, recompute=True),
    "encode": Workload("qwen2-0.5b", texts=4096, steps=3),
}


def write_words(tokens: np.ndarray) -> str:
    """Return a text that `build_tokenizer` turns into these tokens."""
    return " ".join(f"w{token}" for token in tokens)


def build_tokenizer(vocab_size: int) -> Any:
    """Build a fast tokenizer with one token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{token}": token for token in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0", model_max_length=MAX_TOKENS)
