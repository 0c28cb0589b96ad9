"""Choose the prompts of a task: from the user's table, the published model's table, the stored prompts, or MTEB."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator

from jaxembed.config.field_lists import log_once
from jaxembed.config.instructions import InstructionTable, load_instruction_table
from jaxembed.config.spec import EmbeddingSpec

DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names of the prompt of documents in sentence-transformers folders
PROMPT_DIGEST_CHARS = 8


@dataclasses.dataclass(frozen=True)
class TaskPrompts:
    """The prompts of a task.

    Attributes:
        instruction: Instruction of the queries; empty if they get none.
        query: Complete prompt of queries, and of all texts of a symmetric task.
        document: Complete prompt of documents.
        origin: Where the instruction comes from, for messages.
    """

    instruction: str
    query: str
    document: str
    origin: str


@dataclasses.dataclass(frozen=True)
class PromptChooser:
    """Chooses the prompts of tasks.

    The first of these that has an instruction for a task is used: the user's table, the table of the published model, the
    prompts that are stored with the model, the task itself.

    Attributes:
        spec: How the model's texts become vectors.
        user_table: The user's table, if any.
        user_table_name: Its name, for messages.
    """

    spec: EmbeddingSpec
    user_table: InstructionTable | None = None
    user_table_name: str = ""

    def choose(self, task_name: str, task_type: str, default: str, stored_name: str = "") -> TaskPrompts:
        """Return the prompts of a task.

        Args:
            task_name: Name of the task.
            task_type: Its type in MTEB, such as Retrieval.
            default: The instruction that the task itself names.
            stored_name: Name of the stored prompt that only the user's table overrides, if the model has it.
        """
        stored_prompt = self.spec.prompts.get(stored_name)
        for origin, table in self._list_tables():
            if stored_prompt is not None and table is not self.user_table:
                break
            instruction = table.find_instruction(task_name, task_type)
            if instruction is not None:
                query = self.spec.build_prompt(instruction)
                document = query if table.is_symmetric(task_name, task_type) else self._document_prompt
                return TaskPrompts(instruction, query, document, origin)
        if stored_prompt is None:
            stored_prompt = find_stored_prompt(self.spec, task_name, task_type)
        if stored_prompt is not None:
            return TaskPrompts(
                self.spec.extract_instruction(stored_prompt), stored_prompt, self._document_prompt, "the stored prompts"
            )
        return TaskPrompts(default, self.spec.build_prompt(default), self._document_prompt, "mteb")

    def is_symmetric(self, task_name: str, task_type: str) -> bool:
        """Return whether a table gives the documents of a task the instruction of its queries too."""
        for _, table in self._list_tables():
            if table.find_instruction(task_name, task_type) is not None:
                return table.is_symmetric(task_name, task_type)
        return False

    def compute_digest(self) -> str:
        """Return a digest of the tables, on which scores depend; empty without tables."""
        digests = [table.compute_digest() for _, table in self._list_tables()]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:PROMPT_DIGEST_CHARS] if digests else ""

    def log_origins(self) -> None:
        """Log once where the prompts of queries and documents come from."""
        if tables := [origin for origin, _ in self._list_tables()]:
            table_note, other_note = "instructions come from " + ", then ".join(tables), "; other tasks get "
        else:
            table_note, other_note = "", "queries get "
        if not self.spec.prompts and not self.spec.instruction_table:
            other_note += f"the prompt {self.spec.plain_prompt!r}, because no prompts are stored with the model"
        elif (fixed_prompt := _find_fixed_prompt(self.spec)) is not None:
            other_note += f"the stored prompt {fixed_prompt!r}"
        else:
            stored_note = "the stored prompt of the task or of its type, or without one " if self._has_query_prompts() else ""
            other_note += f"{stored_note}mteb's instruction in {self.spec.instruction_template!r}"
        prompt_kind = "the stored prompt " if self._find_document_prompt() is not None else ""
        log_once(f"{table_note}{other_note}; documents get {prompt_kind}{self._document_prompt!r}", logging.INFO)

    def _list_tables(self) -> Iterator[tuple[str, InstructionTable]]:
        if self.user_table is not None:
            yield self.user_table_name, self.user_table
        if self.spec.instruction_table:
            yield f"the table {self.spec.instruction_table}", load_instruction_table(self.spec.instruction_table)

    def _has_query_prompts(self) -> bool:
        """Return whether the model has prompts, apart from those of documents."""
        return bool(self.spec.prompts.keys() - set(DOCUMENT_PROMPTS))

    @property
    def _document_prompt(self) -> str:
        prompt = self._find_document_prompt()
        return self.spec.plain_prompt if prompt is None else prompt

    def _find_document_prompt(self) -> str | None:
        return next((self.spec.prompts[name] for name in DOCUMENT_PROMPTS if name in self.spec.prompts), None)


def find_stored_prompt(spec: EmbeddingSpec, task_name: str, task_type: str) -> str | None:
    """Return the stored prompt of a task's queries, or None if the task's own instruction should be used.

    The names are those of mteb: the task, then its type. A model whose stored prompts contain no instruction, such as
    "query: ", uses the prompt of queries for every task. A model without stored prompts, and without a table of a published
    model, gets no instructions.
    """
    for name in (f"{task_name}-query", task_name, f"{task_type}-query", task_type):
        if name in spec.prompts:
            return spec.prompts[name]
    return _find_fixed_prompt(spec) if spec.prompts or spec.instruction_table else spec.plain_prompt


def _find_fixed_prompt(spec: EmbeddingSpec) -> str | None:
    """Return the stored prompt of queries if no stored prompt contains an instruction, otherwise None."""
    if spec.fixed_prompts:
        return spec.build_prompt(None, side="query")
    query_prompts = [prompt for name, prompt in spec.prompts.items() if name not in DOCUMENT_PROMPTS]
    return None if any(map(spec.extract_instruction, query_prompts)) else spec.prompts.get("query")
