"""The shipped recipes, and short runs of them on generated rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers import tiny
from jaxembed import config
from jaxembed.config.catalog import read_catalog
from jaxembed.config.sections import read_tree
from jaxembed.config.shipped import find_shipped_folder
from jaxembed.data.jsonl import write_jsonl

RECIPES = sorted((find_shipped_folder() / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


def find_recipe(name: str) -> Path:
    return find_shipped_folder() / "recipes" / f"{name}.yaml"


def iter_sources(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sources of a tree and of its stages."""
    for stage in (tree, *tree.get("stages", ())):
        yield from stage.get("data", {}).get("sources", ())


def load_recipe(name: str) -> config.Config:
    """Load a recipe. Entries of the catalog without a path have a placeholder."""
    return config.load_config(find_recipe(name))


# Runs on generated rows

ROWS = 120  # a window of ranks 50 to 100 needs more documents than that
# Wider than any Matryoshka dimension of a recipe.
BASE_SIZES = tiny.SIZES | {"hidden_size": 544, "num_hidden_layers": 2, "max_position_embeddings": 4096}


def write_base(folder: Path) -> Path:
    """Write a causal language model that is wide and has two layers, one of which may be an early exit."""
    torch.manual_seed(0)
    transformer_config = transformers.Qwen3Config(**BASE_SIZES, head_dim=16)
    transformers.AutoModelForCausalLM.from_config(transformer_config).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, Path]:
    """Write generated rows of every shape. Return the path of each, by `format`; "arxiv" has labels of arXiv."""
    folder.mkdir()
    queries, documents = ([f"{kind} number {i}" for i in range(ROWS)] for kind in ("question", "a document that is text"))
    negatives = [[documents[(i + 1 + j) % ROWS] for j in range(8)] for i in range(ROWS)]
    scores = {"pos_scores": [0.9], "neg_scores": [j / 10 for j in range(8)]}
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"query": q, "pos": [d], "neg": n} | scores for q, d, n in zip(queries, documents, negatives, strict=True)],
        "labels": [{"text": d, "label": str(i % 2)} for i, d in enumerate(documents)],
        "arxiv": [{"text": d, "label": ("cs.AI", "cs.LG")[i % 2]} for i, d in enumerate(documents)],
        "scored_pairs": [{"sentence1": q, "sentence2": documents[i], "score": 5 * (i % 2)} for i, q in enumerate(queries)],
        "nli": [
            {"premise": q, "hypothesis": documents[i + j], "label": 2 * j}
            for i, q in enumerate(queries[:-1]) for j in range(2)
        ],
        "text": [{"text": d} for d in documents],
        "chat": [{"messages": write_exchange(q, d)} for q, d in zip(queries, documents, strict=True)],
    }  # fmt: skip
    for name, listed in rows.items():
        write_jsonl(folder / f"{name}.jsonl", listed)
    write_beir(folder / "beir", queries, documents)
    return {name: folder / f"{name}.jsonl" for name in rows} | {"beir": folder / "beir"}


def write_exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_beir(folder: Path, queries: list[str], documents: list[str]) -> None:
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)])
    judgments = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(len(queries)))
    for split in ("train", "dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text(judgments)


def make_short_run(name: str, root: Path, base: Path, rows: Mapping[str, Path], batch_size: int = 4) -> config.Config:
    """Return a recipe with only base, guide, miner, paths, steps and batch replaced: one step a stage.

    Args:
        name: Name of the recipe.
        root: Folder of the run.
        base: Base, and guide and miner if the recipe has them.
        rows: Path of generated rows by format. Their columns have our names.
        batch_size: Queries a step.
    """
    tree = read_tree(find_recipe(name))
    tree["model"]["base"] = str(base)
    tree["run"] = {"name": name, "dir": str(root / name)}
    for source in iter_sources(tree):
        entry = read_catalog()[source["catalog"]]
        path = rows["arxiv" if "cs.AI" in entry.get("label_names", ()) else entry["format"]]
        source |= {"path": str(path)} | ({} if path.is_dir() else {"columns": {}, "label_scores": {}})
    for stage in tree.get("stages") or [tree]:
        stage["train"] |= {"steps": 1, "batch_size": batch_size}
    for stage in (tree, *tree.get("stages", ())):
        for objective in stage.get("objectives", ()):
            if "guide" in objective:
                objective["guide"] = str(base)
            if "batch_size" in objective:
                objective["batch_size"] = batch_size
        if "model" in stage.get("mine", ()):
            stage["mine"]["model"] = str(base)
    return config.parse_config(tree, name)
