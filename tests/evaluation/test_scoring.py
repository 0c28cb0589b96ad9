"""The loop over tasks: widths, vectors on disk, resuming after a kill, the progress bar, bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from jaxembed.config.instructions import InstructionTable
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.progress import TaskProgress
from jaxembed.evaluation.task_encoder import TaskEncoder, check_widths, truncate_vectors
from jaxembed.evaluation.tasks import check_instructions, check_names, score_tasks
from jaxembed.evaluation.vector_cache import VectorCache
from jaxembed.search.precision import merge_ranges

WIDTH = 8


class CountingEncoder:
    """Encodes a text by its own random vector, and records the texts of every call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        self.calls.append(list(texts))
        seeds = [np.frombuffer((prompt + text).encode().ljust(8)[:64], np.uint8) for text in texts]
        vectors = np.array([np.random.default_rng(seed).normal(size=WIDTH) for seed in seeds], np.float32).reshape(-1, WIDTH)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_encoder(tmp_path: Path, widths: tuple[int, ...] = (), memory_bytes: int = 2**30) -> TaskEncoder:
    cache = VectorCache(tmp_path / "vectors", "1", WIDTH, memory_bytes, keeps_arrays=len(widths) > 1)
    encoder = TaskEncoder(CountingEncoder(), EmbeddingSpec(), "model", "1", width=WIDTH, widths=widths)
    encoder.cache = cache
    return encoder


def mock_tasks(folder: Path | None) -> list[MtebTask]:
    from mteb.mocks import MockClassificationTask, MockRetrievalTask, MockSTSTask

    classification = MockClassificationTask()
    classification.n_experiments = 2  # classifiers, instead of 10
    return [MtebTask(task, folder) for task in (MockRetrievalTask(), MockSTSTask(), classification)]


@pytest.mark.parametrize("memory_bytes", [2**30, 0], ids=["in memory", "on disk"])
def test_every_width_has_the_score_of_truncated_vectors_from_one_encoding(tmp_path: Path, memory_bytes: int) -> None:
    encoder = make_encoder(tmp_path, (8, 4, 2), memory_bytes)
    scores = score_tasks(encoder, mock_tasks(tmp_path / "results"), tmp_path)
    once = sum(map(len, encoder.encode_with_prompt.calls))  # type: ignore[attr-defined]
    assert 0 < once <= sum(map(len, calls_of_one_width(make_encoder(tmp_path / "single"))))
    for width in (8, 4, 2):
        plain = TaskEncoder(
            lambda texts, prompt, width=width: truncate_vectors(CountingEncoder()(texts, prompt), width),  # type: ignore[misc]
            EmbeddingSpec(), "model", f"cut-{width}",
        )  # fmt: skip
        for name, expected in score_tasks(plain, mock_tasks(None)).items():
            assert scores[name]["widths"][str(width)] == expected["score"], (name, width)
    assert all(result["score"] == result["widths"]["8"] for result in scores.values())
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert not (tmp_path / "vectors").exists()


def test_precisions_have_the_scores_of_quantized_vectors_from_one_encoding(tmp_path: Path) -> None:
    """mteb's own similarities of the numbers of sentence-transformers' int8 vectors, and of signs."""
    encoder = make_encoder(tmp_path, (8, 4))
    ranges = merge_ranges(None, CountingEncoder()([str(i) for i in range(50)], ""))
    encoder.precisions, encoder.ranges = ("float32", "int8", "uint8", "binary"), ranges
    scores = score_tasks(encoder, mock_tasks(tmp_path / "results"))

    def quantize(precision: Any, texts: Sequence[str], prompt: str) -> np.ndarray:
        vectors = CountingEncoder()(texts, prompt)
        signs = np.where(vectors > 0, 1, -1)
        numbers = signs if precision == "binary" else quantize_embeddings(vectors, "int8", ranges=ranges).astype(np.float64)
        return numbers / np.linalg.norm(numbers, axis=1, keepdims=True)

    for precision in ("int8", "binary"):
        plain = TaskEncoder(functools.partial(quantize, precision), EmbeddingSpec(), "model", f"1-{precision}")
        for name, expected in score_tasks(plain, mock_tasks(None)).items():
            assert scores[name]["precisions"][precision] == pytest.approx(expected["score"], abs=1e-6), (name, precision)
    for result in scores.values():
        assert list(result["precisions"]) == ["float32", "int8", "uint8", "binary"] and list(result["widths"]) == ["8", "4"]
        assert result["score"] == result["precisions"]["float32"] == result["widths"]["8"]
        assert result["precisions"]["uint8"] == result["precisions"]["int8"]
    files = len(list((tmp_path / "results").rglob("*.json")))
    again = score_tasks(make_encoder_with(encoder), mock_tasks(tmp_path / "results"))
    assert len(list((tmp_path / "results").rglob("*.json"))) == files
    for name, result in again.items():
        assert result["precisions"] == pytest.approx(scores[name]["precisions"], abs=1e-6)


def make_encoder_with(encoder: TaskEncoder) -> TaskEncoder:
    """Return the same model, which refuses to encode."""

    def refuse(texts: Sequence[str], prompt: str) -> np.ndarray:
        raise AssertionError("all results are stored")

    return dataclasses.replace(encoder, encode_with_prompt=refuse, cache=None)


def calls_of_one_width(encoder: TaskEncoder) -> list[list[str]]:
    score_tasks(encoder, mock_tasks(None))
    calls = encoder.encode_with_prompt.calls  # type: ignore[attr-defined]
    assert isinstance(calls, list)
    return calls


