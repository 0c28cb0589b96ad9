"""Write a sentence-transformers model as one ONNX graph that includes attention mask, positions, pooling and projection.

Its inputs are `input_ids` and `attention_mask`, int64 [B, T], with padding on either side. Its outputs have the names that
readers look for: `last_hidden_state` [B, T, D] (sentence-transformers, transformers.js) and `sentence_embedding` [B, D'] (TEI).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
# The oldest opset in which the graph needs no other operators. Old versions of readers support it too.
OPSET = 18
# A file of protobuf holds less than 2 GiB. Larger weights are next to it, in a file whose name readers derive.
MAX_INLINE_BYTES = 1_500_000_000
EXTERNAL_DATA_SUFFIX = "_data"
DYNAMIC_AXES = {
    "input_ids": {0: "batch_size", 1: "sequence_length"},
    "attention_mask": {0: "batch_size", 1: "sequence_length"},
    "last_hidden_state": {0: "batch_size", 1: "sequence_length"},
    "sentence_embedding": {0: "batch_size"},
}


class BakedModel(nn.Module):
    """A `SentenceTransformer` as a function of only token ids and attention mask.

    Args:
        model: The model. Its modules are shared.
    """

    def __init__(self, model: Any):
        super().__init__()
        transformer, *rest = model
        self.transformer = transformer.auto_model
        self.rest = nn.ModuleList(rest)
        # RoBERTa's positions start after the row of the padding token.
        embeddings: Any = getattr(self.transformer, "embeddings", None)
        has_offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = int(embeddings.padding_idx) + 1 if has_offset else 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token vectors [B, T, D] and the vectors of the texts [B, D']."""
        positions = self.first_position + (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding moves no token
        config = self.transformer.config
        mask = build_gemma_masks(config, attention_mask) if config.model_type == "gemma3_text" else attention_mask
        output = self.transformer(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state
        features = {"token_embeddings": hidden, "attention_mask": attention_mask}
        for module in self.rest:
            features = module(features)
        return hidden, features["sentence_embedding"]


def build_gemma_masks(config: Any, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Build the attention masks of Gemma 3. Those of transformers use `torch.vmap` and cannot be traced.

    Args:
        config: Config of the transformer. For a bidirectional mask, transformers has halved its `sliding_window`.
        attention_mask: 1 for tokens, 0 for padding [B, T].

    Returns:
        Terms to add to the attention scores [B, 1, T, T], by the kind of layer.
    """
    index = torch.ones_like(attention_mask).cumsum(dim=1)
    distance = index[:, :, None] - index[:, None, :]  # of a query to the keys before it
    is_visible = (attention_mask[:, None, :] > 0).expand_as(distance)
    if not config.use_bidirectional_attention:
        is_visible = is_visible & (distance >= 0)
    masks = {"full_attention": is_visible, "sliding_attention": is_visible & (distance.abs() < config.sliding_window)}
    hidden_score = torch.finfo(torch.float32).min  # not infinity: rows of padding stay finite
    return {kind: torch.where(mask, 0.0, hidden_score)[:, None] for kind, mask in masks.items()}


class GraphTransformer(nn.Module):
    """A transformer that computes its hidden states with an ONNX session. Replaces that of a `SentenceTransformer`.

    Args:
        session: An onnxruntime `InferenceSession` of a baked graph.
        config: Config of the transformer, which sentence-transformers reads.
    """

    def __init__(self, session: Any, config: Any):
        super().__init__()
        self.session, self.config = session, config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: object) -> BaseModelOutput:
        """Return the token vectors [B, T, D]."""
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        (hidden,) = self.session.run([OUTPUTS[0]], feed)
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))


def write_graph(model: Any, texts: list[str], path: Path) -> None:
    """Write a baked graph in float32.

    Args:
        model: A `SentenceTransformer` in float32 on the CPU. Its attention is set to plain matmuls.
        texts: Two texts of different lengths, which are traced.
        path: File to write, `model.onnx`. Large weights are written to `model.onnx_data`.
    """
    model[0].auto_model.set_attn_implementation("eager")  # rows of padding stay finite, and the graph is the shortest
    features = model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    inputs = tuple(features[name] for name in INPUTS)
    raw_folder = path.parent / "raw"
    raw_folder.mkdir(parents=True)
    raw_path = raw_folder / "model.onnx"
    # The exporter that traces takes a second where the one on torch.export takes half a minute, and needs no other packages.
    # Comparisons with other batch sizes, lengths and padding sides reveal values that the trace fixed by mistake.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            BakedModel(model).eval(), inputs, str(raw_path), input_names=list(INPUTS), output_names=list(OUTPUTS),
            dynamic_axes=DYNAMIC_AXES, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    _move_graph(raw_folder, path)


def _move_graph(raw_folder: Path, path: Path) -> None:
    """Move a graph to its place, with all large weights in one file."""
    files = list(raw_folder.iterdir())
    if sum(file.stat().st_size for file in files) <= MAX_INLINE_BYTES:
        (raw_folder / "model.onnx").rename(path)
    else:
        location = path.name + EXTERNAL_DATA_SUFFIX
        graph = onnx.load(str(raw_folder / "model.onnx"))
        onnx.save_model(graph, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=location)
    for file in raw_folder.iterdir():
        file.unlink()
    raw_folder.rmdir()


def quantize_graph(path: Path, quantized_path: Path) -> None:
    """Write a graph with int8 weights. Activations are quantized dynamically.

    Args:
        path: A baked graph.
        quantized_path: File to write.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_large = (path.parent / (path.name + EXTERNAL_DATA_SUFFIX)).exists()
    logging.disable(logging.WARNING)  # hides the advice to run a preprocessing step, which changes nothing here
    try:
        quantize_dynamic(
            path, quantized_path, op_types_to_quantize=["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
