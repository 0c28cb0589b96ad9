"""Score a model on MTEB tasks and on files of your own, compare it with another model, and find leaked texts.

Usage: python -m jaxembed.evaluate MODEL --tasks STSBenchmark Banking77Classification
       python -m jaxembed.evaluate MODEL --beir DIR --sts FILE --labels FILE --compare OTHER
"""

from __future__ import annotations

import argparse
from typing import Any

from jaxembed import cli
from jaxembed.config.instructions import INSTRUCTION_TABLES
from jaxembed.curation.overlap import DEFAULT_NGRAM_WORDS
from jaxembed.devices import processes
from jaxembed.evaluation.evaluate import TASK_SOURCES, evaluate
from jaxembed.evaluation.vector_cache import DEFAULT_MEMORY_GIB
from jaxembed.search.precision import PRECISIONS, RANGES_FILE
from jaxembed.training.shutdown import stop_on_signals

JOIN_LIMIT_S = 600.0  # time limit for all processes of a run to join


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model.

    Returns:
        {"model", "scores": {task: scores}}, as `EvaluationTask.score` describes them. --compare adds "comparison"
        (`compare_tasks`), and --check-leaks adds "leaks" (`find_leaks`).
    """
    message = (
        f"{args.out} keeps the scores of finished tasks; the same command continues" if args.out else "nothing was written"
    )
    with stop_on_signals(message):
        if args.backend == "jax":
            cli.set_up_jax()
            with processes.process_group(JOIN_LIMIT_S):
                return evaluate(args)
        return evaluate(args)


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
        "--precision", choices=PRECISIONS, nargs="+", default=[],
        help="precisions to score; texts are encoded once (default: float32). With several of --dim, all but the first are "
        "scored at the largest width only",
    )  # fmt: skip
    parser.add_argument(
        "--ranges", metavar="RANGES.npy", help=f"ranges of int8 and uint8, of MODEL (default: its {RANGES_FILE})"
    )
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
        type=cli.number_from(0),
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
