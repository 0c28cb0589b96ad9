"""Instruction tables: which instruction a task gets, and that MTEB has the tasks that they list."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from jaxembed.config.instructions import INSTRUCTION_TABLES, load_instruction_table, read_instruction_table
from jaxembed.config.shipped import find_shipped_folder
from jaxembed.errors import UserError

CLAIM = "Given a claim, retrieve documents that support or refute the claim"
MEDICAL = "Given a Chinese community medical question, retrieve replies that best answer the question"
BIORXIV = "Identify the main category of Biorxiv papers based on the titles"


def read_mteb_names() -> set[str]:
    """Return the names of MTEB's tasks, from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("mteb")
    assert spec is not None and spec.origin is not None
    files = (Path(spec.origin).parent / "tasks").rglob("*.py")
    return {name for path in files for name in re.findall(r'name="([^"]+)"', path.read_text())}


def test_the_tables_are_the_files_that_ship() -> None:
    assert tuple(sorted(path.stem for path in (find_shipped_folder() / "instructions").glob("*.yaml"))) == INSTRUCTION_TABLES


def test_mteb_has_every_task() -> None:
    names = read_mteb_names()
    assert len(names) > 1000
    for table in INSTRUCTION_TABLES:
        assert set(load_instruction_table(table).by_task) <= names, table


@pytest.mark.parametrize("name", INSTRUCTION_TABLES)
def test_a_table_is_complete(name: str) -> None:
    table = load_instruction_table(name)
    assert "arXiv:" in table.source and "{instruction}" in table.template and table.by_type and table.by_task
    texts = [*table.by_type.values(), *table.by_task.values(), *(text for listed in table.training.values() for text in listed)]
    assert not any(text.startswith(("Instruct", " ")) for text in texts)
    if name != "qwen3_embedding":  # its spaces were published so
        assert all(text == text.strip() and "  " not in text for text in texts)


@pytest.mark.parametrize(
    ("table", "task", "kind", "instruction"),
    [
        ("nv_embed", "STS17", "STS", "Retrieve semantically similar text."),
        ("nv_embed", "FEVERHardNegatives.v2", "Retrieval", CLAIM),
        ("e5_mistral", "ArguAna", "Retrieval", "Given a claim, find documents that refute the claim"),
        ("e5_mistral", "BiorxivClusteringS2S.v2", "Clustering", BIORXIV),
        ("kalm", "SciFact", "Retrieval", "Given a query, retrieve documents that answer the query."),
        ("kalm", "STS17", "STS", ""),
        ("kalm", "TwitterURLCorpus", "PairClassification", ""),
        ("kalm", "Tatoeba", "BitextMining", None),
        ("nv_embed", "SomeNewRetrieval", "Retrieval", None),
        ("qwen3_embedding", "SprintDuplicateQuestions", "PairClassification", "Retrieve semantically similar text"),
        ("qwen3_embedding", "CMedQAv1-reranking", "Reranking", MEDICAL),
        ("gritlm", "STS22", "STS", "Retrieve semantically similar text."),
    ],
)  # fmt: skip
def test_a_task_has_its_instruction(table: str, task: str, kind: str, instruction: str | None) -> None:
    assert load_instruction_table(table).find_instruction(task, kind) == instruction


def test_the_parts_of_cqadupstack_share_its_instruction() -> None:
    for table in ("nv_embed", "e5_mistral"):
        instruction = load_instruction_table(table).find_instruction("CQADupstackTexRetrieval", "Retrieval")
        assert instruction is not None and "duplicates" in instruction


def test_documents_of_symmetric_tasks_get_the_instruction_too() -> None:
    qwen3, kalm = load_instruction_table("qwen3_embedding"), load_instruction_table("kalm")
    assert qwen3.is_symmetric("ArguAna", "Retrieval") and qwen3.is_symmetric("SciDocsRR", "Reranking")
    assert qwen3.is_symmetric("CQADupstackUnixRetrieval", "Retrieval")
    assert not qwen3.is_symmetric("SciFact", "Retrieval") and not kalm.is_symmetric("SciDocsRR", "Reranking")


def test_a_user_names_a_table_or_a_file(tmp_path: Path) -> None:
    assert read_instruction_table("kalm") == load_instruction_table("kalm")
    simple, full = tmp_path / "simple.json", tmp_path / "full.yaml"
    simple.write_text('{"SciFact": "Find evidence"}')
    full.write_text("by_type: {STS: ''}\nsymmetric: [Reranking]\n")
    assert read_instruction_table(str(simple)).find_instruction("SciFact", "Retrieval") == "Find evidence"
    assert read_instruction_table(str(full)).find_instruction("STS17", "STS") == ""
    digests = {read_instruction_table(name).compute_digest() for name in ("kalm", str(simple), str(full))}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, r"kalmm: no such instruction file or table \(tables: .*\)\. Did you mean 'kalm' or 'kalm_v2'\?"),
        ("by_tasks: {SciFact: x}\nby_type: {}", r"kalmm: unknown key by_tasks\. Did you mean by_task\?"),
        ("by_typ: {STS: x}", r"kalmm: unknown key by_typ\. Did you mean by_type\?"),
        ("SciFact: 3", r"kalmm: by_task\.SciFact is 3 \(expected a text"),
        ("[a]", "kalmm: holds a list"),
    ],
)
def test_a_bad_instruction_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("kalmm").write_text(content)
    with pytest.raises(UserError, match=line):
        read_instruction_table("kalmm")
