#!/usr/bin/env python3
"""Compile every step of the shipped recipes for a TPU slice and for one GPU, and record memory, step time and hours.

    python benchmarks/recipe_plans.py --machine tpu [RECIPE ...]
    python benchmarks/recipe_plans.py --machine gpu [RECIPE ...]

Writes docs/results/recipe-plans.json, from which the recipes' pages and docs/results/recipe-plans.md take their tables. Results
of other recipes and of the other machine are kept. Without names, recipes that have results are skipped, so the same command
continues after it was stopped. Each stage takes about 20 seconds of a CPU. Nothing is downloaded: the bases are configs of the
real sizes without weights, and the rows are generated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from jaxembed.config import Config, parse_config
from jaxembed.config.sections import read_tree
from jaxembed.errors import UserError
from jaxembed.planning.assignment import run_in_child, write_assignments
from jaxembed.planning.topology import skip_tpu_discovery

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "recipe-plans.json"
RECIPES = ROOT / "configs" / "recipes"
TPU_TOPOLOGY, TPU_NAME = "v5p:2x2x2", "TPU v5p, 2x2x2"
GPU_NAME, GPU_BYTES, GPU_KIND = "one A100 80 GB (estimate)", 80 << 30, "NVIDIA A100 80GB"
MACHINES = {"tpu": TPU_NAME, "gpu": GPU_NAME}
UTILIZATION = 0.4  # of the peak, in the step times
QUERY_WORDS, DOCUMENT_WORDS = 32, 256  # a word is a token of the generated tokenizer
ROWS, PRETRAINING_ROWS = 2500, 33_000  # at least the largest batch, with and without hard negatives
ABOUT = (
    f"Compiled without accelerators, for queries of {QUERY_WORDS} and documents of {DOCUMENT_WORDS} tokens. Memory is what the "
    "compiler assigns, without the code of the program: the TPU compiler for the slice, and the CPU compiler, as an estimate, "
    "for the GPU. Step times are the "
    f"step's matmul FLOPs at {UTILIZATION:.0%} of the chip's peak by its data sheet, not measured. With its special tokens, "
    "such a document fills more than half of a row of 512 tokens: step times there are about twice those of rows that are full."
)
# Bases of the recipes -> presets of their sizes. Adapters on a base have its size too.
PRESETS = {
    "Qwen/Qwen2-0.5B": "qwen2-0.5b", "Qwen/Qwen2-1.5B": "qwen2-1.5b", "Qwen/Qwen2-7B": "qwen2-7b",
    "Qwen/Qwen1.5-7B": "qwen2-7b", "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b", "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "intfloat/e5-mistral-7b-instruct": "mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b",
    "meta-llama/Llama-3.1-8B": "llama3-8b", "google-bert/bert-base-uncased": "bert-base",
}  # fmt: skip
QWEN15_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11_008, "vocab_size": 151_936,
}  # fmt: skip


def write_base(folder: Path, name: str) -> Path:
    """Write the config of a base and a tokenizer. Of the weights there is only the name of the head, which runs look for."""
    import numpy as np
    from safetensors.numpy import save_file

    from jaxembed.data.bpe import train_tokenizer
    from jaxembed.model.presets import find_preset

    path = folder / name.replace("/", "--")
    config = {**find_preset(PRESETS[name]), **(QWEN15_7B if name == "Qwen/Qwen1.5-7B" else {})}
    train_tokenizer([make_text(i, DOCUMENT_WORDS) for i in range(64)], 4096).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": np.zeros(0, np.float32)}, path / "model.safetensors")
    return path


def write_guide(folder: Path) -> Path:
    """Write a small model as the guide of objectives. A plan does not run it, but reads its weights' names and its width."""
    import transformers

    from jaxembed.data.bpe import train_tokenizer

    path = folder / "guide"
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 4096}
    transformers.AutoModel.from_config(transformers.Qwen2Config(**sizes, num_key_value_heads=8)).save_pretrained(path)
    train_tokenizer([make_text(i, DOCUMENT_WORDS) for i in range(64)], 4096).save_pretrained(path)
    return path


def make_text(seed: int, words: int) -> str:
    """Return a text of a number of words. A tokenizer trained on such texts has a token for each of them."""
    return " ".join(f"w{chr(97 + (seed + i) % 26)}" for i in range(words))


