"""Score any encoder on MTEB: choose each task's instruction, run the tasks, write the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError, summarize
from jaxembed.files import write_json

EncodeWithPrompt = Callable[[Sequence[str], str], np.ndarray]  # (texts, complete prompt) -> unit vectors [N, D]


@dataclasses.dataclass
class MtebEncoder:
    """An encode function as mteb's EncoderProtocol.

    Attributes:
        encode_with_prompt: Encodes texts under a complete prompt.
        spec: Builds the prompts.
        name: Name of the model.
        revision: Identifies the weights. mteb caches results by it.
    """

    encode_with_prompt: EncodeWithPrompt
    spec: EmbeddingSpec
    name: str
    revision: str

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Encode batches of texts under the instruction of the task. mteb defines the parameters."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encode_with_prompt(texts, self.build_prompt(task_metadata, prompt_type))

    def build_prompt(self, task: Any, prompt_type: Any) -> str:
        """Return the model's own prompt for documents, and the prompt with the task's instruction for other texts."""
        if getattr(prompt_type, "value", None) == "document":
            return self.spec.prompts.get("document", self.spec.plain_prompt)
        return self.spec.prompt(self.get_instruction(task))

    def get_instruction(self, task: Any) -> str:
        """Return the instruction of a task's queries; empty for a model that was trained without instructions."""
        return get_task_instruction(task) if self.spec.prompts else ""

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

        return ModelMeta.create_empty({"name": f"jaxembed/{self.name}", "revision": self.revision})


def get_task_instruction(task: Any) -> str:
    """Return the instruction in a task's metadata, else mteb's default for its type."""
    from mteb.abstasks.abstask import get_abstask_prompt

    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    return str(prompt or get_abstask_prompt(task.name))


def find_tasks(names: Sequence[str], benchmark: str | None) -> list[Any]:
    """Return mteb's tasks of some names, or those of a benchmark.

    Raises:
        UserError: If mteb does not have a task or the benchmark.
    """
    mteb = import_mteb()
    try:
        return list(mteb.get_benchmark(benchmark).tasks) if benchmark else list(mteb.get_tasks(tasks=list(names)))
    except (KeyError, ValueError) as error:
        reason = summarize(error.args[0]).removeprefix("KeyError: ")
        raise UserError(f"mteb: no such task or benchmark: {reason}") from None


def import_mteb() -> Any:
    """Import mteb, or raise a `UserError` that says how to install it."""
    try:
        import mteb
    except ModuleNotFoundError:
        raise UserError('mteb is not installed. Install it by: pip install "jaxembed[eval]"') from None
    return mteb


def score_tasks(encoder: MtebEncoder, tasks: Sequence[Any], out: Path | None = None) -> dict[str, Any]:
    """Score an encoder on MTEB tasks.

    Args:
        encoder: The encoder.
        tasks: Task objects of mteb.
        out: Folder for mteb's full results and `scores.json`. Tasks that were scored there before are not run again.

    Returns:
        {task: {"score", "instruction", "subsets"}}. Scores are the main metric of each task, from 0 to 1.

    Raises:
        UserError: If the data of a task cannot be downloaded.
    """
    mteb = import_mteb()
    from mteb.cache import ResultCache

    cache = ResultCache(out / "results") if out else None
    scores: dict[str, Any] = {}
    for task in tasks:
        name = task.metadata.name
        mode = "only-missing" if out else "always"
        try:
            result = mteb.evaluate(encoder, task, cache=cache, overwrite_strategy=mode, show_progress_bar=False)
        except ConnectionError as error:
            raise UserError(
                f"{name}: cannot download its data ({summarize(error)}). Connect to the network, or download it beforehand."
            ) from None
        entries = [entry for split in result.task_results[0].scores.values() for entry in split]
        subsets = {entry["hf_subset"]: round(float(entry["main_score"]), 6) for entry in entries}
        instruction = encoder.get_instruction(task.metadata)
        scores[name] = {"score": float(np.mean(list(subsets.values()))), "instruction": instruction, "subsets": subsets}
        if out:
            write_json(out / "scores.json", scores)
    return scores
