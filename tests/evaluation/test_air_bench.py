"""Data sets of AIR-Bench from folders: nDCG@10 for QA, recall@10 for long documents, files for its leaderboard."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.evaluation.air_bench import omit_results, open_tasks
from jaxembed.evaluation.instruction_variants import VariantTask, add_variants
from jaxembed.evaluation.score_table import build_tables
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import score_tasks

VERSION = "AIR-Bench_24.05"


def write_data_set(folder: Path, name: str, splits: Sequence[str]) -> None:
    """Write 20 documents, and judgments of the dev split: q0 has d0 and a document that is absent, q1 has d5."""
    data = folder / name / VERSION / "default"
    data.mkdir(parents=True)
    write_jsonl(data / "corpus.jsonl", [{"id": f"d{i}", "text": str(i)} for i in range(20)])
    for split in splits:
        write_jsonl(data / f"{split}_queries.jsonl", [{"id": f"q{i}", "text": str(i)} for i in range(3)])
    qrels = folder / f"qrels-{name}-dev" / VERSION / "default"
    qrels.mkdir(parents=True)
    rows = [("q0", "d0", 1), ("q0", "gone", 1), ("q1", "d5", 1), ("q1", "d1", 0)]
    write_jsonl(qrels / "dev_qrels.jsonl", [{"qid": q, "docid": d, "relevance": grade} for q, d, grade in rows])


def encode_number(texts: Sequence[str], prompt: str) -> np.ndarray:
    """Place numbers on a quarter of a circle, so that near numbers are near."""
    angles = np.array([float(text) for text in texts]) * np.pi / 60
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def make_encoder() -> TaskEncoder:
    return TaskEncoder(encode_number, EmbeddingSpec(), "model", "1", width=2)


def test_each_kind_has_its_metric_and_its_table(tmp_path: Path) -> None:
    write_data_set(tmp_path, "qa_wiki_en", ["dev"])
    write_data_set(tmp_path, "long-doc_book_en", ["dev"])
    tasks = open_tasks(Namespace(air_bench=[str(tmp_path)], out=None))
    scores = score_tasks(make_encoder(), tasks)
    qa, long_documents = scores[f"{VERSION}/qa_wiki_en/default/dev"], scores[f"{VERSION}/long-doc_book_en/default/dev"]
    # q0 finds d0 first, and lacks one document. q1 finds d5 after 1, 0 and 2, 3, 4: at rank 6.
    ideal = 1 + 1 / np.log2(3)
    assert qa["score"] == pytest.approx((1 / ideal + 1 / np.log2(7)) / 2) and qa["metric"] == "ndcg_at_10"
    assert long_documents["score"] == pytest.approx((1 / 2 + 1) / 2) and long_documents["metric"] == "recall_at_10"
    titles = {table.title: table for table in build_tables("mine", tasks, scores)}
    assert titles["AIR-Bench QA"].rows["NV-Embed-v2"] == [65.19, 52.28]
    assert titles["AIR-Bench long documents"].rows["mine"] == pytest.approx([75, 75])


def test_splits_without_judgments_are_written_for_the_leaderboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_data_set(tmp_path / "data", "qa_law_en", ["dev", "test"])
    tasks = open_tasks(Namespace(air_bench=[str(tmp_path / "data")], out=str(tmp_path)))
    encoder = make_encoder()
    encoder.widths = (2, 1)  # the file has the ranking of the largest width
    scores = score_tasks(encoder, tasks)
    assert [result["score"] is None for result in scores.values()] == [False, True]
    written = json.loads((tmp_path / "air-bench/model/NoReranker/qa/law/en_default_test.json").read_text())
    assert (written["benchmark_version"], written["dataset_name"], written["split"]) == (VERSION, "default", "test")
    found = written["search_results"]["q2"]
    assert len(found) == 20 and max(found, key=found.__getitem__) == "d2"
    assert len(build_tables("mine", tasks, scores)[0].columns) == 1
    # The model of --compare may have the same name, so it writes no file.
    assert omit_results(tasks)[0] is tasks[0]
    paths = [*(tmp_path / "air-bench").rglob("*.json")]
    paths[0].unlink()
    score_tasks(make_encoder(), omit_results(tasks))
    assert len(paths) == 1 and not paths[0].exists()
    # Results under another instruction would replace the file.
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump({task.name: ["other"] for task in tasks}))
    with_variants = add_variants(tasks, str(tmp_path / "variants.yaml"))
    assert isinstance(with_variants[0], VariantTask) and with_variants[1] is tasks[1]
    assert f"{tasks[1].name} has no judgments, so it is scored under no other instructions" in caplog.text


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set of AIR-Bench \(expected .*/qa_wiki_en/AIR-Bench_24\.05/default/corpus"):
        open_tasks(Namespace(air_bench=[str(tmp_path)], out=None))
    write_data_set(tmp_path, "qa_law_en", ["test"])
    with pytest.raises(UserError, match=r"no split has judgments .*Add --out DIR"):
        open_tasks(Namespace(air_bench=[str(tmp_path)], out=None))
    (tmp_path / "qa_law_en" / VERSION / "default" / "test_queries.jsonl").write_text('{"_id": "q0", "text": "1"}\n')
    [task] = open_tasks(Namespace(air_bench=[str(tmp_path)], out=str(tmp_path)))
    with pytest.raises(UserError, match=r'test_queries\.jsonl:1: no string field "id" \(expected id, text\)'):
        score_tasks(make_encoder(), [task])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("qrels-qa_law_en-dev/{}/dev_qrels.jsonl", [{"qid": "q0", "docid": "d0", "relevance": None}], "relevance is null"),
        ("qrels-qa_law_en-dev/{}/dev_qrels.jsonl", [{"qid": "q0", "docid": "d0", "relevance": "high"}], "relevance is 'high'"),
        ("qrels-qa_law_en-dev/{}/dev_qrels.jsonl", [{"qid": "x", "docid": "d0"}], "judges none of the queries in"),
        ("qa_law_en/{}/corpus.jsonl", [], r"corpus\.jsonl: has no rows"),
        ("qa_law_en/{}/dev_queries.jsonl", [], r"dev_queries\.jsonl: has no rows"),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, name: str, rows: Sequence[dict[str, object]], message: str) -> None:
    write_data_set(tmp_path, "qa_law_en", ["dev"])
    write_jsonl(tmp_path / name.format(f"{VERSION}/default"), rows)
    [task] = open_tasks(Namespace(air_bench=[str(tmp_path)], out=None))
    with pytest.raises(UserError, match=message):
        score_tasks(make_encoder(), [task])


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data_set(tmp_path, "qa_law_en", ["dev"])
    [task] = open_tasks(Namespace(air_bench=[str(tmp_path)], out=None))
    digest = task.data_digest
    monkeypatch.setattr("jaxembed.evaluation.air_bench.compute_file_digest", lambda path: pytest.fail("hashed again"))
    assert task.data_digest == digest
