"""Score a model on MTEB tasks and on files of your own, compare it with another model, and find leaked texts.

Usage: python -m jaxembed.evaluate MODEL --tasks STSBenchmark Banking77Classification
       python -m jaxembed.evaluate MODEL --beir DIR --sts FILE --labels FILE --compare OTHER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli
from jaxembed.curation.overlap import DEFAULT_NGRAM_WORDS
from jaxembed.errors import UserError
from jaxembed.evaluation import mteb_tasks, own_data
from jaxembed.evaluation.comparison import COMPARISON_FILE, ItemScores, compare_tasks
from jaxembed.evaluation.leaks import check_leaks
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import check_names, score_tasks
from jaxembed.files import write_json

if TYPE_CHECKING:
    import numpy as np


# Modules with `add_arguments(parser)`, and `open_tasks(args)`, which returns the tasks that these options name.
TASK_SOURCES = (mteb_tasks, own_data)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model.

    Returns:
        {"model", "scores": {task: scores}}, as `EvaluationTask.score` describes them. --compare adds "comparison"
        (`compare_tasks`), and --check-leaks adds "leaks" (`find_leaks`).
    """
    if args.compare:
        check_exists(args.compare, args.backend)
    tasks = [task for source in TASK_SOURCES for task in source.open_tasks(args)]
    check_names(tasks)
    out = Path(args.out) if args.out else None
    if out:
        cli.make_output_folder(out, f"{out}: the folder")
    result: dict[str, Any] = {}
    if args.check_leaks is not None:
        result["leaks"] = check_leaks(tasks, args.check_leaks or args.model, args.leak_words, out)
    encoder = load_encoder(args.model, backend=args.backend, **cli.get_model_options(args))
    items: dict[str, ItemScores] | None = {} if args.compare else None
    result |= {"model": args.model, "scores": score_tasks(encoder, tasks, out, items)}
    if items is not None:
        del encoder  # memory holds one model at a time
        other_items: dict[str, ItemScores] = {}
        score_tasks(load_encoder(args.compare, backend=args.backend, fsdp=args.fsdp), tasks, items=other_items)
        result["comparison"] = compare_tasks(items, other_items, (args.model, args.compare))
        if out:
            write_json(out / COMPARISON_FILE, result["comparison"])
    return result


def check_exists(model: str, backend: str) -> None:
    """Check that a model can be found, without loading its weights. Raises `UserError`."""
    from jaxembed.hub.resolve import find_base_with_weights
    from jaxembed.hub.torch_model import check_is_sentence_transformer

    if backend == "sentence-transformers":
        check_is_sentence_transformer(Path(model))
    find_base_with_weights(model)


def load_encoder(
    model: str,
    checkpoint: str = "best",
    backend: str = "jax",
    layers: int | None = None,
    adapter: str | None = None,
    fsdp: int = 1,
) -> TaskEncoder:
    """Load a model for evaluation.

    Args:
        model: Run directory, folder or hub id.
        checkpoint: Checkpoint of a run: best, last, or a step.
        backend: jax, or sentence-transformers for an exported folder.
        layers: Number of layers to keep. Default: all.
        adapter: Adapter of a run that has several.
        fsdp: Devices that share one copy of the model.

    Raises:
        UserError: If the model cannot be loaded, or an option does not apply to the backend.
    """
    if backend == "sentence-transformers":
        if layers is not None or adapter is not None:
            raise UserError(
                "--backend sentence-transformers: --layers and --adapter apply to the JAX model only. Export the model with "
                "these options, and score that folder."
            )
        from jaxembed.evaluation.torch_encoder import load_torch_encoder

        return load_torch_encoder(Path(model))
    from jaxembed.hub.identity import compute_model_digest

    embedder = cli.load_model(model, checkpoint=checkpoint, layers=layers, adapter=adapter, fsdp=fsdp)

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt, show_progress=True)

    revision = f"{embedder.revision}-{compute_model_digest(embedder)}"
    return TaskEncoder(encode, embedder.spec, Path(model).name, revision)


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.new_parser("evaluate", __doc__)
    cli.add_model_arguments(parser)
    for source in TASK_SOURCES:
        source.add_arguments(parser)
    parser.add_argument(
        "--compare", metavar="OTHER", help="compare with another model on the same tasks, by a paired bootstrap"
    )
    parser.add_argument(
        "--check-leaks", nargs="?", const="", metavar="RUN|CONFIG",
        help="report texts of the tasks that occur in the training files of a run or config (default: MODEL)",
    )  # fmt: skip
    parser.add_argument(
        "--leak-words", type=cli.integer_from(1), default=DEFAULT_NGRAM_WORDS, metavar="N",
        help="number of words that a text must share in a row with a training text (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder for the results; tasks already scored there are not run again")
    parser.add_argument(
        "--backend",
        choices=["jax", "sentence-transformers"],
        default="jax",
        help="library that runs the model (default: jax); sentence-transformers runs exported folders",
    )
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
