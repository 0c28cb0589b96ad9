"""Read exports with LangChain, LlamaIndex, Chroma and LanceDB, which load sentence-transformers.

Texts without a prompt, or with the default prompt, are documents. Texts with the prompt `query` are queries. Chroma and LanceDB
only support the default prompt, so other prompts are part of the text there.
"""

import json
from pathlib import Path
from typing import Any

from row_files import Row, has_code, join_texts, run


def read_prompts(folder: str) -> tuple[str, str]:
    """Return the prompt of queries and the default prompt of an export."""
    config = json.loads((Path(folder) / "config_sentence_transformers.json").read_text())
    return config["prompts"].get("query", ""), config["prompts"].get(config.get("default_prompt_name"), "")


def encode_with_langchain(folder: str, rows: list[Row]) -> list[Any]:
    """Return vectors of every row. LangChain passes documents and queries with one prompt each."""
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(
        model_name=folder,
        model_kwargs={"device": "cpu", **({"trust_remote_code": True} if has_code(folder) else {})},
        query_encode_kwargs={"prompt_name": "query"},
    )
    query, _ = read_prompts(folder)
    queries = [row["prompt"] == query for row in rows]
    return [
        model.embed_query(row["text"]) if is_query else model.embed_documents([row["text"]])[0]
        for row, is_query in zip(rows, queries, strict=True)
    ]


def encode_with_llama_index(folder: str, rows: list[Row]) -> list[Any]:
    """Return vectors of every row. LlamaIndex receives the prompts of queries and documents as text."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    query, document = read_prompts(folder)
    model = HuggingFaceEmbedding(
        model_name=folder,
        device="cpu",
        query_instruction=query,
        text_instruction=document,
        trust_remote_code=has_code(folder),
    )
    return [
        model.get_query_embedding(row["text"]) if row["prompt"] == query else model.get_text_embedding(row["text"])
        for row in rows
    ]


def join_query_prompts(folder: str, rows: list[Row]) -> list[str]:
    """Return the texts with their prompts, but without the default prompt, which sentence-transformers adds."""
    _, default = read_prompts(folder)
    return join_texts([{**row, "prompt": ""} if row["prompt"] == default else row for row in rows])


def encode_with_chroma(folder: str, rows: list[Row]) -> list[Any]:
    """Return vectors of every row."""
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    options = {"trust_remote_code": True} if has_code(folder) else {}
    return list(
        SentenceTransformerEmbeddingFunction(model_name=folder, device="cpu", **options)(join_query_prompts(folder, rows))
    )


def encode_with_lancedb(folder: str, rows: list[Row]) -> list[Any]:
    """Return vectors of every row."""
    from lancedb.embeddings import get_registry

    model = get_registry().get("sentence-transformers").create(name=folder, device="cpu", trust_remote_code=has_code(folder))
    return list(model.compute_source_embeddings(join_query_prompts(folder, rows)))


VARIANTS = {
    "langchain": encode_with_langchain,
    "llama_index": encode_with_llama_index,
    "chroma": encode_with_chroma,
    "lancedb": encode_with_lancedb,
}
PACKAGES = (
    "langchain-huggingface", "llama-index-embeddings-huggingface", "chromadb", "lancedb", "sentence-transformers",
    "transformers",
)  # fmt: skip
run(VARIANTS, *PACKAGES)
