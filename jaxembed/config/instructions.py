"""Instruction tables of published models: which instruction a task gets in evaluation, and a data set in training.

A table is a YAML file, `configs/instructions/NAME.yaml`, that cites the paper it was transcribed from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from jaxembed.config.sections import Section, parse_section
from jaxembed.config.shipped import read_shipped_yaml

INSTRUCTION_TABLES = ("e5_mistral", "kalm", "nv_embed")
# Later versions and reductions of an MTEB task have its instruction: FEVERHardNegatives.v2, CQADupstackTexRetrieval.
REVISION = re.compile(r"\.v\d+$")
REDUCTION = re.compile(r"HardNegatives$")
CQADUPSTACK_PART = re.compile(r"CQADupstack[A-Z][a-z]+Retrieval")


class InstructionTable(Section):
    """The instructions of a published model. An empty instruction means that texts get none."""

    source: str = Field(description="Paper and tables that the instructions come from.")
    template: str = Field(description="Template of the prompt before a text; contains {instruction}.")
    by_type: dict[str, str] = Field(description="Instruction of every task of a type of MTEB, such as STS.")
    by_task: dict[str, str] = Field(description="Instruction by name of a task of MTEB. It takes precedence over by_type.")
    training: dict[str, tuple[str, ...]] = Field(description="Instructions by name of a training set, as in the paper's table.")

    def find_instruction(self, task_name: str, task_type: str) -> str | None:
        """Return the instruction of the queries of a task. For a symmetric task, it is that of all texts.

        Args:
            task_name: Name of a task of MTEB, of any version.
            task_type: Its type in MTEB, such as Retrieval.

        Returns:
            The instruction. It is empty if the model gives the task none, and None if the table does not say.
        """
        names = [name for name in _list_task_names(task_name) if name in self.by_task]
        return self.by_task[names[0]] if names else self.by_type.get(task_type)


def load_instruction_table(name: str) -> InstructionTable:
    """Read one of `INSTRUCTION_TABLES`.

    Raises:
        UserError: The file has an unknown key or a wrong value.
    """
    file = f"instructions/{name}.yaml"
    return parse_section(InstructionTable, read_shipped_yaml(file), file)


def _list_task_names(task_name: str) -> Iterator[str]:
    """Yield the names under which a table may list a task: its own, and those of the task that it was made from."""
    yield task_name
    name = REVISION.sub("", task_name)
    yield name
    name = REDUCTION.sub("", name)
    yield name
    yield CQADUPSTACK_PART.sub("CQADupstackRetrieval", name)
