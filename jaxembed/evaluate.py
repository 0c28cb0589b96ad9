"""Score a model on MTEB tasks and on files of your own, compare it with another model, and find leaked texts.

Usage: python -m jaxembed.evaluate MODEL --tasks STSBenchmark Banking77Classification
       python -m jaxembed.evaluate MODEL --beir DIR --sts FILE --labels FILE --compare OTHER
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli
from jaxembed.config.instructions import INSTRUCTION_TABLES, InstructionTable, read_instruction_table
from jaxembed.curation.overlap import DEFAULT_NGRAM_WORDS
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.evaluation import air_bench, mteb_submission, mteb_tasks, own_data
from jaxembed.evaluation.comparison import COMPARISON_FILE, ItemScores, compare_tasks
from jaxembed.evaluation.instruction_variants import VariantTask, add_variants
from jaxembed.evaluation.leaks import check_leaks
from jaxembed.evaluation.score_table import build_tables
from jaxembed.evaluation.shared_encoding import serve_encoding, share_encoding
from jaxembed.evaluation.task_encoder import TaskEncoder, check_widths
from jaxembed.evaluation.tasks import EvaluationTask, check_instructions, check_names, score_tasks
from jaxembed.evaluation.vector_cache import DEFAULT_MEMORY_GIB, VectorCache
from jaxembed.files import write_json, write_text

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("jaxembed")

TABLES_FILE = "scores.md"
JOIN_LIMIT_S = 600.0  # time limit for all processes of a run to join

# Modules with `add_arguments(parser)`, and `open_tasks(args)`, which returns the tasks that these options name.
TASK_SOURCES = (mteb_tasks, own_data, air_bench)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model.

    Returns:
        {"model", "scores": {task: scores}}, as `EvaluationTask.score` describes them. --compare adds "comparison"
        (`compare_tasks`), and --check-leaks adds "leaks" (`find_leaks`).
    """
    if args.backend == "jax":
        cli.set_up_jax()
        with processes.process_group(JOIN_LIMIT_S):
            return evaluate(args)
    return evaluate(args)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model, as one of the processes of a group. Process 0 runs the tasks; the others encode with it."""
    if processes.count() > 1:
        import jax

        jax.devices()  # initialize devices on all processes at once, before a library on process 0 (bm25s) does
    table = read_instruction_table(args.instructions) if args.instructions else None
    if args.compare:
        check_other(args.compare, args)
    out = Path(args.out) if args.out else None
    result: dict[str, Any] = {}
    tasks: list[EvaluationTask] = []
    if processes.is_first():
        tasks = open_tasks(args, table)
        if args.check_leaks is not None:
            result["leaks"] = check_leaks(tasks, args.check_leaks or args.model, args.leak_words, out)
    processes.barrier()  # errors in the tasks are raised before any process loads weights
    items: dict[str, ItemScores] | None = {} if args.compare else None
    scores = score_model(args, args.model, tasks, table, items, is_main=True)
    if items is not None:  # memory holds one model at a time
        other_items: dict[str, ItemScores] = {}
        score_model(args, args.compare, tasks, table, other_items, is_main=False)
        if processes.is_first():
            result["comparison"] = compare_tasks(items, other_items, (args.model, args.compare))
            if out:
                write_json(out / COMPARISON_FILE, result["comparison"])
    return result | {"model": args.model, "scores": scores}


def score_model(
    args: argparse.Namespace,
    model: str,
    tasks: Sequence[EvaluationTask],
    table: InstructionTable | None,
    items: dict[str, ItemScores] | None,
    is_main: bool,
) -> dict[str, Any]:
    """Load a model and score it. The options that select part of a model, and --out, apply to MODEL only.

    Args:
        args: The options.
        model: MODEL, or the model that it is compared with.
        tasks: The tasks.
        table: The user's instructions.
        items: Receives the scores by item. None: they are not needed.
        is_main: Whether it is MODEL.

    Returns:
        Scores by task, on process 0.
    """
    options = cli.get_model_options(args) if is_main else {"fsdp": args.fsdp}
    encoder = load_encoder(model, backend=args.backend, widths=args.dim, max_length=args.max_length, **options)
    if not processes.is_first():
        serve_encoding(encoder.encode_with_prompt)
        return {}
    out = Path(args.out) if args.out and is_main else None
    if table:
        encoder.use_instructions(table, args.instructions)
    encoder.cache = make_cache(encoder, out, args)
    with share_encoding(encoder):
        scores = score_tasks(encoder, tasks, out, items)
    report = "\n\n".join(table.format() for table in build_tables(encoder.name, tasks, scores))
    log.info("\n%s\n", report)
    if out:
        write_text(out / TABLES_FILE, f"{report}\n")
    if args.submission and is_main:
        write_submission_of(args, encoder, tasks)
    return scores


def check_other(model: str, args: argparse.Namespace) -> None:
    """Check that the model of --compare exists and fits the options, without loading its weights. Raises `UserError`."""
    from jaxembed.hub.resolve import find_base_with_weights

    if args.backend == "sentence-transformers":
        from jaxembed.hub.torch_model import check_is_sentence_transformer

        check_is_sentence_transformer(Path(model))
    find_base_with_weights(model)  # also rejects a run with several adapters: no option selects one here
    choose_widths(model, "best", args.dim, args.max_length)


def open_tasks(args: argparse.Namespace, table: InstructionTable | None) -> list[EvaluationTask]:
    """Return the tasks of all sources, after the checks that need no model.

    Raises:
        UserError: The options name no tasks or unknown ones, or the table has an instruction for none of them.
    """
    tasks: list[EvaluationTask] = [task for source in TASK_SOURCES for task in source.open_tasks(args)]
    check_names(tasks)
    if table:
        check_instructions(table, args.instructions, tasks)
    if args.instruction_variants:
        tasks = add_variants(tasks, args.instruction_variants)
    if args.submission:
        check_submission(args)
    if args.out:
        cli.make_output_folder(Path(args.out), f"{args.out}: the folder")
    return tasks


def check_submission(args: argparse.Namespace) -> None:
    """Check the options of a submission.

    Raises:
        UserError: The model has no name for the hub, or there is no folder of results or no task of MTEB.
    """
    mteb_submission.check_name(args.submission_name, args.model)
    if not args.out or not (args.tasks or args.benchmark):
        raise UserError("--submission: needs the results of MTEB tasks. Add --out DIR, and --tasks or --benchmark.")
    cli.make_output_folder(Path(args.submission), f"{args.submission}: the folder")


def write_submission_of(args: argparse.Namespace, encoder: TaskEncoder, tasks: Sequence[EvaluationTask]) -> None:
    """Write the submission of a model that was scored."""
    from jaxembed.hub.resolve import find_model

    facts = mteb_submission.read_facts(
        find_model(args.model, args.checkpoint), mteb_submission.check_name(args.submission_name, args.model)
    )
    plain_tasks = [task.task if isinstance(task, VariantTask) else task for task in tasks]
    mteb_tasks_scored = [task.task for task in plain_tasks if isinstance(task, mteb_tasks.MtebTask)]
    folder = Path(args.submission)
    mteb_submission.write_submission(folder, facts, encoder, mteb_tasks_scored, Path(args.out) / "results")
    log.info("wrote the submission to %s; the evaluation guide says where its files go", folder)


def make_cache(encoder: TaskEncoder, out: Path | None, args: argparse.Namespace) -> VectorCache:
    """Return the cache of a task's vectors. Its files are in `out`, or in a temporary folder."""
    folder = out / "vectors" if out else Path(tempfile.gettempdir()) / f"jaxembed-vectors-{os.getpid()}"
    memory_bytes = int(args.vector_memory * 2**30)
    # Every width, and every instruction of the queries, uses the same vectors of the documents again.
    keeps_all = len(encoder.widths) > 1 or bool(args.instruction_variants)
    return VectorCache(folder, encoder.revision, encoder.width, memory_bytes, keeps_all)


