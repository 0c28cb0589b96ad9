"""What the commands share: errors in one line, the result as one JSON object on the last line of standard output."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from jaxembed.config import Format
from jaxembed.config.sections import apply_override
from jaxembed.devices import processes
from jaxembed.errors import Stopped, UserError
from jaxembed.files import cache_dir, check_writable, exists

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxembed import Embedder


def run(main: Callable[[argparse.Namespace], Mapping[str, Any]], parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """Parses the command line, runs `main`, prints what it returns and returns it too. Exits 2 on a user's error, 128 + n on
    signal n.
    """
    args = parser.parse_args()
    _skip_absent_tpu()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs whole stacks of errors that it raises too
    for chatty in ("jax", "orbax", "httpx", "httpx2", "datasets", "bm25s", "faiss", "sentence_transformers", "mteb"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(?!jaxembed)")
    try:
        result = main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if processes.is_first():
        print(json.dumps(result, ensure_ascii=False))
    return result


def _skip_absent_tpu() -> None:
    """Where the TPU compiler is installed without a TPU, and no other accelerator's plugin: JAX need not look for one.

    It would take seconds and print a page of warnings.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not devices and importlib.util.find_spec("jax_plugins") is None:
        os.environ["JAX_PLATFORMS"] = "cpu"


class Parser(argparse.ArgumentParser):
    """argparse with the errors of every other bad input: one line, exit code 2. `hint` ends that line. With `intermixed`
    arguments may stand behind options too: they are `behind` of what is parsed.
    """

    hint, intermixed = "", False

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, behind = self.parse_known_args(args, namespace)
        if unknown := [text for text in behind if text.startswith("-") or not self.intermixed]:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        found.behind = behind
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.hint}see {self.prog} --help\n")


def parser(command: str, description: str) -> Parser:
    return Parser(
        prog=f"python -m jaxembed.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL argument and the options that go with it."""
    parser.add_argument("model", metavar="MODEL", help="run directory, exported, PEFT or Hugging Face folder, or hub id")
    parser.add_argument("--checkpoint", default="best", help="of a run: best (default), last, or a step")
    parser.add_argument("--adapter", metavar="NAME", help="of a run that has several: the one to use")
    parser.add_argument("--layers", type=int, metavar="N", help="keep the first N layers only (early exit)")
    add_fsdp(parser)


def add_rows(parser: argparse._ActionsContainer) -> None:
    """The options that say what the rows of a named source are."""
    told = f"of the rows: {', '.join(get_args(Format))} (default: auto, by the path or the first row)"
    parser.add_argument("--format", default="auto", help=told)
    parser.add_argument(
        "--columns", metavar="MAPPING", help="our fields and the columns that hold them: '{query: question, pos: answer}'"
    )


def row_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_rows`'s options say, as keys of a source; `UserError` where --config names one that says it itself."""
    if args.config and (args.columns or args.format != "auto"):
        raise UserError("--config: its sources say what their rows are; leave --format and --columns out")
    tree = {"format": args.format}
    if args.columns:
        apply_override(tree, f"columns={args.columns}")
    return tree


def add_fsdp(parser: argparse._ActionsContainer) -> None:
    """The option for models that no device holds alone."""
    told = "devices that share one copy of the model; default: 1, each has its own"
    parser.add_argument("--fsdp", type=whole(1), default=1, metavar="N", help=told)


def whole(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_model`'s options say, for `load_model`."""
    return {name: getattr(args, name) for name in ("checkpoint", "layers", "adapter", "fsdp")}


def load_model(model: str, *, fsdp: int = 1, **options: Any) -> Embedder:
    """A model with the options of `Embedder.load`, on all devices, `fsdp` of which share a copy."""
    from jaxembed import Embedder

    set_up_jax()
    return Embedder.load(model, mesh=make_mesh(fsdp), **options)


def make_mesh(fsdp: int) -> Mesh:
    """All devices, `fsdp` of which share one copy of the model; `UserError` where they do not come out even.

    From here on the memory of programs is kept (`retain_freed_memory`).
    """
    import jax

    from jaxembed.devices.cpu import retain_freed_memory
    from jaxembed.devices.mesh import make_mesh

    if (count := jax.device_count()) % fsdp:
        raise UserError(f"--fsdp is {fsdp}, which does not divide the number of devices here, {count}; use a divisor of that")
    retain_freed_memory()
    return make_mesh(fsdp=fsdp)


@contextmanager
def stoppable(told: str) -> Iterator[None]:
    """While entered, SIGTERM and Ctrl-C end the block by `Stopped`, which says `told`. For the main thread alone."""
    found = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal found
        found = signal.Signals(number)
        raise KeyboardInterrupt  # which no library takes for an error of its own

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(told, found) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_up_jax() -> None:
    """Keeps compiled programs on disk, so that a second start is quick. JAX_COMPILATION_CACHE_DIR names another place.

    Before JAX's first use. On CPUs, programs run in the thread that calls them, as `retain_freed_memory` needs it.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def new_output(path: str, endings: Collection[str] = ()) -> Path:
    """An output path that does not exist yet, of one of the endings if there are any, and can be written; or `UserError`."""
    out = Path(path)
    if endings and out.suffix not in endings:
        raise UserError(f"{out}: expected an output that ends in {' or '.join(endings)}")
    if exists(out):
        raise UserError(f"{out}: already exists; remove it or name another output")
    return writable(out)


def writable(out: Path) -> Path:
    """The path, its folder made; `UserError` where `written_whole` cannot write there."""
    make_folder(out.parent, f"{out}: its folder")
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another output") from None
    return out


def make_folder(folder: Path, told: str) -> None:
    """Makes a folder of an output where there is none; the `UserError` begins with `told`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{told} cannot be made ({error.strerror}); name another output") from None
