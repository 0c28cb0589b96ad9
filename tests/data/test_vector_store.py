"""The vector store: what it returns, how it survives kills, damage and other processes, and its memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import ENV
from jaxembed.data.vector_store import INDEX_FILE, VECTORS_FILE, VectorStore
from jaxembed.errors import UserError

WIDTH = 3


def make_keys(names: Sequence[object]) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest()[:16] for name in names]


def make_vectors(names: Sequence[object], seed: int = 0) -> np.ndarray:
    """Return vectors [names, WIDTH] that differ for every name and seed."""
    return np.array([np.random.default_rng((seed, *str(name).encode())).normal(size=WIDTH) for name in names], np.float32)


def fetch(store: VectorStore, names: Sequence[object], seed: int = 0) -> tuple[np.ndarray, list[object]]:
    """Fetch the vectors of names, and return them and the names whose vectors were computed."""
    computed: list[object] = []

    def compute(places: list[int]) -> np.ndarray:
        computed.extend(names[i] for i in places)
        return make_vectors(computed, seed)

    return store.fetch(make_keys(names), compute), computed


def test_stored_vectors_are_not_computed_again(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, WIDTH)
    vectors, computed = fetch(store, list("cabac"))
    assert computed == list("cab")
    assert np.array_equal(vectors, make_vectors("cabac"))
    vectors, computed = fetch(store, list("bdae"), seed=1)
    assert computed == list("de")
    assert np.array_equal(
        vectors, np.concatenate([make_vectors("b"), make_vectors("d", 1), make_vectors("a"), make_vectors("e", 1)])
    )
    again = VectorStore(tmp_path, WIDTH)
    assert (len(store), len(again)) == (5, 5)
    assert fetch(again, list("deabc"), seed=2)[1] == []
    assert np.array_equal(fetch(again, ["d"])[0], make_vectors("d", 1))
    assert fetch(again, [])[0].shape == (0, WIDTH)


def test_keys_that_end_in_zeros_stay_distinct(tmp_path: Path) -> None:
    keys = [bytes(16), b"\1" + bytes(15), b"\1\1" + bytes(14), bytes(15) + b"\1"]
    vectors = make_vectors(range(4))
    store = VectorStore(tmp_path, WIDTH)
    store.fetch(keys, lambda places: vectors[places])
    assert np.array_equal(VectorStore(tmp_path, WIDTH).fetch(keys[::-1], lambda places: vectors[:0]), vectors[::-1])


@pytest.mark.parametrize("file", [INDEX_FILE, VECTORS_FILE])
def test_incomplete_addition_is_dropped(tmp_path: Path, file: str) -> None:
    """The addition may be cut at any byte. Later additions are stored correctly."""
    folder = tmp_path / "whole"
    fetch(VectorStore(folder, WIDTH), list("ab"))
    first = {name: (folder / name).stat().st_size for name in (INDEX_FILE, VECTORS_FILE)}
    fetch(VectorStore(folder, WIDTH), list("cde"))
    content = (folder / file).read_bytes()
    for size in range(first[file], len(content)):
        (folder / file).write_bytes(content[:size])
        if file == VECTORS_FILE:  # written before the index
            (folder / INDEX_FILE).write_bytes((folder / INDEX_FILE).read_bytes()[: first[INDEX_FILE]])
        store = VectorStore(folder, WIDTH)
        assert len(store) == 2
        vectors, computed = fetch(store, list("dacfb"), seed=1)
        assert computed == list("dcf")
        expected = np.concatenate([make_vectors("d", 1), make_vectors("a"), make_vectors("cf", 1), make_vectors("b")])
        assert np.array_equal(vectors, expected)
        assert np.array_equal(fetch(VectorStore(folder, WIDTH), list("dacfb"), seed=2)[0], expected)


def test_reading_stops_at_damage_and_lost_vectors(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fetch(VectorStore(tmp_path, WIDTH), [name])
    index, stored = ((tmp_path / name).read_bytes() for name in (INDEX_FILE, VECTORS_FILE))
    (tmp_path / VECTORS_FILE).write_bytes(stored[:-1])
    assert len(VectorStore(tmp_path, WIDTH)) == 2
    (tmp_path / INDEX_FILE).write_bytes(index[:30] + bytes([index[30] ^ 1]) + index[31:])
    assert len(VectorStore(tmp_path, WIDTH)) == 1
    (tmp_path / INDEX_FILE).write_bytes(bytes(len(index)))  # a disk may leave zeros after a crash
    assert len(VectorStore(tmp_path, WIDTH)) == 0
    vectors, computed = fetch(VectorStore(tmp_path, WIDTH), list("cab"))
    assert computed == list("cab") and np.array_equal(vectors, make_vectors("cab"))


def test_lost_vectors_are_never_replaced_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next addition is killed between writing its two files."""
    for name in ("a", "b"):
        fetch(VectorStore(tmp_path, WIDTH), [name])
    (tmp_path / VECTORS_FILE).write_bytes((tmp_path / VECTORS_FILE).read_bytes()[: 4 * WIDTH])
    store, write_at_end = VectorStore(tmp_path, WIDTH), VectorStore._write_at_end
    assert len(store) == 1

    def die_before_index(self: VectorStore, name: str, end: int, content: bytes) -> None:
        if name == INDEX_FILE:
            raise KeyboardInterrupt
        write_at_end(self, name, end, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VectorStore, "_write_at_end", die_before_index)
        fetch(store, ["c"])
    again = VectorStore(tmp_path, WIDTH)
    assert len(again) == 1
    assert np.array_equal(fetch(again, list("bc"), seed=1)[0], make_vectors("bc", 1))


