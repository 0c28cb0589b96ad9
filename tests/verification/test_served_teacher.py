"""A server as teacher: its vectors are asked once, matched by objectives, and compared with those of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.embedding_server import MODEL, run_server
from helpers.runs import make_config, use_one_device, write_base_and_data
from helpers.text_batches import draw_unit_vectors, make_batch, make_encoded
from jaxembed.config import DistillationConfig, MarginMSEConfig
from jaxembed.data.batch import EncoderInput, FrozenVectors
from jaxembed.errors import UserError
from jaxembed.losses.objectives import VECTOR_OBJECTIVES
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics
from jaxembed.verification.served_teacher import PROBE_TEXT, is_served, open_served_teacher


def encode_letters(texts: Sequence[str], seed: int = 0) -> np.ndarray:
    """Return random vectors [N, 5] of length 3, which depend on the letters of the texts alone."""
    table = np.random.default_rng(seed).normal(size=(128, 5))
    vectors = np.array([sum(table[ord(c) % 128] for c in text) for text in texts])
    return np.asarray(3 * vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_vectors_of_a_server_are_requested_once_and_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    inputs = [EncoderInput(text, "query", "an instruction") for text in ("one", "two", "one")]
    with run_server(encode_letters) as server:
        teacher = open_served_teacher(f"{MODEL}@{server.url}", tmp_path)
        vectors = teacher.encode(inputs)
        np.testing.assert_allclose(vectors, encode_letters(["one", "two", "one"]) / 3, atol=1e-6)
        asked = [text for _, content, key in server.requests if content for text in content["input"] if key == "Bearer secret"]
        np.testing.assert_array_equal(open_served_teacher(server.url, tmp_path).encode(inputs), vectors)
        again = [text for _, content, _ in server.requests if content for text in content["input"]]
    opening = ["text", PROBE_TEXT]  # the first finds the API
    assert asked[:2] == opening and sorted(asked[2:]) == ["one", "two"] and again == [*asked, *opening]
    assert (teacher.width, teacher.name) == (5, MODEL)
    assert is_served("https://host/v1") and not is_served("runs/teacher")
    with (
        run_server(lambda texts: encode_letters(texts, seed=1)) as server,
        pytest.raises(UserError, match=r"its vectors are not those that an earlier run stored \(cosine -?0\.\d+ for a text\)"),
    ):
        open_served_teacher(server.url, tmp_path)
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:\d+/.*: cannot be reached"):
        open_served_teacher(server.url, tmp_path)


@pytest.mark.parametrize("config", [DistillationConfig(teacher="a model"), MarginMSEConfig(teacher="a model")])
def test_scores_of_a_teacher_are_its_cosines(config: DistillationConfig | MarginMSEConfig) -> None:
    """Equal to the same scores in the data."""
    random = np.random.default_rng(0)
    q, d = draw_unit_vectors(random, 4, 8).astype(np.float32), draw_unit_vectors(random, 4, 3, 8).astype(np.float32)
    teacher = draw_unit_vectors(random, 4, 4, 5).astype(np.float32)
    batch = make_batch(list("abcd"), [[f"{c}{k}" for k in range(3)] for c in "abcd"])
    scores = np.einsum("bd,bmd->bm", teacher[:, 0], teacher[:, 1:])
    q, d = jax.device_put((q, d))
    named = make_encoded(q, d, batch.replace(teacher=FrozenVectors(teacher[:, 0], teacher[:, 1:])))
    scored = make_encoded(q, d, batch.replace(teacher_scores=jax.device_put(scores)))
    expected, _ = VECTOR_OBJECTIVES[config.name](config.replace(teacher=None), scored)
    assert float(VECTOR_OBJECTIVES[config.name](config, named)[0]) == pytest.approx(float(expected), rel=1e-5) != 0


def test_a_run_learns_from_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    root = write_base_and_data(tmp_path)
    with run_server(encode_letters) as server:
        teacher = f"teacher: '{server.url}'"
        objectives = f"objectives=[{{name: embedding_matching, {teacher}}}, {{name: kl_distillation, {teacher}}}]"
        quick = ("train.steps=2", "train.checkpoint_every=2", "eval.sets=[]", "mesh.data=1")
        config = make_config(root, "run", *quick, objectives)
        train(config)
    losses = [row for row in read_metrics(Path(config.run.dir)) if "loss" in row]
    assert all(row["embedding_matching"] > 0 and row["kl_distillation"] > 0 for row in losses)
    assert losses[0]["kl_distillation_scored"] == 16
    assert f'"name": "{MODEL}"' in (Path(config.run.dir) / "teacher.json").read_text()