def choose_widths(model: str, checkpoint: str, widths: Sequence[int], max_length: int | None) -> tuple[int, tuple[int, ...]]:
    """Find a model without loading its weights. Return the width of its vectors, and the widths to score.

    Raises:
        UserError: There is no such model, or its vectors or its maximum length are smaller than the options ask for.
    """
    from jaxembed.hub.resolve import find_model  # imports JAX

    base = find_model(model, checkpoint)
    width = base.spec.projection or base.transformer.width
    chosen_widths = check_widths(widths, base.spec, width)
    if max_length is not None and max_length > base.transformer.max_positions:
        raise UserError(
            f"--max-length: {max_length} is above the model's limit ({base.transformer.max_positions} tokens). Lower it."
        )
    return width, chosen_widths


def load_encoder(
    model: str,
    checkpoint: str = "best",
    backend: str = "jax",
    *,
    widths: Sequence[int] = (),
    max_length: int | None = None,
    **options: Any,
) -> TaskEncoder:
    """Load a model for evaluation.

    Args:
        model: Run directory, folder or hub id.
        checkpoint: Checkpoint of a run: best, last, or a step.
        backend: jax, or sentence-transformers for an exported folder.
        widths: Widths at which tasks are scored.
        max_length: Maximum tokens of a text. Default: that of the model.
        **options: layers, adapter and fsdp of `cli.load_model`.

    Raises:
        UserError: If the model cannot be loaded, or an option does not apply to it or to the backend.
    """
    width, chosen_widths = choose_widths(model, checkpoint, widths, max_length)
    if backend == "sentence-transformers":
        if options.get("layers") is not None or options.get("adapter") is not None:
            raise UserError(
                "--backend sentence-transformers: --layers and --adapter apply to the JAX model only. Export the model with "
                "these options, and score that folder."
            )
        from jaxembed.evaluation.torch_encoder import load_torch_encoder

        encoder = load_torch_encoder(Path(model), max_length)
    else:
        encoder = _load_jax_encoder(model, checkpoint, max_length, options)
    encoder.width, encoder.widths = width, chosen_widths
    return encoder


