"""Vectors on disk by key: what comes back, what a kill or another process does to it, what it costs in memory."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import ENV
from jaxembed.data.vector_store import VectorStore
from jaxembed.errors import UserError

WIDTH = 3


def keys_of(names: Sequence[object]) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest()[:16] for name in names]


def vectors_of(names: Sequence[object], seed: int = 0) -> np.ndarray:
    """Other numbers for every name and seed, in the order of the names."""
    return np.array([np.random.default_rng((seed, *str(name).encode())).normal(size=WIDTH) for name in names], np.float32)


def fetch(store: VectorStore, names: Sequence[object], seed: int = 0) -> tuple[np.ndarray, list[object]]:
    """The vectors of names, and those that had to be computed."""
    made: list[object] = []

    def make(places: list[int]) -> np.ndarray:
        made.extend(names[i] for i in places)
        return vectors_of(made, seed)

    return store.fetch(keys_of(names), make), made


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, WIDTH)
    got, made = fetch(store, list("cabac"))
    assert made == list("cab")
    assert np.array_equal(got, vectors_of("cabac"))
    got, made = fetch(store, list("bdae"), seed=1)
    assert made == list("de")
    assert np.array_equal(got, np.concatenate([vectors_of("b"), vectors_of("d", 1), vectors_of("a"), vectors_of("e", 1)]))
    again = VectorStore(tmp_path, WIDTH)
    assert (len(store), len(again)) == (5, 5)
    assert fetch(again, list("deabc"), seed=2)[1] == []
    assert np.array_equal(fetch(again, ["d"])[0], vectors_of("d", 1))
    assert fetch(again, [])[0].shape == (0, WIDTH)


def test_keys_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    keys = [bytes(16), b"\1" + bytes(15), b"\1\1" + bytes(14), bytes(15) + b"\1"]
    vectors = vectors_of(range(4))
    store = VectorStore(tmp_path, WIDTH)
    store.fetch(keys, lambda places: vectors[places])
    assert np.array_equal(VectorStore(tmp_path, WIDTH).fetch(keys[::-1], lambda places: vectors[:0]), vectors[::-1])


@pytest.mark.parametrize("file", ["index", "vectors"])
def test_an_addition_that_a_kill_tore_is_dropped_whole(tmp_path: Path, file: str) -> None:
    """Cut at any of its bytes; what comes after it is kept well."""
    folder = tmp_path / "whole"
    fetch(VectorStore(folder, WIDTH), list("ab"))
    first = {name: (folder / name).stat().st_size for name in ("index", "vectors")}
    fetch(VectorStore(folder, WIDTH), list("cde"))
    content = (folder / file).read_bytes()
    for size in range(first[file], len(content)):
        (folder / file).write_bytes(content[:size])
        if file == "vectors":  # which are written first
            (folder / "index").write_bytes((folder / "index").read_bytes()[: first["index"]])
        torn = VectorStore(folder, WIDTH)
        assert len(torn) == 2
        got, made = fetch(torn, list("dacfb"), seed=1)
        assert made == list("dcf")
        expected = np.concatenate([vectors_of("d", 1), vectors_of("a"), vectors_of("cf", 1), vectors_of("b")])
        assert np.array_equal(got, expected)
        assert np.array_equal(fetch(VectorStore(folder, WIDTH), list("dacfb"), seed=2)[0], expected)


def test_damage_and_lost_vectors_end_what_is_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fetch(VectorStore(tmp_path, WIDTH), [name])
    index, vectors = ((tmp_path / name).read_bytes() for name in ("index", "vectors"))
    (tmp_path / "vectors").write_bytes(vectors[:-1])
    assert len(VectorStore(tmp_path, WIDTH)) == 2
    (tmp_path / "index").write_bytes(index[:30] + bytes([index[30] ^ 1]) + index[31:])
    assert len(VectorStore(tmp_path, WIDTH)) == 1
    (tmp_path / "index").write_bytes(bytes(len(index)))  # a disk may leave zeros behind
    assert len(VectorStore(tmp_path, WIDTH)) == 0
    got, made = fetch(VectorStore(tmp_path, WIDTH), list("cab"))
    assert made == list("cab") and np.array_equal(got, vectors_of("cab"))


def test_lost_vectors_do_not_come_back_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the addition that takes their place is killed between its two files."""
    for name in ("a", "b"):
        fetch(VectorStore(tmp_path, WIDTH), [name])
    (tmp_path / "vectors").write_bytes((tmp_path / "vectors").read_bytes()[: 4 * WIDTH])
    store, append = VectorStore(tmp_path, WIDTH), VectorStore._append
    assert len(store) == 1

    def killed(self: VectorStore, name: str, end: int, content: bytes) -> None:
        if name == "index":
            raise KeyboardInterrupt
        append(self, name, end, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VectorStore, "_append", killed)
        fetch(store, ["c"])
    again = VectorStore(tmp_path, WIDTH)
    assert len(again) == 1
    assert np.array_equal(fetch(again, list("bc"), seed=1)[0], vectors_of("bc", 1))


def test_the_first_vector_of_a_key_stays(tmp_path: Path) -> None:
    """Also where two opened the store before either had computed it."""
    first, second = VectorStore(tmp_path, WIDTH), VectorStore(tmp_path, WIDTH)
    fetch(first, list("ab"), seed=1)
    got, made = fetch(second, list("bc"), seed=2)
    assert made == list("bc")
    assert np.array_equal(got, np.concatenate([vectors_of("b", 1), vectors_of("c", 2)]))
    assert np.array_equal(fetch(first, list("cb"), seed=3)[0], got[::-1])


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Each vector is one's or the other's whole, and there is one a key."""
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
    started = [subprocess.Popen([sys.executable, "-c", code, str(seed)], env=ENV) for seed in (1, 2)]
    assert [process.wait() for process in started] == [0, 0]
    store = VectorStore(tmp_path, 3)
    got = store.fetch([b"%016d" % i for i in range(119)], lambda places: np.zeros((0, 3)))
    assert got[:, 0].tolist() == list(range(119)) and (got[:, 2] == 7).all()
    assert set(got[:, 1].tolist()) <= {1.0, 2.0}
    assert (tmp_path / "vectors").stat().st_size == 119 * 4 * 3


def test_an_addition_waits_for_that_of_another_process(tmp_path: Path) -> None:
    """A lock is its file's, not its process's: held here, it keeps a thread waiting just the same."""
    store = VectorStore(tmp_path, WIDTH)
    adding = threading.Thread(target=fetch, args=(store, ["a"]))
    with (tmp_path / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        adding.start()
        adding.join(0.2)
        assert adding.is_alive() and len(store) == 0
    adding.join()
    assert len(store) == 1


def test_memory_holds_keys_and_no_vectors(tmp_path: Path) -> None:
    count, width = 5000, 1024
    keys = keys_of(range(count))
    VectorStore(tmp_path, width).fetch(keys, lambda places: np.ones((len(places), width), np.float32))
    tracemalloc.start()
    store = VectorStore(tmp_path, width)
    row = store.fetch(keys[77:78], lambda places: np.zeros((0, width), np.float32))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.all() and len(store) == count
    assert held < 32 * count
    assert most < count * width  # a quarter of the vectors


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/here: vectors cannot be kept there \(Not a directory\); mend it, or name"):
        VectorStore(tmp_path / "file" / "here", WIDTH)
