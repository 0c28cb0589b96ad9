"""Read exports with sentence-transformers, or with transformers alone (variant auto_model).

The variants torch, onnx and openvino are backends. With `short`, vectors are truncated to `SHORT_DIM` dimensions.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from auto_model import encode_with_auto_model
from row_files import SHORT_DIM, Row, encode_by_prompt, has_code, run
from sentence_transformers import SentenceTransformer

# Packages of a backend by the module that it needs.
PACKAGES = {"optimum.onnxruntime": ("optimum-onnx", "onnxruntime"), "optimum.intel": ("optimum-intel", "openvino")}


def encode(folder: str, rows: list[Row], backend: str = "torch", dim: int | None = None) -> list[Any]:
    """Return vectors of every row."""
    options: dict[str, Any] = {} if backend == "torch" else {"backend": backend}
    if has_code(folder):
        options["trust_remote_code"] = True
    model = SentenceTransformer(folder, device="cpu", truncate_dim=dim, **options)
    normalize = dim is not None
    return encode_by_prompt(
        rows, lambda texts, prompt: model.encode(texts, prompt=prompt, batch_size=4, normalize_embeddings=normalize)
    )


def list_backend_packages() -> list[str]:
    """Return the installed packages of the backends besides torch."""
    if importlib.util.find_spec("optimum") is None:
        return []
    return [name for module, names in PACKAGES.items() if importlib.util.find_spec(module) for name in names]


VARIANTS = {
    "auto_model": encode_with_auto_model,
    "torch": encode,
    "short": functools.partial(encode, dim=SHORT_DIM),
    "onnx": functools.partial(encode, backend="onnx"),
    "openvino": functools.partial(encode, backend="openvino"),
}
run(VARIANTS, "sentence-transformers", "transformers", *list_backend_packages())
