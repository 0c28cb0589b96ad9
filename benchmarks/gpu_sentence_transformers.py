"""Measure sentence-transformers for benchmarks/gpu.py: its model, pooling and loss, with PyTorch's SDPA attention.

Training does what its trainer does with `bf16=True`: float32 parameters under autocast, fused AdamW, and gradient clipping.
Texts are padded to the longest of their side, as its collator does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from gpu_workload import LORA_ALPHA, LORA_RANK, MAX_TOKENS, TINY_SIZES, Workload, build_tokenizer, write_words
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoConfig, AutoModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENCODE_BATCH = 128
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model(work: Workload, dtype: torch.dtype) -> SentenceTransformer:
    """Return a model with random weights.

    Transformer loads a folder. To avoid writing the large model, the folder has a tiny one, which is replaced after loading.
    """
    config = dict(work.hf_config)
    kind = config.pop("model_type")
    tiny = {**config, **TINY_SIZES, "vocab_size": config["vocab_size"]}
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(AutoConfig.for_model(kind, **tiny)).save_pretrained(folder)
        build_tokenizer(config["vocab_size"]).save_pretrained(folder)
        transformer = Transformer(
            folder,
            max_seq_length=MAX_TOKENS,
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
        )
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        transformer.model = AutoModel.from_config(AutoConfig.for_model(kind, **config), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    pooling = Pooling(config["hidden_size"], pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=DEVICE)


def add_adapters(model: SentenceTransformer) -> None:
    """Freeze the transformer and add adapters to all its projections, in float32."""
    from peft import LoraConfig

    transformer = model[0].model
    transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LORA_TARGETS))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def pad_texts(texts: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return token ids and attention mask, [N, T] each, of texts padded to the longest."""
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": torch.from_numpy(ids).to(DEVICE), "attention_mask": torch.from_numpy(mask).to(DEVICE)}


def measure_training(work: Workload) -> dict[str, Any]:
    """Train on one batch again and again. Return tokens, median seconds, FLOPs and memory of a step."""
    texts = work.draw_texts()
    model = build_model(work, torch.bfloat16 if work.lora else torch.float32)
    if work.lora:
        add_adapters(model)
    if work.recompute:
        model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True)
    loss_function = MultipleNegativesRankingLoss(model, scale=20.0)
    half = len(texts) // 2
    sides = [pad_texts(texts[:half]), pad_texts(texts[half:])]
    labels = torch.zeros(half, dtype=torch.long, device=DEVICE)
    seconds = []
    for _ in range(1 + work.steps):
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_function([dict(features) for features in sides], labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(value), f"the loss is {value}"
    return {
        "tokens": sum(map(len, texts)),
        "computed_tokens": sum(features["input_ids"].numel() for features in sides),
        "seconds": statistics.median(seconds[1:]),
        "flops": work.count_flops(texts),
        "gib": read_device_peak_gib(),
        "loss": value,
    }


def measure_encoding(work: Workload) -> dict[str, Any]:
    """Encode texts as a user does, in bfloat16. Return their tokens and the median seconds of a round after the first."""
    texts = work.draw_texts()
    model = build_model(work, torch.bfloat16)
    words, seconds = [write_words(text) for text in texts], []
    for _ in range(1 + work.steps):
        start = time.perf_counter()
        model.encode(words, batch_size=ENCODE_BATCH, show_progress_bar=False)
        seconds.append(time.perf_counter() - start)
    return {"tokens": sum(map(len, texts)), "seconds": statistics.median(seconds[1:]), "gib": read_device_peak_gib()}


def read_device_peak_gib() -> float | None:
    """Return the peak of the GPU's memory in GiB, or None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
