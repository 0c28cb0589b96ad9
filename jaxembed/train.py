"""Trains an embedding model: python -m jaxembed.train CONFIG.yaml [key.sub=value ...]"""

from __future__ import annotations

import argparse
from typing import Any

from jaxembed import cli, config


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config and trains; returns what `jaxembed.run.train` does."""
    settings = config.load(args.config, args.overrides)
    from jaxembed.run import train  # imports JAX: after the config is known to be good

    cli.use_compilation_cache()
    return train(settings)


if __name__ == "__main__":
    parser = cli.parser("train", __doc__ + "\n\nThe same command resumes a run whose directory holds a checkpoint.")
    parser.add_argument(
        "--keys", action="version", version=config.reference().replace("%", "%%"), help="list every config key and exit"
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="see configs/ for examples")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as train.steps=100 or run.dir=runs/a")
    cli.run(main, parser)
