"""A model as mteb's EncoderProtocol."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from jaxembed.evaluation.task_encoder import FULL_VECTORS, TaskEncoder, VectorVersion
from jaxembed.evaluation.task_prompts import TaskPrompts
from jaxembed.search.precision import needs_ranges


@dataclasses.dataclass
class MtebEncoder:
    """A model as mteb's EncoderProtocol.

    Attributes:
        encoder: The model.
        version: The version of its vectors that is scored.
    """

    encoder: TaskEncoder
    version: VectorVersion = FULL_VECTORS

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Encode batches of texts under the instruction of the task. mteb defines the parameters."""
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self.encoder.encode(texts, self.build_prompt(task_metadata, prompt_type))
        return self.encoder.convert(vectors, self.version)

    def build_prompt(self, task: Any, prompt_type: Any) -> str:
        """Return the complete prompt: that of documents if `prompt_type` says so, otherwise that of queries."""
        prompts = choose_prompts(self.encoder, task)
        return prompts.document if getattr(prompt_type, "value", None) == "document" else prompts.query

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Return the dot products [A, B] of two sets of vectors."""
        return np.asarray(a) @ np.asarray(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Return the dot products [N] of N pairs of vectors."""
        return np.sum(np.asarray(a) * np.asarray(b), axis=1)

    @property
    def mteb_model_meta(self) -> Any:
        """The model's name and revision for mteb, with the settings that change its vectors."""
        from mteb.models.model_meta import ModelMeta

        width, precision, ranges = self.version.width, self.version.precision, self.encoder.ranges
        meta = ModelMeta.create_empty(
            {"name": f"jaxembed/{self.encoder.name}", "revision": self.encoder.results_revision, "embed_dim": width}
        )
        experiment_settings: dict[str, Any] = {} if width in (None, self.encoder.width) else {"embed_dim": width}
        if precision != "float32":
            experiment_settings["precision"] = precision
        if needs_ranges(precision) and ranges is not None:
            experiment_settings["ranges"] = hashlib.sha256(ranges.tobytes()).hexdigest()[:8]
        return meta.model_copy(update={"experiment_kwargs": experiment_settings}) if experiment_settings else meta


def choose_prompts(encoder: TaskEncoder, task: Any) -> TaskPrompts:
    """Return the prompts of a task, given its metadata in mteb."""
    return encoder.prompts.choose(task.name, str(task.type), get_task_instruction(task))


def get_task_instruction(task: Any) -> str:
    """Return the instruction in a task's metadata, else mteb's default for its type."""
    from mteb.abstasks.abstask import get_abstask_prompt

    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    return str(prompt or get_abstask_prompt(task.name))