def _load_jax_encoder(model: str, checkpoint: str, max_length: int | None, options: dict[str, Any]) -> TaskEncoder:
    from jaxembed.hub.identity import compute_model_digest

    embedder = cli.load_model(model, checkpoint=checkpoint, **options)
    if max_length is not None:
        embedder = embedder.with_spec(embedder.spec.replace(max_length=max_length))

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt)

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
        help="consecutive words that a text must share with a training text to count as leaked (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--instructions",
        metavar="FILE|NAME",
        help="instructions by task, which override those of the model: a YAML or JSON file, or the table of a published model "
        f"({', '.join(INSTRUCTION_TABLES)})",
    )
    parser.add_argument(
        "--instruction-variants", metavar="FILE",
        help="score tasks under other instructions too, and without any: a YAML file of lists of instructions by task",
    )  # fmt: skip
    parser.add_argument(
        "--dim", type=cli.integer_from(1), nargs="+", default=[], metavar="N",
        help="widths to score (Matryoshka); texts are encoded once",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=cli.integer_from(1), metavar="N", help="maximum tokens of a text (default: that of the model)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the results; tasks already scored there are not run again")
    parser.add_argument(
        "--submission", metavar="DIR", help="write a submission to MTEB's leaderboard: ModelMeta module and results"
    )
    parser.add_argument("--submission-name", metavar="ORG/MODEL", help="name of the model on the hub (default: MODEL)")
    parser.add_argument(
        "--vector-memory",
        type=float,
        default=DEFAULT_MEMORY_GIB,
        metavar="GIB",
        help="memory for the vectors of a task in GiB; more vectors go to disk (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=["jax", "sentence-transformers"],
        default="jax",
        help="library that runs the model (default: jax); sentence-transformers runs exported folders",
    )
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