def test_the_first_vector_of_a_key_is_kept(tmp_path: Path) -> None:
    """Both stores were opened before either computed a vector."""
    first, second = VectorStore(tmp_path, WIDTH), VectorStore(tmp_path, WIDTH)
    fetch(first, list("ab"), seed=1)
    vectors, computed = fetch(second, list("bc"), seed=2)
    assert computed == list("bc")
    assert np.array_equal(vectors, np.concatenate([make_vectors("b", 1), make_vectors("c", 2)]))
    assert np.array_equal(fetch(first, list("cb"), seed=3)[0], vectors[::-1])


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Two processes add overlapping keys. Each key gets one vector, from one of the processes."""
    code = f"""
import sys, numpy as np
from pathlib import Path
from jaxembed.data.vector_store import VectorStore
folder, seed = Path({str(tmp_path)!r}), int(sys.argv[1])
store = VectorStore(folder, 3)
(folder / f"ready {{seed}}").touch()
while len(list(folder.glob("ready*"))) < 2:
    pass
for start in range(100):
    names = range(start, start + 20)
    store.fetch([b"%016d" % i for i in names], lambda places: np.array([[names[i], seed, 7] for i in places]))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(seed)], env=ENV) for seed in (1, 2)]
    assert [process.wait() for process in processes] == [0, 0]
    store = VectorStore(tmp_path, 3)
    vectors = store.fetch([b"%016d" % i for i in range(119)], lambda places: np.zeros((0, 3)))
    assert vectors[:, 0].tolist() == list(range(119)) and (vectors[:, 2] == 7).all()
    assert set(vectors[:, 1].tolist()) <= {1.0, 2.0}
    assert (tmp_path / VECTORS_FILE).stat().st_size == 119 * 4 * 3


def test_addition_waits_for_the_lock_of_another_process(tmp_path: Path) -> None:
    """The lock belongs to an open file, not to a process, so a thread can stand in for the other process."""
    store = VectorStore(tmp_path, WIDTH)
    adding = threading.Thread(target=fetch, args=(store, ["a"]))
    with (tmp_path / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        adding.start()
        adding.join(0.2)
        assert adding.is_alive() and len(store) == 0
    adding.join()
    assert len(store) == 1


def test_memory_holds_keys_but_no_vectors(tmp_path: Path) -> None:
    count, width = 5000, 1024
    keys = make_keys(range(count))
    VectorStore(tmp_path, width).fetch(keys, lambda places: np.ones((len(places), width), np.float32))
    tracemalloc.start()
    store = VectorStore(tmp_path, width)
    row = store.fetch(keys[77:78], lambda places: np.zeros((0, width), np.float32))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.all() and len(store) == count
    assert current < 32 * count
    assert peak < count * width  # bytes: a quarter of the vectors


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/here: cannot store vectors \(Not a directory\)\. Make the folder writable"):
        VectorStore(tmp_path / "file" / "here", WIDTH)


@pytest.mark.parametrize("byte", [0, 4 * WIDTH + 5])
def test_changed_vectors_are_refused(tmp_path: Path, byte: int) -> None:
    """A vector is checked when it is read: the others are still returned."""
    fetch(VectorStore(tmp_path, WIDTH), list("ab"))
    with (tmp_path / VECTORS_FILE).open("r+b") as file:
        file.seek(byte)
        changed = file.read(1)[0] ^ 1
        file.seek(byte)
        file.write(bytes([changed]))
    damaged, intact = ("a", "b") if byte == 0 else ("b", "a")
    line = rf"^{tmp_path}: the stored vectors are damaged \(1 of the 2 read differ from their checksums\)\. Remove this folder"
    with pytest.raises(UserError, match=line):
        fetch(VectorStore(tmp_path, WIDTH), [damaged, intact])
    vectors, computed = fetch(VectorStore(tmp_path, WIDTH), [intact])
    assert computed == [] and np.array_equal(vectors, make_vectors(intact))


def test_files_of_the_format_without_checksums_are_not_read(tmp_path: Path) -> None:
    keys = b"".join(make_keys("a"))
    frame = struct.pack("<I", 1) + keys
    (tmp_path / "index").write_bytes(frame + struct.pack("<I", zlib.crc32(frame)))
    (tmp_path / "vectors").write_bytes(np.ones(WIDTH, np.float32).tobytes())
    vectors, computed = fetch(VectorStore(tmp_path, WIDTH), ["a"])
    assert computed == ["a"] and np.array_equal(vectors, make_vectors("a"))


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077])
def test_only_the_owner_can_use_the_folder(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        VectorStore(tmp_path / "new", WIDTH)
        (tmp_path / "old").mkdir(mode=0o775)
        VectorStore(tmp_path / "old", WIDTH)
    finally:
        os.umask(previous)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "old")] == [0o700, 0o700]
