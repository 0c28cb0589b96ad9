"""Run a command of jaxembed: jaxembed COMMAND ..., the same as python -m jaxembed.COMMAND ..."""

from __future__ import annotations

import runpy
import sys

from jaxembed import __version__

COMMANDS = {
    "data": "validate, preview, convert, and measure training data; extract pairs from Python packages",
    "train": "train a model, or plan a run with --plan",
    "synthesize": "write training data with an LLM server, by a recipe of prompts",
    "curate": "clean, filter, deduplicate, and decontaminate training data, with a report",
    "mine": "find hard negatives for pairs",
    "encode": "write the vectors of texts",
    "evaluate": "score a model on MTEB tasks and your own data; compare two models",
    "report": "write a page about runs and scores",
    "export": "write a sentence-transformers folder",
    "verify": "compare a running server with the folder that it serves",
    "merge": "average several models",
    "prune": "make a model smaller: layers, feed-forward width, vocabulary",
}
USAGE = "usage: jaxembed COMMAND ...\n\n" + "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())


def main() -> None:
    """Run the command that the first argument names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{USAGE}\n\njaxembed COMMAND --help describes a command.")
        return
    if name == "--version":
        print(f"jaxembed {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(_fail(f"{name!r} is not a command; expected {', '.join(COMMANDS)}. See jaxembed --help."))
    sys.argv = [f"jaxembed {name}", *rest]
    # Not imported: the module jaxembed.train would replace the function jaxembed.train.
    runpy.run_module(f"jaxembed.{name}", run_name="__main__", alter_sys=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
