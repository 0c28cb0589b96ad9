"""Quantization-aware training: a run with int8 and binary vectors, its ranges, its scores, and its export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import make_config, make_staged_config, use_one_device, write_base_and_data
from jaxembed import Embedder, encode, export
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import open_held_out_sets
from jaxembed.hub.resolve import find_base
from jaxembed.runs.ranges import open_ranges
from jaxembed.runs.train import train
from jaxembed.search.precision import RANGES_FILE, merge_ranges, quantize_vectors, simulate_quantization
from jaxembed.training.metrics import read_metrics

PRECISIONS = ("float32", "int8", "binary")
QUICK = ("train.steps=2", "train.checkpoint_every=2", "train.eval_every=2", "mesh.data=1")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_one_device(monkeypatch)
    return write_base_and_data(tmp_path)


def test_a_stage_trains_and_scores_quantized_vectors_and_keeps_its_ranges(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.loads(line)["query"] for line in (root / "pairs.jsonl").read_text().splitlines()]
    ranges = merge_ranges(None, Embedder.load(root / "base").encode(texts))
    np.save(root / "ranges.npy", ranges)
    sets = [
        {"name": name, "kind": "sts", "path": str(root / "sts.jsonl"), "precision": name}
        for name in ("float32", "int8", "binary")
    ]
    quantization = {"precisions": ["int8", "binary"], "weights": [1.0, 0.5], "ranges": str(root / "ranges.npy")}
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "quantization": quantization}]
    config = make_staged_config(root, "run", stages, *QUICK, f"eval.sets={json.dumps(sets)}")
    scores = train(config)["scores"]
    run_dir = Path(config.run.dir)
    before, row = [row for row in read_metrics(run_dir) if "loss" in row]
    assert "infonce_int8" not in before
    assert row["loss"] == pytest.approx(row["infonce"] + row["infonce_int8"] + 0.5 * row["infonce_binary"], rel=1e-5)
    # The scores are those of quantized vectors.
    np.testing.assert_array_equal(np.load(run_dir / RANGES_FILE), ranges)
    embedder = Embedder.load(run_dir, checkpoint="last")
    (held_out,) = open_held_out_sets(config.eval.sets[:1], root)
    vectors = [embedder.encode(i.texts) for i in held_out.inputs]
    for precision in PRECISIONS:
        expected = held_out.score([simulate_quantization(v, precision, ranges) for v in vectors]).scores["spearman"]
        assert scores[f"{precision}/spearman"] == pytest.approx(expected, abs=1e-6)
    # A resumed run, encode and export use the ranges of the run.
    (root / "ranges.npy").unlink()
    train(config)
    out = root / "export"
    export.main(export.make_parser().parse_args([str(run_dir), str(out), "--checkpoint", "last"]))
    (root / "texts.txt").write_text("aaa bbb\nccc\n")
    arguments = [str(out), str(root / "texts.txt"), str(root / "out.npy"), "--precision", "int8"]
    encode.main(encode.make_parser().parse_args(arguments))
    expected = quantize_vectors(Embedder.load(out).encode(["aaa bbb", "ccc"]), "int8", ranges)
    np.testing.assert_array_equal(np.load(root / "out.npy"), expected)


def test_int8_without_ranges_is_refused_before_data_is_read(root: Path) -> None:
    (root / "pairs.jsonl").write_text("broken")
    problem = r"int8 needs ranges \(found neither quantization\.ranges nor .*base/quantization_ranges\.npy\)\. Write a file"
    with pytest.raises(UserError, match=f"^quantization\\.precisions: {problem}"):
        train(make_config(root, "run", "mesh.data=1", "quantization.precisions=[int8]"))
    sets = json.dumps([{"name": "sts", "kind": "sts", "path": str(root / "sts.jsonl"), "precision": "int8"}])
    with pytest.raises(UserError, match=f"^eval\\.sets: {problem}"):
        train(make_config(root, "run", "mesh.data=1", f"eval.sets={sets}"))
    np.save(root / "base" / RANGES_FILE, np.zeros((2, 3), np.float32))
    with pytest.raises(
        UserError, match=r"not the ranges of these vectors \(found float32 \[2, 3\]; expected finite floats \[2, 32\]"
    ):
        train(make_config(root, "run", "mesh.data=1", "quantization.precisions=[int8]"))
    stages = [{"train": {"steps": 1}, "quantization": {"precisions": ["int8"], "ranges": name}} for name in ("a", "b")]
    with pytest.raises(UserError, match=r"^quantization\.ranges: differs between stages \(found a and b\)"):
        open_ranges(make_staged_config(root, "run", stages), find_base(str(root / "base")), 32)
    with pytest.raises(
        UserError, match=r"quantization: 1 weights for 2 precisions \(expected one weight per precision, or none\)"
    ):
        make_config(root, "run", "quantization={precisions: [int8, binary], weights: [1]}")
