"""Scores a model on MTEB tasks: python -m jaxembed.evaluate MODEL --tasks STSBenchmark Banking77Classification"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli
from jaxembed.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {"model", "scores": {task: {"score", "instruction", "subsets"}}}."""
    if bool(args.tasks) == bool(args.benchmark):
        raise UserError("name either --tasks or --benchmark")
    from jaxembed.evaluation import mteb_encoder

    tasks = mteb_encoder.find_tasks(args.tasks, args.benchmark)
    out = Path(args.out) if args.out else None
    if out:
        cli.make_folder(out, f"{out}: the folder")
    encoder = load_encoder(args.model, args.checkpoint, args.backend, args.layers, args.adapter, args.fsdp)
    return {"model": args.model, "scores": mteb_encoder.evaluate(encoder, tasks, out)}


def load_encoder(
    model: str,
    checkpoint: str = "best",
    backend: str = "jax",
    layers: int | None = None,
    adapter: str | None = None,
    fsdp: int = 1,
) -> Any:
    """MODEL as an mteb encoder, run by JAX or, for an exported folder, by sentence-transformers."""
    from jaxembed.evaluation.mteb_encoder import MtebEncoder

    if backend == "sentence-transformers":
        if layers is not None or adapter is not None:
            raise UserError("--layers and --adapter shape the JAX model; export that to score it by sentence-transformers")
        from jaxembed.evaluation.torch_encoder import load_torch

        return load_torch(Path(model))
    embedder = cli.load_model(model, checkpoint=checkpoint, layers=layers, adapter=adapter, fsdp=fsdp)

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt, show_progress=True)

    return MtebEncoder(encode, embedder.spec, Path(model).name, embedder.revision)


if __name__ == "__main__":
    parser = cli.parser("evaluate", __doc__)
    cli.add_model(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="MTEB tasks by name")
    parser.add_argument("--benchmark", metavar="NAME", help="all tasks of an MTEB benchmark")
    parser.add_argument("--out", metavar="DIR", help="keep results here; tasks already scored there are not run again")
    parser.add_argument("--backend", choices=["jax", "sentence-transformers"], default="jax", help="default: jax")
    cli.run(main, parser)