class Killed(BaseException):
    """Ends a run as a kill would: nothing of it handles this."""


def test_a_run_continues_after_a_kill_without_repeating_tasks(tmp_path: Path) -> None:
    def record_tasks(encoder: TaskEncoder, last: str) -> list[str]:
        """Record the task of every call in the list that is returned. The first call of task `last` is killed."""
        encode, encoded = encoder.encode_with_prompt, []

        def encode_and_record(texts: Sequence[str], prompt: str) -> np.ndarray:
            assert encoder.progress is not None
            if encoder.progress.task == last:
                raise Killed
            encoded.append(encoder.progress.task)
            return encode(texts, prompt)

        encoder.encode_with_prompt = encode_and_record
        return encoded

    encoder = make_encoder(tmp_path, (8, 4))
    before = record_tasks(encoder, "MockClassificationTask")
    with pytest.raises(Killed):
        score_tasks(encoder, mock_tasks(tmp_path / "results"), tmp_path)
    finished = json.loads((tmp_path / "scores.json").read_text())
    assert list(finished) == list(dict.fromkeys(before)) == ["MockRetrievalTask", "MockSTSTask"]

    resumed = make_encoder(tmp_path, (8, 4))
    after = record_tasks(resumed, "")
    scores = score_tasks(resumed, mock_tasks(tmp_path / "results"), tmp_path)
    assert set(after) == {"MockClassificationTask"}
    assert list(scores) == ["MockRetrievalTask", "MockSTSTask", "MockClassificationTask"]
    for name, result in finished.items():  # mteb rounds the scores that it stores
        assert scores[name]["widths"] == pytest.approx(result["widths"])


def test_vectors_beyond_the_memory_limit_are_on_disk_and_survive_a_kill(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(10)]
    vectors = CountingEncoder()(texts, "p")

    def encode() -> Iterator[np.ndarray]:
        yield vectors[:6]
        yield vectors[6:]

    cache = VectorCache(tmp_path / "vectors", "1", WIDTH, memory_bytes=100, keeps_arrays=False)
    first = cache.fetch(texts, "p", encode)
    np.testing.assert_array_equal(first, vectors)
    assert isinstance(first.base, np.memmap) and len(list((tmp_path / "vectors").glob("*.npy"))) == 1

    def fail() -> Iterator[np.ndarray]:
        pytest.fail("encoded again")

    again = VectorCache(tmp_path / "vectors", "1", WIDTH, memory_bytes=100, keeps_arrays=False)
    np.testing.assert_array_equal(again.fetch(texts, "p", fail), vectors)
    for other in (
        VectorCache(tmp_path / "vectors", "2", WIDTH, 100, False).fetch(texts, "p", encode),
        again.fetch(texts, "q", encode),
    ):
        np.testing.assert_array_equal(other, vectors)
    assert len(list((tmp_path / "vectors").glob("*.npy"))) == 3  # another model, another prompt
    (tmp_path / "vectors" / "docs.npy").write_text("a file of the user")
    again.clear()
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == ["docs.npy"]
    (tmp_path / "vectors" / "docs.npy").unlink()
    again.clear()
    assert not (tmp_path / "vectors").exists()


def test_vectors_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = VectorCache(tmp_path / "file" / "vectors", "1", WIDTH, memory_bytes=0, keeps_arrays=False)
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)\. Free space"):
        cache.fetch(["a"], "", lambda: iter([np.zeros((1, WIDTH), np.float32)]))


def test_the_progress_bar_has_the_time_that_is_left_over_all_tasks() -> None:
    progress = TaskProgress({"a": 100, "b": None, "c": 300})
    bar = progress._bar
    assert bar.total == 600  # b counts as the mean of the others
    progress.begin("a")
    progress.finish_task()  # scored before
    assert (bar.n, bar.total) == (0, 500)
    progress.begin("b")
    progress.advance(50)
    progress.advance(500)  # more texts than expected do not take the share of the next task
    assert bar.n == 200
    progress.begin("c")
    progress.advance(1)
    progress.finish_task()
    assert bar.n == bar.total == 500
    progress.close()


def test_widths_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    spec = EmbeddingSpec(matryoshka_dims=(64, 32))
    assert check_widths([32, 128, 32, 64], spec, 128, "tiny") == (128, 64, 32)
    assert not caplog.records
    assert check_widths([48], spec, 128, "tiny") == (48,)
    assert "--dim: training of tiny did not include 48 (it included: 64, 32)" in caplog.text
    with pytest.raises(UserError, match=r"^--dim: 256 is above the width of .+ \(128\)\. Choose 1 to 128\.$"):
        check_widths([32, 256], spec, 128, "tiny")


def test_bad_tasks_and_instructions_are_one_line() -> None:
    tasks: list[Any] = mock_tasks(None)
    with pytest.raises(UserError, match="no tasks to score"):
        check_names([])
    with pytest.raises(UserError, match="two tasks are named 'MockSTSTask'"):
        check_names([*tasks, tasks[1]])
    check_instructions(InstructionTable(by_type={"STS": "x"}), "own.yaml", tasks)
    with pytest.raises(
        UserError, match=r"^own\.yaml: names no task of this run \(it names: MockRetrieval; .*Did you mean 'MockRet"
    ):
        check_instructions(InstructionTable(by_task={"MockRetrieval": "x"}), "own.yaml", tasks)
