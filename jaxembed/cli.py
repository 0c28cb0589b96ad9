"""What all commands share: one-line errors, and the result as one JSON object on the last line of standard output."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from jaxembed.config import Format
from jaxembed.config.sections import apply_override
from jaxembed.devices import processes
from jaxembed.devices.cpu import configure_jax
from jaxembed.devices.ray_cluster import LOCAL_ADDRESS, RayCluster
from jaxembed.devices.standard_streams import StandardOutputError, protect_standard_streams
from jaxembed.errors import Stopped, UserError, explain_system_error
from jaxembed.files import cache_dir, check_writable, exists, format_json, make_output_folder, make_private_folder
from jaxembed.training.shutdown import stop_on_signals
from jaxembed.verification.http_client import KEY_VARIABLE

if TYPE_CHECKING:
    from jaxembed.hub.embedder import Embedder

log = logging.getLogger("jaxembed")

MAX_TIMEOUT_S = 86_400  # of --timeout
# Libraries whose progress messages are hidden.
CHATTY_LOGGERS = ("jax", "orbax", "httpx", "httpx2", "openai", "datasets", "bm25s", "faiss", "sentence_transformers", "mteb")


def run_command(main: Callable[[argparse.Namespace], Mapping[str, Any]], parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """Parse the command line, run `main`, print its result as JSON, and return it.

    Exits with 2 on a `UserError` and on an error of the system such as a full disk, with 128 + n and a line on signal n, and
    with 141 and no message if the reader of standard output has gone, as after `| head`.
    """
    protect_standard_streams()
    with _exit_with_one_line(), stop_on_signals("an output that exists is complete; if there is none, run the command again."):
        try:
            args = parser.parse_args()
        finally:
            sys.stdout.flush()  # the help; a failure at exit would be a traceback
        _skip_absent_tpu()
        _configure_logging()
        result = main(args)
        if processes.is_first():
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(format_json(result, is_ascii=not encoding.lower().startswith("utf")), flush=True)
        return result


@contextmanager
def _exit_with_one_line() -> Iterator[None]:
    """End the process with one line if the block raises."""
    try:
        yield
    except UserError as error:
        _leave(2, f"error: {error}")
    except Stopped as stop:
        _leave(128 + stop.signal, f"stopped: {stop}")
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "interrupted")
    except StandardOutputError as error:
        if error.errno == errno.EPIPE:
            _leave(128 + signal.SIGPIPE)
        _leave(2, f"error: standard output cannot be written ({error}). Make room, or redirect it to another file.")
    except BaseException as error:
        if line := explain_system_error(error):
            _leave(2, f"error: {line}")
        if isinstance(error, SystemExit):
            raise
        traceback.print_exc()
        _leave(1)


def _leave(code: int, line: str = "") -> NoReturn:
    """End the process at once, after an optional line. A regular exit would wait for threads of libraries, such as Orbax's."""
    if line:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    with suppress(StandardOutputError):
        sys.stdout.flush()
    os._exit(code)


def _configure_logging() -> None:
    """Print our own messages without decoration, and silence those of libraries."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs stack traces of errors that it also raises
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(?!jaxembed)")
    sys.excepthook = _show_exception


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception as Python does, except what TensorStore reports in threads after a failed write was raised already."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _skip_absent_tpu() -> None:
    """Choose the CPU where libtpu is installed, but neither a TPU nor the JAX plugin of another accelerator is.

    JAX would otherwise search for a TPU, which takes seconds and prints a page of warnings.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not devices and importlib.util.find_spec("jax_plugins") is None:
        os.environ["JAX_PLATFORMS"] = "cpu"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with exit code 2.

    Attributes:
        hint: A sentence that precedes the pointer to --help in errors.
        is_intermixed: Whether options may stand between the positional arguments.
    """

    hint = ""
    is_intermixed = False

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments of the command line."""
        return self.parse_intermixed_args(args, namespace) if self.is_intermixed else super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}. {self.hint}See {self.prog} --help.\n")


