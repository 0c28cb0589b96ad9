"""Run an evaluation: open the tasks, load the models, score and compare them, and write the files of --out."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jaxembed.config.instructions import InstructionTable, read_instruction_table
from jaxembed.devices import processes
from jaxembed.evaluation import air_bench, mteb_submission, mteb_tasks, user_data
from jaxembed.evaluation.comparison import COMPARISON_FILE, ItemScores, compare_tasks
from jaxembed.evaluation.encoders import check_compared_model, choose_widths, load_encoder, set_precisions
from jaxembed.evaluation.instruction_variants import add_variants
from jaxembed.evaluation.leaks import LEAKS_FILE, check_leaks
from jaxembed.evaluation.score_table import TABLES_FILE, build_tables
from jaxembed.evaluation.shared_encoding import serve_encoding, share_encoding
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import (
    MODEL_FILE,
    SCORES_FILE,
    EvaluationTask,
    FinishedTasks,
    check_instructions,
    check_names,
    score_tasks,
)
from jaxembed.evaluation.vector_cache import VectorCache
from jaxembed.files import exists, expand_home, lock_folder, make_output_folder, read_json, write_json, write_text
from jaxembed.search.precision import find_ranges

log = logging.getLogger("jaxembed")

MARKDOWN_FILE = "scores.md"

# Modules with `add_arguments(parser)`, and `open_tasks(args)`, which returns the tasks that these options name.
TASK_SOURCES = (mteb_tasks, user_data, air_bench)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model, as one of the processes of a group. Process 0 runs the tasks; the others encode with it.

    Returns:
        {"model", "scores"}, with "comparison" and "leaks" if the options ask for them. Only process 0 has scores.
    """
    with ExitStack() as locks:
        return _evaluate(args, locks)


def _evaluate(args: argparse.Namespace, locks: ExitStack) -> dict[str, Any]:
    """Run `evaluate`. The lock of --out is acquired after the checks of the options, and `locks` releases it."""
    if processes.count() > 1:
        import jax

        jax.devices()  # initialize devices on all processes at once, before a library on process 0 (bm25s) does
    instruction_table = read_instruction_table(args.instructions) if args.instructions else None
    find_ranges(args.precision, args.model, args.ranges)
    if args.compare:
        find_ranges(args.precision, args.compare, None)
        check_compared_model(args.compare, args.backend, args.dim, args.max_length)
    out = Path(args.out) if args.out else None
    result: dict[str, Any] = {}
    tasks: list[EvaluationTask] = []
    if processes.is_first():
        tasks = open_tasks(args, instruction_table)
        if out:
            choose_widths(args.model, args.checkpoint, args.dim, args.max_length)  # a wrong name leaves the results of others
            locks.enter_context(lock_folder(out, out))
            begin_results(out, args.model)
        if args.check_leaks is not None:
            result["leaks"] = check_leaks(tasks, args.check_leaks or args.model, args.leak_words, out)
    processes.barrier()  # errors in the tasks are raised before any process loads weights
    items_by_task: dict[str, ItemScores] | None = {} if args.compare else None
    scores = score_model(args, args.model, tasks, instruction_table, items_by_task, is_main=True)
    if items_by_task is not None:  # memory holds one model at a time
        other_items_by_task: dict[str, ItemScores] = {}
        score_model(args, args.compare, air_bench.omit_results(tasks), instruction_table, other_items_by_task, is_main=False)
        if processes.is_first():
            result["comparison"] = compare_tasks(items_by_task, other_items_by_task, (args.model, args.compare))
            if out:
                write_json(out / COMPARISON_FILE, result["comparison"])
    return result | {"model": args.model, "scores": scores}


def open_tasks(args: argparse.Namespace, instruction_table: InstructionTable | None) -> list[EvaluationTask]:
    """Return the tasks of all sources, after the checks that need no model.

    Raises:
        UserError: The options name no tasks or unknown ones, or the table has an instruction for none of them.
    """
    tasks: list[EvaluationTask] = [task for source in TASK_SOURCES for task in source.open_tasks(args)]
    check_names(tasks)
    if instruction_table:
        check_instructions(instruction_table, args.instructions, tasks)
    if args.instruction_variants:
        tasks = add_variants(tasks, args.instruction_variants)
    mteb_submission.check_options(args)
    if args.out:
        make_output_folder(Path(args.out), f"{args.out}: the folder")
    return tasks


def begin_results(out: Path, model: str) -> None:
    """Write the name of MODEL into the folder of its results, after the results of another model are removed."""
    path = out / MODEL_FILE
    folder = expand_home(model)
    content = {"model": str(folder.resolve()) if exists(folder) else model}
    if exists(path) and read_json(path) != content:
        for name in (SCORES_FILE, MARKDOWN_FILE, TABLES_FILE, COMPARISON_FILE, LEAKS_FILE):
            (out / name).unlink(missing_ok=True)
    write_json(path, content)


def score_model(
    args: argparse.Namespace,
    model: str,
    tasks: Sequence[EvaluationTask],
    instruction_table: InstructionTable | None,
    items_by_task: dict[str, ItemScores] | None,
    is_main: bool,
) -> dict[str, Any]:
    """Load a model and score it. The options that select part of a model, and the scores in --out, are for MODEL only.

    Args:
        args: The options.
        model: MODEL, or the model that it is compared with.
        tasks: The tasks.
        instruction_table: Instructions of the user. None: there are none.
        items_by_task: Filled with the scores by item of each task. None: they are not needed.
        is_main: Whether `model` is MODEL, not the model of --compare.

    Returns:
        Scores by task, on process 0.
    """
    options = {name: getattr(args, name) for name in ("checkpoint", "layers", "adapter")} if is_main else {}
    encoder = load_encoder(model, backend=args.backend, widths=args.dim, max_length=args.max_length, fsdp=args.fsdp, **options)
    set_precisions(encoder, model, args.precision, args.ranges if is_main else None)
    if not processes.is_first():
        serve_encoding(encoder.encode_with_prompt)
        return {}
    out = Path(args.out) if args.out and is_main else None
    if instruction_table:
        encoder.use_instructions(instruction_table, args.instructions)
    encoder.cache = make_cache(encoder, args)
    finished_tasks = FinishedTasks(Path(args.out)) if args.out else None
    try:
        with share_encoding(encoder):
            scores = score_tasks(encoder, tasks, out, items_by_task, finished_tasks)
    finally:
        if not args.out:  # no later run finds what an interrupted task has left
            encoder.cache.clear()
    tables = build_tables(encoder.name, tasks, scores)
    report = "\n\n".join(table.format() for table in tables)
    log.info("\n%s\n", report)
    if out:
        write_text(out / MARKDOWN_FILE, f"{report}\n")
        write_json(out / TABLES_FILE, [dataclasses.asdict(table) for table in tables])
    if args.submission and is_main:
        mteb_submission.write_model_submission(args, encoder, tasks)
    return scores


def make_cache(encoder: TaskEncoder, args: argparse.Namespace) -> VectorCache:
    """Return the cache of a task's vectors. Its files are in --out, or in a temporary folder."""
    folder = Path(args.out) / "vectors" if args.out else Path(tempfile.gettempdir()) / f"jaxembed-vectors-{os.getpid()}"
    memory_bytes = int(args.vector_memory * 2**30)
    # Every version of the vectors, and every instruction of the queries, uses the same vectors of the documents again.
    keeps_arrays = len(encoder.versions) > 1 or bool(args.instruction_variants)
    return VectorCache(folder, encoder.revision, encoder.width, memory_bytes, keeps_arrays)
