"""Instruction tables of published models: which instruction a task gets in evaluation, and a data set in training.

A table is a YAML file, `configs/instructions/NAME.yaml`, that cites the paper it was transcribed from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from jaxembed.config.sections import Section, parse_section, read_tree
from jaxembed.config.shipped import read_shipped_yaml
from jaxembed.errors import UserError, suggest
from jaxembed.files import exists

INSTRUCTION_TABLES = ("e5_mistral", "gritlm", "kalm", "kalm_v2", "nv_embed", "qwen3_embedding")
# Later versions and smaller variants of an MTEB task share its instruction: FEVERHardNegatives.v2, CQADupstackTexRetrieval.
REVISION = re.compile(r"\.v\d+$")
REDUCTION = re.compile(r"HardNegatives$")
CQADUPSTACK_PART = re.compile(r"CQADupstack[A-Z][a-z]+Retrieval")


class InstructionTable(Section):
    """The instructions of a published model, or of a user's file. An empty instruction means that texts get none."""

    source: str = Field("", description="Paper and tables that the instructions come from.")
    template: str = Field("", description="Template of the prompt before a text; contains {instruction}.")
    by_type: dict[str, str] = Field({}, description="Instruction of every task of a type of MTEB, such as STS.")
    by_task: dict[str, str] = Field({}, description="Instruction by name of a task. It takes precedence over by_type.")
    symmetric: tuple[str, ...] = Field(
        (), description="Tasks, and types of tasks, whose documents get the instruction of the queries too."
    )
    training: dict[str, tuple[str, ...]] = Field(
        {}, description="Instructions by name of a training set, as in the paper's table."
    )

    def find_instruction(self, task_name: str, task_type: str) -> str | None:
        """Return the instruction of the queries of a task. For a symmetric task, it is that of all texts.

        Args:
            task_name: Name of a task of MTEB, of any version.
            task_type: Its type in MTEB, such as Retrieval.

        Returns:
            The instruction. It is empty if the model gives the task none, and None if the table does not list the task.
        """
        names = [name for name in _list_task_names(task_name) if name in self.by_task]
        return self.by_task[names[0]] if names else self.by_type.get(task_type)

    def is_symmetric(self, task_name: str, task_type: str) -> bool:
        """Return whether the documents of a task get the instruction of its queries too."""
        return task_type in self.symmetric or any(name in self.symmetric for name in _list_task_names(task_name))

    def compute_digest(self) -> str:
        """Return the SHA-256 of the parts that determine the prompts, in hexadecimal digits."""
        content = self.model_dump(mode="json", include={"by_type", "by_task", "symmetric"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_instruction_table(name: str) -> InstructionTable:
    """Read one of `INSTRUCTION_TABLES`.

    Raises:
        UserError: There is no such table, or the file has an unknown key or a wrong value.
    """
    if name not in INSTRUCTION_TABLES:
        raise UserError(f"no instruction table {name!r} (expected one of {', '.join(INSTRUCTION_TABLES)})")
    file = f"instructions/{name}.yaml"
    return parse_section(InstructionTable, read_shipped_yaml(file), file)


def read_instruction_table(name: str) -> InstructionTable:
    """Read the table that a user names: a YAML or JSON file, or one of `INSTRUCTION_TABLES`.

    A file has the keys of a table (`by_task`, `by_type`), or is simply a mapping from task to instruction.

    Args:
        name: Path of a file, or name of a shipped table.

    Raises:
        UserError: There is no such file or table, or the file is malformed.
    """
    path = Path(name)
    if not exists(path):
        if name in INSTRUCTION_TABLES:
            return load_instruction_table(name)
        tables = ", ".join(INSTRUCTION_TABLES)
        raise UserError(f"{name}: no such instruction file or table (tables: {tables}).{suggest(name, INSTRUCTION_TABLES)}")
    tree = read_tree(path)
    has_table_keys = tree.keys() & InstructionTable.model_fields.keys() or any(isinstance(v, dict) for v in tree.values())
    if not has_table_keys:
        tree = {"by_task": tree}
    return parse_section(InstructionTable, tree, name)


def _list_task_names(task_name: str) -> Iterator[str]:
    """Yield the names under which a table may list a task: its own, and those of the task that it was made from."""
    yield task_name
    name = REVISION.sub("", task_name)
    yield name
    name = REDUCTION.sub("", name)
    yield name
    yield CQADUPSTACK_PART.sub("CQADupstackRetrieval", name)
