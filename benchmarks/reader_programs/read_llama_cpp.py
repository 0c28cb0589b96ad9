"""Convert exports to GGUF (float32) and read them with llama.cpp's server, in one slot.

The environment variable CONVERTER is the path of llama.cpp's convert_hf_to_gguf.py. A prompt is part of the text.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import xllamacpp
from row_files import Row, join_texts, run

sys.path.insert(0, str(Path(os.environ["CONVERTER"]).parent))
import convert_hf_to_gguf

POOLING_TYPES = {
    "pooling_mode_mean_tokens": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN,
    "pooling_mode_cls_token": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_CLS,
    "pooling_mode_lasttoken": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST,
}


def convert(folder: str) -> Path:
    """Write the GGUF file of an export next to it, and return its path."""
    out = Path(f"{folder}.gguf")
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf-to-gguf").addHandler(handler)
    sys.argv[1:] = [folder, "--outfile", str(out), "--outtype", "f32"]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as error:
        raise RuntimeError(f"the converter stopped ({error.code}): {'; '.join(messages)}") from None
    return out


def read_pooling_flag(folder: str) -> str:
    """Return the flag of the pooling that is set in 1_Pooling/config.json."""
    config = json.loads((Path(folder) / "1_Pooling" / "config.json").read_text())
    return next(key for key, value in config.items() if key.startswith("pooling_mode_") and value is True)


def encode(folder: str, rows: list[Row]) -> list[Any]:
    """Return the vector of every row; None for a text that the server refuses, because it does not truncate long ones.

    Raises:
        RuntimeError: The server refuses every text.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(convert(folder))
    params.embedding, params.n_parallel, params.n_ctx, params.warmup = True, 1, 0, False
    params.n_batch = params.n_ubatch = 2048
    params.pooling_type = POOLING_TYPES[
        read_pooling_flag(folder)
    ]  # like --pooling; the converter writes none for Llama and Mistral
    server = xllamacpp.Server(params)
    vectors = []
    for text in join_texts(rows):
        answer = server.handle_embeddings({"input": text, "model": "model"})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        vectors.append(answer["data"][0]["embedding"] if "data" in answer else None)
    Path(f"{folder}.gguf").unlink()
    if all(vector is None for vector in vectors):
        raise RuntimeError(f"the server: {answer}")
    return vectors


run({"server": encode}, "xllamacpp")
