"""What a command does if standard output or standard error cannot be written, or the system refuses something."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ENV
from jaxembed.devices.standard_streams import LossyStream
from jaxembed.errors import explain_system_error

# A command whose main function is the body.
COMMAND = """
import errno, logging, os, sys, threading, time
from jaxembed import cli
from jaxembed.devices import processes
from jaxembed.errors import UserError
def main(args):
    {body}
    return {{"done": 1}}
cli.run_command(main, cli.new_parser("test", "A test."))
"""
NOISE = """
    for i in processes.progress_bar(range(20000)): logging.getLogger("jaxembed").info("a line")
    print("another", file=sys.stderr, flush=True)
"""


class PanicException(BaseException):
    """Stands for the exception of libraries in Rust."""


def run(body: str, shell: str = '"$@"', *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose main function has a body, in a line of bash."""
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-c", COMMAND.format(body=body), *arguments]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2> >(head -c 10 >/dev/null)"])
def test_standard_error_never_ends_a_command(redirection: str) -> None:
    done = run(NOISE, f'"$@" {redirection}')
    assert (done.returncode, done.stdout) == (0, '{"done": 1}\n')


def test_a_closed_standard_error_is_not_the_next_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    done = run(f'file = open({str(path)!r}, "w"); os.write(2, b"noise"); assert file.fileno() > 2', '"$@" 2>&-')
    assert done.returncode == 0 and path.read_text() == ""


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    for body in ("for i in range(100000): print(i)", "pass"):
        done = run(body, '"$@" | true')
        assert (done.returncode, done.stderr) == (141, "")
    assert run("pass", '"$@" | true', "--help").stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_text_can_be_printed(encoding: str) -> None:
    """Names of files may have bytes that are not UTF-8, and the encoding of a terminal may lack characters."""
    text = "\udcff \u2192 \U0001f642 \xe9"
    body = f"text = {text!a}; print(text); return dict(done=text)"
    done = run(body, f'PYTHONIOENCODING={encoding} "$@"')
    assert done.returncode == 0, done.stderr
    shown, result = done.stdout.splitlines()
    assert json.loads(result) == {"done": text} and shown.startswith("\\udcff ")


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    for body in ("for i in range(100000): print(i)", "pass"):
        done = run(body, '"$@" >/dev/full')
        assert done.returncode == 2
        assert done.stderr.startswith("error: standard output cannot be written (No space left on device). ")
        assert done.stderr.count("\n") == 1


def test_an_error_of_the_system_is_one_line() -> None:
    done = run('raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/a.npy")')
    assert done.returncode == 2
    line = "error: /data/a.npy: cannot be used (No space left on device). Make room on the disk, and run the same command.\n"
    assert done.stderr == line


def test_errors_that_a_library_repeats_in_its_threads_are_hidden() -> None:
    """TensorStore calls `sys.excepthook` from C++."""
    done = run('[sys.excepthook(RuntimeError, RuntimeError(text), None) for text in ("Event loop is closed", "another")]')
    assert (done.returncode, done.stderr) == (0, "RuntimeError: another\n")


def test_other_errors_keep_their_traceback() -> None:
    done = run('raise OSError(errno.EINVAL, "mistake")')
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_command_leaves_at_once_after_its_error() -> None:
    start = time.monotonic()
    done = run('threading.Thread(target=time.sleep, args=[600]).start(); raise UserError("wrong")')
    assert (done.returncode, done.stderr) == (2, "error: wrong.\n")
    assert time.monotonic() - start < 300


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory. Free memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory (RESOURCE_EXHAUSTED: 9 GB). Free memory"),
        (RuntimeError("INTERNAL: YNNPACK operation failed"), "out of memory (INTERNAL: YNNPACK operation failed). Free"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/a\n"), r"/cache/a\n: cannot be used (Read-only file system)."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file: cannot be used (Disk quota exceeded)."),
        (Exception("No space left on device (os error 28)"), "a file: cannot be used (No space left on device). Make room on"),
        (Exception("WordPiece error: Missing [UNK]"), "a library failed (WordPiece error: Missing [UNK]). Check the tokenizer"),
        (PanicException("called `Result::unwrap()`"), "a library failed (called `Result::unwrap()`). Check the tokenizer.json"),
        (RuntimeError("shape mismatch"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
        (ValueError("x"), None),
    ],
)
def test_errors_of_the_system_are_explained(error: BaseException, line: str | None) -> None:
    explained = explain_system_error(error)
    assert explained is None if line is None else explained is not None and explained.startswith(line)


def test_a_lossy_stream_behaves_like_its_stream(capsys: pytest.CaptureFixture[str]) -> None:
    stream = LossyStream(sys.stderr)
    print("a", file=stream, flush=True)
    assert capsys.readouterr().err == "a\n"
    assert (stream.encoding, stream.isatty()) == (sys.stderr.encoding, False)


def test_a_lossy_stream_without_a_stream_discards_everything(tmp_path: Path) -> None:
    closed: Any = (tmp_path / "file").open("w")
    closed.close()
    for stream in (None, closed):
        print("a", file=LossyStream(stream), flush=True)
        assert not LossyStream(stream).isatty()
    assert os.path.getsize(tmp_path / "file") == 0
