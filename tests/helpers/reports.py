"""Runs for reports: tiny, with a retrieval set, latent attention, and hostile texts."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import yaml

from helpers import tiny
from jaxembed.config import load_config
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_jsonl
from jaxembed.runs.train import train

HOSTILE = [
    "</script><script>window.attacked = 1</script>",
    '<img src=x onerror="window.attacked = 2"> & \'quotes\' "more"',
    "]]> <!-- <script> --> \u2028 \u2029 {{ 7 * 7 }} ${1}",
    "emoji \U0001f642, a\ttab, and a zero\u200bwidth space",
]
TOPICS = ["card", "PIN", "delivery", "account", "transfer", "limit", "fee", "refund", "phone", "address", "loan", "rate"]


def write_run(folder: Path, name: str = "tiny", *overrides: str) -> Path:
    """Train a run of a few steps on a tiny random model, and return its directory."""
    if not (folder / "base").exists():
        tiny.write_folder(folder / "base", "qwen3")
        answers = [f"To change your {topic}, open the app and choose {topic}." for topic in TOPICS]
        others = [*answers[1:], answers[0]]
        questions = [f"how do I change my {topic}" for topic in TOPICS]
        rows = zip(questions, answers, others, strict=True)
        write_jsonl(folder / "pairs.jsonl", [{"query": q, "pos": [a], "neg": [b]} for q, a, b in rows])
        texts = [*HOSTILE, *answers]
        queries = [f"about {text}" for text in texts]
        corpus = {f"d{i}": text for i, text in enumerate(texts)}
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(texts))}
        write_beir(folder / "faq", corpus, {f"q{i}": text for i, text in enumerate(queries)}, relevant)
        sts = [{"sentence1": q, "sentence2": t, "score": i % 3} for i, (q, t) in enumerate(zip(queries, texts, strict=True))]
        write_jsonl(folder / "sts.jsonl", sts)
    pooling = {"kind": "latent_attention", "latents": 8, "heads": 2}
    source = {"path": str(folder / "pairs.jsonl"), "name": "<b>faq</b>"}
    tree = {
        "model": {"base": str(folder / "base"), "unroll": False, "pooling": pooling},
        "data": {"max_length": 48, "hard_negatives": 1, "sources": [source]},
        "matryoshka": {"dims": [16]},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "eval_every": 2, "loggers": []},
        "eval": {
            "bm25": True,
            "sets": [
                {"name": "faq", "path": str(folder / "faq")},
                {"name": "sts", "kind": "sts", "path": str(folder / "sts.jsonl")},
            ],
        },
        "mesh": {"data": 1},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path, [f"run.dir={folder / name}", *overrides])
    train(config, f"python -m jaxembed.train {name}.yaml")
    return folder / name


def write_report(*words: str | Path) -> dict[str, Any]:
    """Call the report command with arguments in this process, and return its result."""
    command = runpy.run_module("jaxembed.report", run_name="command")
    result: dict[str, Any] = command["main"](command["make_parser"]().parse_args([str(word) for word in words]))
    return result
