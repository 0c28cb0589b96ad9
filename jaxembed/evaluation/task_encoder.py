"""A model as evaluation sees it: texts and prompts become vectors, and each task gets its instruction."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from jaxembed.config.field_lists import log_once
from jaxembed.config.spec import EmbeddingSpec

EncodeWithPrompt = Callable[[Sequence[str], str], np.ndarray]  # (texts, complete prompt) -> unit vectors [N, D]


@dataclasses.dataclass
class TaskEncoder:
    """A model that tasks score.

    Attributes:
        encode_with_prompt: Encodes texts under a complete prompt.
        spec: Builds the prompts.
        name: Name of the model.
        revision: Identifies everything that decides the vectors. Stored results belong to it.
    """

    encode_with_prompt: EncodeWithPrompt
    spec: EmbeddingSpec
    name: str
    revision: str

    @property
    def document_prompt(self) -> str:
        """The complete prompt of documents."""
        return self.spec.prompts.get("document", self.spec.plain_prompt)

    def get_instruction(self, default: str) -> str:
        """Return the instruction of a task's queries; empty for a model that reads no instructions.

        Args:
            default: The instruction that the task itself names.
        """
        return default if self.spec.prompts and not self.spec.fixed_prompts else ""


def log_prompt_choice(encoder: TaskEncoder) -> None:
    """Log once where the prompts of queries and documents come from."""
    spec = encoder.spec
    if not spec.prompts:
        log_once(f"{encoder.name}: no prompts are stored with the model, so texts get {spec.plain_prompt!r}", logging.INFO)
        return
    if spec.fixed_prompts:
        log_once(f"{encoder.name}: texts get the prompts that are stored for their side, whatever the task", logging.INFO)
        return
    stored = "document" in spec.prompts
    document = f"the stored prompt {spec.prompts['document']!r}" if stored else f"{spec.plain_prompt!r}, as no prompt is stored"
    log_once(
        f"{encoder.name}: queries get the task's instruction in {spec.instruction_template!r}, documents get {document}",
        logging.INFO,
    )
