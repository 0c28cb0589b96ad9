"""Make a model smaller: fewer layers, narrower feed-forward layers, a smaller vocabulary.

Usage: python -m jaxembed.prune MODEL OUT --layer-count 6 --mlp-width 1024 --vocabulary-from TEXTS ...
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from jaxembed import cli
from jaxembed.data.text_input import is_pipe, read_texts
from jaxembed.errors import UserError
from jaxembed.training.shutdown import stop_on_signals


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune a model. Return the folder, its sizes and those of MODEL, and the error of its vectors."""
    size_options = (args.layer_count, args.keep_layers, args.mlp_width, args.vocabulary_from)
    if all(option is None for option in size_options):
        raise UserError("prune: nothing to prune. Give --layer-count, --keep-layers, --mlp-width or --vocabulary-from.")
    if args.activations_from and args.mlp_width is None:
        raise UserError("--activations-from: chooses the units of --mlp-width. Add it.")
    out = cli.prepare_new_output(args.out)
    for source in [*(args.vocabulary_from or ()), *(args.activations_from or ())]:
        # A mistyped path is reported before weights are read. A pipe can be read only once.
        if not is_pipe(source):
            next(read_all([source], args.field))
    from transformers.utils import logging

    from jaxembed.hub.card import Card
    from jaxembed.hub.export import export
    from jaxembed.hub.torch_model import import_sentence_transformers

    logging.disable_progress_bar()
    import_sentence_transformers()  # if it is missing, say so before anything is read
    embedder = cli.load_model(args.model, checkpoint=args.checkpoint)
    with stop_on_signals(f"{out}: not written"):
        pruned = prune(embedder, args)
        report = export(pruned, out, "float32", Card(out.name, embedder.revision))
    sizes = {"before": describe_size(embedder), "after": describe_size(pruned)}
    return {"folder": str(out), "revision": pruned.revision, **sizes, **report.summarize()}


def prune(embedder: Any, args: argparse.Namespace) -> Any:
    """Return the pruned model. The vocabulary comes first: activations are then measured with fewer parameters."""
    from jaxembed.hub.pruning import prune_layers, prune_mlp, prune_vocabulary, spread_layers

    if args.vocabulary_from:
        embedder = prune_vocabulary(embedder, read_all(args.vocabulary_from, args.field))
    if args.layer_count is not None or args.keep_layers is not None:
        layers = embedder.model.transformer.layers
        indices = spread_layers(layers, args.layer_count) if args.keep_layers is None else args.keep_layers
        embedder = prune_layers(embedder, indices)
    if args.mlp_width is not None:
        texts = read_all(args.activations_from, args.field) if args.activations_from else None
        embedder = prune_mlp(embedder, args.mlp_width, texts)
    return embedder


def read_all(sources: Sequence[str], field: str) -> Iterator[str]:
    """Yield the texts of several files or pipes. Raise `UserError` if one has none."""
    for source in sources:
        texts = read_texts(source, field)
        if (first_text := next(texts, None)) is None:
            raise UserError(f"{source}: has no texts")
        yield from chain([first_text], texts)


def describe_size(embedder: Any) -> dict[str, int]:
    """Return the number of parameters of a model, and the sizes that pruning changes."""
    import jax

    transformer = embedder.model.transformer
    parameters = sum(x.size for x in jax.tree.leaves(embedder.params))
    sizes = {name: getattr(transformer, name) for name in ("layers", "mlp_width", "vocab_size")}
    return {"parameters": int(parameters), **sizes}


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    about = (
        "OUT is an export like that of jaxembed.export. Its vectors are not those of MODEL, unless only the vocabulary is\n"
        "pruned. Train it further, for example by embedding_matching with MODEL as teacher."
    )
    parser = cli.new_parser("prune", f"{__doc__}\n{about}")
    parser.add_argument("model", metavar="MODEL", help="run directory; exported, PEFT, or Hugging Face folder; or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--checkpoint", default="best", help="checkpoint of a run: best (default), last, or a step")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument(
        "--layer-count", type=cli.integer_from(1), metavar="N", help="keep N layers, evenly spread from the first to the last"
    )
    layers.add_argument(
        "--keep-layers", type=cli.integer_from(0), nargs="+", metavar="I", help="keep these layers, counted from 0"
    )
    parser.add_argument("--mlp-width", type=cli.integer_from(1), metavar="F", help="keep F units of every feed-forward layer")
    parser.add_argument(
        "--activations-from", nargs="+", metavar="TEXTS",
        help="choose the units by their activations on these texts and their output weights (default: by all their weights)",
    )  # fmt: skip
    parser.add_argument(
        "--vocabulary-from", nargs="+", metavar="TEXTS",
        help="keep the tokens that these texts use, and single bytes or ASCII characters; these texts keep their vectors",
    )  # fmt: skip
    parser.add_argument("--field", default="text", help="field of the rows of TEXTS (default: text)")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
