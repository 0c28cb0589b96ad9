"""Files that are written atomically, and the folder of the cache."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.commands import ENV
from jaxembed import files
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, cache_dir, check_writable, make_private_folder


def test_a_link_at_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "out.npy"
    target.write_text("precious")
    for write in (check_writable, lambda path: files.write_text(path, "new")):
        (tmp_path / "out.npy.partial").symlink_to(target)
        write(out)
        assert target.read_text() == "precious"
    assert out.read_text() == "new" and not out.is_symlink()
    (tmp_path / "out.npy.partial").symlink_to(tmp_path / "absent")
    check_writable(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "target"]


def test_the_partial_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("a long remainder")
    files.write_text(tmp_path / "a", "b")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "b")]


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(UserError, match="another process writes this file at the same time"), atomic_write(out) as partial:
        partial.write_text("first")
        with atomic_write(out) as other:
            other.write_text("second")
    assert out.read_text() == "second"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("JAXEMBED_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "jaxembed"
    assert cache_dir().stat().st_mode & 0o777 == 0o700


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a home directory. Returns the temporary directory."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAXEMBED_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_has_a_private_cache(homeless: Path) -> None:
    assert cache_dir() == homeless / f"jaxembed-{os.geteuid()}" == cache_dir()
    assert cache_dir().stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_written_is_not_used(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/home"))
    assert cache_dir().parent == homeless


def test_a_cache_that_cannot_be_written_is_not_used(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: homeless / "home")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_dir() == homeless / f"jaxembed-{os.geteuid()}"


def test_a_cache_that_another_user_prepared_is_refused(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = homeless / f"jaxembed-{os.geteuid()}"
    (homeless / "theirs").mkdir()
    fallback.symlink_to(homeless / "theirs")
    line = rf"^{fallback}: belongs to another user, or is a link\. Remove it, or set JAXEMBED_CACHE to another folder\.$"
    with pytest.raises(UserError, match=line):
        cache_dir()
    fallback.unlink()
    fallback.write_text("")
    with pytest.raises(UserError, match="Set JAXEMBED_CACHE"):
        cache_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to create a folder of another user")
def test_a_folder_of_another_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        make_private_folder(tmp_path / "theirs")
    # A network disk that maps this user to the other one.
    monkeypatch.setattr(files, "_find_owner_of_new_files", lambda folder: 12345)
    assert make_private_folder(tmp_path / "theirs").stat().st_mode & 0o777 == 0o700


def test_a_command_runs_without_a_home(tmp_path: Path) -> None:
    """The user id has no entry in the password file, as in many containers."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    code = "import os, pwd; from jaxembed.files import cache_dir; os.setuid(54321); print(cache_dir())"
    tmp_path.chmod(0o777)
    env = {**ENV, "TMPDIR": str(tmp_path)}
    env.pop("HOME", None)
    env.pop("JAXEMBED_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("/jaxembed-54321\n"), done.stderr
