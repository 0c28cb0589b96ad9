"""Instruction tables: which instruction a task gets, and that MTEB has the tasks that they list."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from jaxembed.config.instructions import INSTRUCTION_TABLES, load_instruction_table
from jaxembed.config.shipped import shipped_folder

CLAIM = "Given a claim, retrieve documents that support or refute the claim"
BIORXIV = "Identify the main category of Biorxiv papers based on the titles"


def read_mteb_names() -> set[str]:
    """Return the names of MTEB's tasks, from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("mteb")
    assert spec is not None and spec.origin is not None
    files = (Path(spec.origin).parent / "tasks").rglob("*.py")
    return {name for path in files for name in re.findall(r'name="([^"]+)"', path.read_text())}


def test_the_tables_are_the_files_that_ship() -> None:
    assert tuple(sorted(path.stem for path in (shipped_folder() / "instructions").glob("*.yaml"))) == INSTRUCTION_TABLES


def test_mteb_has_every_task() -> None:
    names = read_mteb_names()
    assert len(names) > 1000
    for table in INSTRUCTION_TABLES:
        assert set(load_instruction_table(table).by_task) <= names, table


@pytest.mark.parametrize("name", INSTRUCTION_TABLES)
def test_a_table_is_complete(name: str) -> None:
    table = load_instruction_table(name)
    assert "arXiv:" in table.source and "{instruction}" in table.template and table.training
    texts = [*table.by_type.values(), *table.by_task.values(), *(text for listed in table.training.values() for text in listed)]
    assert all(text == text.strip() and "  " not in text and not text.startswith("Instruct") for text in texts)


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
    ],
)  # fmt: skip
def test_a_task_has_its_instruction(table: str, task: str, kind: str, instruction: str | None) -> None:
    assert load_instruction_table(table).find_instruction(task, kind) == instruction


def test_the_parts_of_cqadupstack_share_its_instruction() -> None:
    for table in ("nv_embed", "e5_mistral"):
        instruction = load_instruction_table(table).find_instruction("CQADupstackTexRetrieval", "Retrieval")
        assert instruction is not None and "duplicates" in instruction
