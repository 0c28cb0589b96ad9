"""Check that a running server gives the vectors of the folder that it serves, and explain differences.

Usage: python -m jaxembed.verify FOLDER URL
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.training.shutdown import stop_on_signals
from jaxembed.verification.http_client import KEY_VARIABLE, HttpClient, parse_root, read_key

API_NAMES = ("auto", "openai", "tei", "vllm", "llama.cpp", "ollama")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Compare a server with a folder. Return whether they are equal, the cosines, and what differs."""
    import jax

    jax.config.update("jax_platforms", args.platform)
    from jaxembed.devices.processes import progress_bar
    from jaxembed.verification import comparison
    from jaxembed.verification.report import iter_report_lines, summarize_verification
    from jaxembed.verification.served_vectors import connect

    root = parse_root(args.url)
    with stop_on_signals(f"{args.folder} is not compared, and nothing is written; the same command starts over"):
        folder = comparison.open_folder(Path(args.folder))
        client = HttpClient(root, read_key(args.key_env), args.key_env, args.timeout)
        server = connect(client, args.api, args.model, args.dim)
        with progress_bar(total=len(folder.probes), unit="texts", leave=False) as bar:
            served = comparison.request_vectors(server, folder.inputs, bar.update)
        result = comparison.compare_with_probes(folder, server, served, args.tolerance)
        if not result.are_vectors_equal and not args.no_diagnosis:
            cli.set_up_jax()
            is_tolerance_set = args.tolerance is not None
            result = comparison.diagnose_server(folder, server, served, result, args.dtype, is_tolerance_set)
    print(*iter_report_lines(folder, server, result), sep="\n")
    return summarize_verification(server, result)


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    about = (
        "The texts of FOLDER/probe.json are sent with their prompts, because servers add none: first one by one, then\n"
        "several in one request. If vectors differ, variants of the folder's model are computed in JAX (mask, pooling,\n"
        "special tokens, prompt, truncation, width, dtype), and those that give the server's vectors are named.\n\n"
        "Exit code: 0 if everything is equal, 1 if something differs, 2 for bad input. A key that the server needs is read\n"
        f"from the environment variable {KEY_VARIABLE}, or from the one that --key-env names."
    )
    parser = cli.new_parser("verify", f"{__doc__}\n{about}")
    parser.add_argument("folder", metavar="FOLDER", help="exported folder that the server serves, or a copy of it")
    parser.add_argument("url", metavar="URL", help="root URL of the server, such as http://localhost:8000")
    parser.add_argument(
        "--api", choices=API_NAMES, default="auto",
        help="API of the server: openai (/v1/embeddings), tei (/embed), vllm (/pooling), llama.cpp (/embeddings), ollama "
        "(/api/embed); default: auto, TEI and Ollama by their own API, all others by OpenAI's",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="model of the server (default: the first that it lists)")
    parser.add_argument("--dim", type=cli.integer_from(1), metavar="N", help="request vectors of N dimensions (Matryoshka)")
    parser.add_argument(
        "--tolerance", type=cli.number_up_to(1), metavar="COSINE",
        help="least cosine of equal vectors (default: 0.9999; for half precision, that of vectors with 1.5 times the error "
        "of the model's own computation in that dtype)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"],
        help="dtype in which the server computes (default: the one that it reports, otherwise that of the folder's weights)",
    )  # fmt: skip
    parser.add_argument("--no-diagnosis", action="store_true", help="do not look for what differs (the model is not loaded)")
    parser.add_argument(
        "--platform", choices=["cpu", "cuda", "tpu"], default="cpu",
        help="device of the diagnosis (default: cpu, which leaves accelerators to the server)",
    )  # fmt: skip
    cli.add_server_arguments(parser, timeout_s=60)
    return parser


if __name__ == "__main__":
    sys.exit(0 if cli.run_command(main, make_parser())["equal"] else 1)
