"""A model as mteb's EncoderProtocol."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxembed.evaluation.task_encoder import TaskEncoder


@dataclasses.dataclass
class MtebEncoder:
    """A model as mteb's EncoderProtocol.

    Attributes:
        encoder: The model.
    """

    encoder: TaskEncoder

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Encode batches of texts under the instruction of the task. mteb defines the parameters."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encoder.encode_with_prompt(texts, self.build_prompt(task_metadata, prompt_type))

    def build_prompt(self, task: Any, prompt_type: Any) -> str:
        """Return the model's own prompt for documents, and the prompt with the task's instruction for other texts."""
        if getattr(prompt_type, "value", None) == "document":
            return self.encoder.document_prompt
        return self.encoder.spec.prompt(self.encoder.get_instruction(get_task_instruction(task)), side="query")

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Return the dot products [A, B] of two sets of vectors."""
        return np.asarray(a) @ np.asarray(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Return the dot products [N] of N pairs of vectors."""
        return np.sum(np.asarray(a) * np.asarray(b), axis=1)

    @property
    def mteb_model_meta(self) -> Any:
        """The model's name and revision for mteb."""
        from mteb.models.model_meta import ModelMeta

        return ModelMeta.create_empty({"name": f"jaxembed/{self.encoder.name}", "revision": self.encoder.revision})


def get_task_instruction(task: Any) -> str:
    """Return the instruction in a task's metadata, else mteb's default for its type."""
    from mteb.abstasks.abstask import get_abstask_prompt

    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    return str(prompt or get_abstask_prompt(task.name))
