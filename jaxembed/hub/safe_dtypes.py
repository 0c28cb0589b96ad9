"""Find the dtypes in which a server may compute an exported model: float32, bfloat16, float16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.hub.parity import PROBE_TEXTS
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer

NARROW_DTYPES = ("bfloat16", "float16")
MIN_SAFE_COSINE = 0.99
MAX_CHECKED_CHARS = 1000  # of a text
DECODER_PREFIX = "0.model."  # of the names of the transformer's layers in sentence-transformers
CODE_TEXTS = [
    "def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:\n"
    '    """Merge overlapping intervals."""\n'
    "    merged: list[tuple[int, int]] = []\n"
    "    for start, end in sorted(intervals):\n"
    "        if merged and start <= merged[-1][1]:\n"
    "            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))\n"
    "        else:\n"
    "            merged.append((start, end))\n"
    "    return merged\n\n\n"
    "class LruCache:\n"
    "    def __init__(self, capacity: int = 128) -> None:\n"
    "        self._entries: OrderedDict[str, bytes] = OrderedDict()\n"
    "        self._capacity = capacity\n\n"
    "    def get(self, key: str, default: bytes = b'') -> bytes:\n"
    "        if key not in self._entries:\n"
    "            return default\n"
    "        self._entries.move_to_end(key)\n"
    "        return self._entries[key]\n",
    "#include <stdint.h>\n\nstatic const uint32_t TABLE[16] = {\n"
    "    0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,\n"
    "    0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,\n};\n\n"
    "uint32_t crc32(const uint8_t *data, size_t length) {\n    uint32_t crc = ~0u;\n"
    "    while (length--) {\n        crc = TABLE[(crc ^ *data) & 0xf] ^ (crc >> 4);\n"
    "        crc = TABLE[(crc ^ (*data++ >> 4)) & 0xf] ^ (crc >> 4);\n    }\n    return ~crc;\n}\n"
    + "        " * 12 + "}}}}))));;;;\n",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DtypeQuality:
    """Quality of a model's vectors when it computes in a dtype.

    Attributes:
        dtype: Name of the dtype.
        cosine: Smallest cosine to the vectors of the same weights in float32; NaN if a vector is not finite.
        overflow: First layer with a value too large for the dtype; empty if there is none.
    """

    dtype: str
    cosine: float
    overflow: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether vectors are finite and close to those of float32."""
        return self.cosine >= MIN_SAFE_COSINE and not self.overflow

    @property
    def finding(self) -> str:
        """The measurement in a few words."""
        cosine = "vectors are NaN" if np.isnan(self.cosine) else f"smallest cosine {self.cosine:.4f}"
        return f"overflow in {self.overflow}, {cosine}" if self.overflow else cosine


def measure_dtypes(folder: Path, spec: EmbeddingSpec) -> list[DtypeQuality]:
    """Measure the narrow dtypes on short probe texts and on code, with the query prompt if there is one.

    Code has long runs of rare tokens, which prose lacks. The texts are few and short, because they are encoded three times.

    Args:
        folder: The exported folder. Each dtype is compared with float32 for the weights in it.
        spec: Spec of the model.
    """
    import torch

    from jaxembed.formats.rounded_arithmetic import round_layers

    prompt = spec.prompts.get("query", spec.plain_prompt)
    texts = [text + spec.get_suffix(prompt) for text in [*PROBE_TEXTS, *CODE_TEXTS] if len(text) <= MAX_CHECKED_CHARS]
    model = load_sentence_transformer(folder).float()
    reference = encode_torch(model, texts, prompt)
    qualities = []
    for dtype in NARROW_DTYPES:
        with round_layers(model, getattr(torch, dtype)) as overflow:
            vectors = encode_torch(model, texts, prompt)
        cosine = np.sum(reference * vectors, axis=1).min()  # NaN if any is
        qualities.append(DtypeQuality(dtype, float(cosine), overflow.layer.removeprefix(DECODER_PREFIX)))
    return qualities


def list_unsafe_dtypes(qualities: Iterable[DtypeQuality]) -> list[str]:
    """Return one line for each dtype in which the model must not be served."""
    return [
        f"{quality.dtype} is not safe for this model ({quality.finding}). Serve it in another dtype."
        for quality in qualities
        if not quality.is_safe
    ]
