"""Run a command of jaxembed: jaxembed COMMAND ..., the same as python -m jaxembed.COMMAND ..."""

from __future__ import annotations

import importlib
import sys

from jaxembed import __version__, cli

COMMANDS = {
    "data": "validate, preview, convert, and measure training data; extract pairs from Python packages",
    "train": "train a model, or plan a run with --plan",
    "mine": "find hard negatives for pairs",
    "encode": "write the vectors of texts",
    "evaluate": "score a model on MTEB tasks",
    "export": "write a sentence-transformers folder",
    "merge": "average several models",
}
USAGE = "usage: jaxembed COMMAND ...\n\n" + "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())


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
    module = importlib.import_module(f"jaxembed.{name}.__main__" if name == "data" else f"jaxembed.{name}")
    sys.argv = [f"jaxembed {name}", *rest]
    cli.run_command(module.main, module.make_parser())


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
