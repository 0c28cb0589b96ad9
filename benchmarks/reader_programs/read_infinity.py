"""Read exports with infinity's engine on torch. A prompt is part of the text."""

import asyncio
from typing import Any

from infinity_emb import AsyncEngineArray, EngineArgs
from row_files import Row, join_texts, run


async def embed(folder: str, texts: list[str]) -> list[Any]:
    """Return vectors of texts from an engine that is started for them."""
    args = EngineArgs(
        model_name_or_path=folder, engine="torch", device="cpu", dtype="float32", bettertransformer=False, compile=False,
        model_warmup=False,
    )  # fmt: skip
    engine = AsyncEngineArray.from_args([args])[0]
    async with engine:
        vectors, _ = await engine.embed(sentences=texts)
    return list(vectors)


def encode(folder: str, rows: list[Row]) -> list[Any]:
    """Return vectors of every row."""
    return asyncio.run(embed(folder, join_texts(rows)))


run({"torch": encode}, "infinity-emb", "sentence-transformers", "transformers")
