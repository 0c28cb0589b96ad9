"""Exports that fail, are stopped or killed: one line, and nothing left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from helpers import tiny
from helpers.commands import ENV, Process
from jaxembed.data.scratch import SCRATCH_LOCK_FILE, SCRATCH_PREFIX, move_into_place, open_scratch_folder
from jaxembed.errors import UserError

# Starts a command in which the export waits after it has written the first folder.
SLOW_COMMAND = """
import runpy, sys, time
from jaxembed.hub import export
compare = export.encode_probes_torch

def wait(*args, **options):
    print("written", flush=True)
    time.sleep(600)

export.encode_probes_torch = wait
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("scratch") / "base", "qwen3")


def make_command(name: str, base: Path, out: Path) -> list[str]:
    return ["jaxembed.merge", str(out), str(base), str(base)] if name == "merge" else ["jaxembed.export", str(base), str(out)]


def start_slow_command(arguments: list[str]) -> Process:
    """Start a command, and wait until it has written the first folder."""
    process = Process(SLOW_COMMAND, arguments)
    while process.poll() is None and "written" not in process.output():
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("name", ["export", "merge"])
def test_a_terminated_command_leaves_nothing(base: Path, tmp_path: Path, name: str) -> None:
    process = start_slow_command(make_command(name, base, tmp_path / "out"))
    assert [path.name.startswith(SCRATCH_PREFIX) for path in tmp_path.iterdir()] == [True]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.splitlines()[-1] == f"stopped: {tmp_path / 'out'}: not written"
    assert list(tmp_path.iterdir()) == []


def test_the_next_call_removes_the_files_of_a_killed_command(base: Path, tmp_path: Path) -> None:
    process = start_slow_command(make_command("export", base, tmp_path / "out"))
    with open_scratch_folder(tmp_path / "other"):
        assert len(list(tmp_path.iterdir())) == 2, "the folder of a living process is kept"
    process.kill()
    process.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    with open_scratch_folder(tmp_path / "other") as own:
        assert list(tmp_path.iterdir()) == [own]
    assert list(tmp_path.iterdir()) == []


def test_old_folders_without_a_lock_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / f"{SCRATCH_PREFIX}old", tmp_path / f"{SCRATCH_PREFIX}new"
    for folder in (old, new):
        folder.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    with open_scratch_folder(tmp_path / "out"):
        assert not old.exists() and new.exists()


def test_the_folder_is_locked(tmp_path: Path) -> None:
    with (
        open_scratch_folder(tmp_path / "out") as folder,
        (folder / SCRATCH_LOCK_FILE).open("a") as lock,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Runs a command whose writes beyond 16 kB fail, as on a full disk. Python ignores the signal that comes with such a write.
LIMITED_COMMAND = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("name", ["export", "merge"])
def test_a_full_disk_ends_in_one_line(base: Path, tmp_path: Path, name: str) -> None:
    environment = {**ENV, "JAX_COMPILATION_CACHE_DIR": "", "JAXEMBED_CACHE": str(tmp_path / "cache")}
    process = Process(LIMITED_COMMAND, make_command(name, base, tmp_path / "out"), environment)
    stderr = process.communicate()[1]
    assert process.returncode == 2, stderr
    assert stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: not written (")
    assert "Traceback" not in stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file/folder/out: cannot be written \(Not a directory\)"
    with pytest.raises(UserError, match=message), open_scratch_folder(tmp_path / "file" / "folder" / "out"):
        pass


def test_a_folder_that_another_process_has_written_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: not written .*not empty"), open_scratch_folder(tmp_path / "out") as scratch:
        (scratch / "folder").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        move_into_place(scratch / "folder", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_files_of_a_finished_folder_are_as_readable_as_new_ones(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (folder / "onnx").mkdir(parents=True)
    for name in ("model.safetensors", "onnx/model.onnx_data"):
        (folder / name).touch(mode=0o600)
    move_into_place(folder, tmp_path / "out")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777} != {0o600}


def test_the_folder_of_an_output_is_created(tmp_path: Path) -> None:
    out = tmp_path / "new" / "data" / "out"
    with open_scratch_folder(out) as scratch:
        (scratch / "folder").mkdir()
        move_into_place(scratch / "folder", out)
    assert out.is_dir() and list(out.parent.iterdir()) == [out]