def new_parser(command: str, description: str) -> Parser:
    """Return a parser for `python -m jaxembed.COMMAND`."""
    return Parser(
        prog=f"python -m jaxembed.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the MODEL argument and the options that select a part of it."""
    parser.add_argument("model", metavar="MODEL", help="run directory; exported, PEFT, or Hugging Face folder; or hub id")
    parser.add_argument("--checkpoint", default="best", help="checkpoint of a run: best (default), last, or a step")
    parser.add_argument("--adapter", metavar="NAME", help="adapter of a run that has several")
    parser.add_argument("--layers", type=int, metavar="N", help="keep only the first N layers (early exit)")
    add_fsdp_argument(parser)


def add_server_arguments(parser: argparse._ActionsContainer, *, timeout_s: float) -> None:
    """Add the options for a server's key and time limit. `timeout_s` is the default limit in seconds."""
    parser.add_argument(
        "--timeout", type=number_up_to(MAX_TIMEOUT_S), default=float(timeout_s), metavar="SECONDS",
        help=f"time that an answer may take (default: {timeout_s:g})",
    )  # fmt: skip
    parser.add_argument(
        "--key-env", default=KEY_VARIABLE, metavar="NAME", help=f"environment variable of the key (default: {KEY_VARIABLE})"
    )


def add_ray_arguments(parser: argparse._ActionsContainer, work: str) -> None:
    """Add --ray and --workers. `work` says what the workers do, such as "send the requests"."""
    parser.add_argument(
        "--ray", nargs="?", const=LOCAL_ADDRESS, metavar="ADDRESS",
        help=f"{work} on a Ray cluster: its address, auto for the cluster of this machine, or no address to start one here",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=integer_from(1), metavar="N", help="workers of --ray (default: the processors of the cluster)"
    )


def check_ray_arguments(args: argparse.Namespace) -> None:
    """Raise `UserError` if there is --workers without --ray."""
    if args.workers and not args.ray:
        raise UserError("--workers is for --ray. Add --ray, or leave it out.")


def open_ray_cluster(args: argparse.Namespace) -> AbstractContextManager[RayCluster | None]:
    """Return the connection to the cluster of --ray; None as its value if the option is not given.

    Ray replaces the handlers of signals, so enter `stop_on_signals` after this.
    """
    return RayCluster(args.ray, args.workers) if args.ray else nullcontext()


def add_row_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that describe the rows of a source."""
    formats = ", ".join(get_args(Format))
    parser.add_argument(
        "--format", default="auto", help=f"format of the rows: {formats} (default: auto, detected from path or first row)"
    )
    parser.add_argument(
        "--split", default="", metavar="NAME", help="split of a dataset (hf:NAME, tfds:NAME, or saved) or of a BEIR folder"
    )
    parser.add_argument("--columns", metavar="MAPPING", help="column that holds each field: '{query: question, pos: answer}'")


def get_row_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_row_arguments` as keys of a source.

    Raises:
        UserError: --config is given too, whose sources describe their rows themselves.
    """
    if args.config and (args.columns or args.split or args.format != "auto"):
        raise UserError("--config: its sources describe their own rows. Remove --format, --split, and --columns.")
    tree = {"format": args.format, "split": args.split}
    if args.columns:
        apply_override(tree, f"columns={args.columns}")
    return tree


def add_fsdp_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option for models that do not fit on one device."""
    parser.add_argument(
        "--fsdp",
        type=integer_from(1),
        default=1,
        metavar="N",
        help="devices that share one copy of the model (default: 1, each device has its own copy)",
    )


def integer_from(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers from `minimum` to `maximum`, for `argparse`. Default: no maximum."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is more than {maximum}")
        return value

    return integer


def number_from(minimum: float) -> Callable[[str], float]:
    """Return a parser of finite numbers from `minimum`, for `argparse`."""
    return _make_number_parser(lambda value: minimum <= value < math.inf, f"finite, at least {minimum:g}")


def number_up_to(maximum: float) -> Callable[[str], float]:
    """Return a parser of numbers above 0 that are at most `maximum`, for `argparse`."""
    return _make_number_parser(lambda value: 0 < value <= maximum, f"above 0, at most {maximum:g}")


def _make_number_parser(is_valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return a parser of numbers. `expected` says in its error which ones are valid."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range ({expected})")
        return value

    return number


def get_model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_model_arguments` for `load_model`."""
    return {name: getattr(args, name) for name in ("checkpoint", "layers", "adapter", "fsdp")}


def load_model(model: str, *, fsdp: int = 1, **options: Any) -> Embedder:
    """Load a model onto all devices.

    Args:
        model: Run directory, folder, or hub id.
        fsdp: Devices that share one copy of the model.
        **options: Options of `Embedder.load`.
    """
    from jaxembed.devices.mesh import make_fsdp_mesh
    from jaxembed.hub.embedder import Embedder

    set_up_jax()
    return Embedder.load(model, mesh=make_fsdp_mesh(fsdp), **options)


def set_up_jax() -> None:
    """Cache compiled programs on disk, so that a second start is quick, and configure JAX for CPUs.

    Call it before JAX is first used. JAX_COMPILATION_CACHE_DIR overrides the folder of the cache.
    """
    import jax

    configure_jax()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = make_private_folder(cache_dir() / "xla")  # private, because its programs are run
    except (OSError, UserError) as error:
        log.warning("compiled programs are not cached: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prepare_new_output(path: str, extensions: Collection[str] = ()) -> Path:
    """Return the path of an output that does not exist yet and can be written.

    Args:
        path: The output.
        extensions: Allowed extensions. Default: any.

    Raises:
        UserError: The output exists, has another extension, or cannot be written.
    """
    out = Path(path)
    if extensions and out.suffix not in extensions:
        raise UserError(f"{out}: expected an output that ends in {' or '.join(extensions)}")
    if exists(out) or out.is_symlink():  # a link to nothing: the output would replace it
        raise UserError(f"{out}: already exists. Remove it, or name another output.")
    return prepare_output(out)


def check_not_out(path: Path, option: str, out: Path) -> None:
    """Check that an option does not name OUT.

    Args:
        path: Value of the option.
        option: Its name.
        out: OUT.

    Raises:
        UserError: Both are the same file.
    """
    if path.resolve() == out.resolve():
        raise UserError(f"{option} {path}: is the same file as OUT. Name another file.")


def prepare_output(out: Path) -> Path:
    """Return the path of an output after creating its folder.

    Raises:
        UserError: `atomic_write` could not write there.
    """
    if not out.name:
        raise UserError(f"{out}: is a folder (expected an output to write). Name another output.")
    make_output_folder(out.parent, f"{out}: its folder")
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Name another output.") from None
    return out