def write_rows(folder: Path) -> dict[str, Path]:
    """Write generated rows of every shape. Return the path of each, by `format`."""
    queries = [f"q{i} {make_text(i, QUERY_WORDS - 4)}" for i in range(PRETRAINING_ROWS)]
    documents = [f"d{i} {make_text(i, DOCUMENT_WORDS - 4)}" for i in range(PRETRAINING_ROWS)]
    few = queries[:ROWS]
    scores = {"pos_scores": [0.9], "neg_scores": [0.1] * 8}
    rows: dict[str, list[dict[str, Any]]] = {
        "pretraining": [{"query": q, "pos": [d]} for q, d in zip(queries, documents, strict=True)],
        "pairs": [
            {"query": q, "pos": [documents[i]], "neg": [documents[(i + 1 + j) % ROWS] for j in range(8)]} | scores
            for i, q in enumerate(few)
        ],
        "labels": [{"text": text, "label": str(i % 2)} for i, text in enumerate(documents[:ROWS])],
        "scored_pairs": [{"sentence1": q, "sentence2": few[i - 1], "score": 5} for i, q in enumerate(few)],
        "nli": [{"premise": q, "hypothesis": few[i - 1 - j], "label": 2 * j} for i, q in enumerate(few) for j in (0, 1)],
        "text": [{"text": text} for text in documents[:ROWS]],
        "chat": [{"prompt": q, "response": documents[i]} for i, q in enumerate(few)],
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return {name: folder / f"{name}.jsonl" for name in rows}


def fill_recipe(tree: dict[str, Any], base: Path, rows: Mapping[str, Path]) -> dict[str, Any]:
    """Replace the base, the guide and the paths of a recipe. Mining is left out: it is not part of a step."""
    from jaxembed.config.catalog import read_catalog

    tree["model"]["base"] = str(base)
    for stage in (tree, *tree.get("stages", ())):
        stage.pop("mine", None)
        pairs = "pairs" if stage.get("data", {}).get("hard_negatives") else "pretraining"
        for source in stage.get("data", {}).get("sources", ()):
            kind = read_catalog()[source["catalog"]]["format"]
            source |= {"path": str(rows[pairs if kind in ("pairs", "beir") else kind]), "columns": {}, "label_scores": {}}
            source |= {"label_names": {}} if kind == "labels" else {}
            if kind == "beir":
                source |= {"format": "pairs", "split": ""}
        for objective in stage.get("objectives", ()):
            if "guide" in objective:
                objective["guide"] = str(write_guide(base.parent))
    return tree


def plan_recipe(name: str, machine: str, folder: Path, rows: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return the plan of every stage of a recipe. Each is made in a process of its own."""
    tree = read_tree(RECIPES / f"{name}.yaml")
    base = folder / tree["model"]["base"].replace("/", "--")
    if not base.exists():
        write_base(folder, tree["model"]["base"])
    tree = fill_recipe(tree, base, rows)
    if machine == "gpu":
        tree["mesh"] = {"data": 1, "fsdp": 1}
        tree["model"]["attention_kernel"] = "einsum"
    config = parse_config({**tree, "run": {"name": name, "dir": str(folder / "run")}}, name)
    results = []
    for index, stage in enumerate(config.stages):
        about = {
            "recipe": name, "machine": MACHINES[machine], "stage": index,
            "gradcache_rows": stage.gradcache.rows, "date": str(datetime.date.today()),
        }  # fmt: skip
        start = time.perf_counter()
        try:
            found = run_in_child(partial(plan_stage, config, machine, index, folder / f"{name}-{index}"))
        except UserError as error:
            found = {"error": str(error)[:200]}
        results.append(about | found | {"compile_s": round(time.perf_counter() - start, 1)})
    return results


def plan_stage(config: Config, machine: str, index: int, folder: Path) -> dict[str, Any]:
    """Return the memory, step time and hours of a stage. Data of one step are read."""
    import jax

    from jaxembed.devices.chips import CHIPS
    from jaxembed.planning.plan import make_planning_target, plan
    from jaxembed.runs.open import open_run

    if machine == "tpu":
        write_assignments(folder)
    steps = config.stages[index].train.steps
    short = config.model_copy(update={"stages": tuple(
        stage.model_copy(update={"train": stage.train.model_copy(update={"steps": 1})}) for stage in config.stages
    )})  # fmt: skip
    target = make_planning_target(short.mesh, TPU_TOPOLOGY if machine == "tpu" else None)
    device_bytes = target.memory if machine == "tpu" else GPU_BYTES
    kind = target.mesh.devices.flat[0].device_kind if machine == "tpu" else GPU_KIND
    peak = next(chip.peak_flops for chip in CHIPS if re.search(chip.device_kind, kind))
    run = open_run(short, target.mesh)
    with jax.default_device(None):
        target = target._replace(memory=None, assignments=folder if machine == "tpu" else None)
        stages = run.stages[index : index + 1]
        [report] = plan(short, target, run.model, stages, with_loss=False)["stages"]
    step_s = report["flops_a_device"] / (UTILIZATION * peak)
    return {
        "memory_bytes": report["memory"]["all"] - (report["memory"]["code"] or 0), "device_bytes": device_bytes,
        "step_s": round(step_s, 4), "hours": round(step_s * steps / 3600, 2), "steps": steps, "flops": report["flops"],
        "trained": report["trained"], "rows": report["rows"], "row_length": report["row_length"],
    }  # fmt: skip


def read_plans() -> list[dict[str, Any]]:
    """Return the plans of the file."""
    return json.loads(OUT.read_text())["plans"] if OUT.exists() else []


def record(plans: list[dict[str, Any]]) -> None:
    """Merge plans into the file."""
    old = read_plans()
    new = {(plan["recipe"], plan["machine"]) for plan in plans}
    merged = [plan for plan in old if (plan["recipe"], plan["machine"]) not in new] + plans
    merged.sort(key=lambda plan: (plan["recipe"], plan["machine"], plan["stage"]))
    OUT.write_text(json.dumps({"about": ABOUT, "plans": merged}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names of recipes (default: those without results)")
    parser.add_argument("--machine", choices=MACHINES, required=True, help="machine to compile for")
    args = parser.parse_args()
    skip_tpu_discovery()
    logging.disable(logging.WARNING)
    import jaxembed.runs.open  # once, and not in the process of every stage  # noqa: F401

    recorded = {plan["recipe"] for plan in read_plans() if plan["machine"] == MACHINES[args.machine]}
    names = args.recipes or sorted({path.stem for path in RECIPES.glob("*.yaml")} - recorded)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_rows(folder)
        for name in names:
            plans = plan_recipe(name, args.machine, folder, rows)
            record(plans)
            print(yaml.safe_dump(plans, sort_keys=False), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
