"""MTEB on any encoder: the instruction of each task, the scores, and both written side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError, brief
from jaxembed.files import write_json

EncodePrompted = Callable[[Sequence[str], str], np.ndarray]  # (texts, whole prompt) -> unit vectors [N, D]


@dataclasses.dataclass
class MtebEncoder:
    """mteb's EncoderProtocol around an encode function. `revision` must identify the weights: results are cached by it."""

    run: EncodePrompted
    spec: EmbeddingSpec
    name: str
    revision: str

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Vectors of the batches of texts that mteb hands over, under the task's instruction."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.run(texts, self.prompt(task_metadata, prompt_type))

    def prompt(self, task: Any, prompt_type: Any) -> str:
        """Empty for a model that was trained without instructions; else the task's, but for documents the model's own."""
        if getattr(prompt_type, "value", None) == "document":
            return self.spec.prompts.get("document", self.spec.plain_prompt)
        return self.spec.prompt(self.instruction(task))

    def instruction(self, task: Any) -> str:
        """The instruction of a task's queries; empty for a model that was trained without."""
        return task_instruction(task) if self.spec.prompts else ""

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        return np.asarray(a) @ np.asarray(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        return np.sum(np.asarray(a) * np.asarray(b), axis=1)

    @property
    def mteb_model_meta(self) -> Any:
        from mteb.models.model_meta import ModelMeta

        return ModelMeta.create_empty({"name": f"jaxembed/{self.name}", "revision": self.revision})


def task_instruction(task: Any) -> str:
    """The instruction in a task's metadata, else mteb's default for its kind."""
    from mteb.abstasks.abstask import get_abstask_prompt

    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    return str(prompt or get_abstask_prompt(task.name))


def find_tasks(names: Sequence[str], benchmark: str | None) -> list[Any]:
    """mteb's task objects by name, or those of a benchmark; `UserError` names what mteb does not know."""
    mteb = import_mteb()
    try:
        return list(mteb.get_benchmark(benchmark).tasks) if benchmark else list(mteb.get_tasks(tasks=list(names)))
    except (KeyError, ValueError) as error:
        reason = brief(error.args[0]).removeprefix("KeyError: ")
        raise UserError(f"mteb knows no such task or benchmark: {reason}") from None


def import_mteb() -> Any:
    try:
        import mteb
    except ModuleNotFoundError:
        raise UserError('mteb is not installed; pip install "jaxembed[eval]"') from None
    return mteb


def evaluate(encoder: MtebEncoder, tasks: Sequence[Any], out: Path | None = None) -> dict[str, Any]:
    """Runs the tasks; {task: {"score", "instruction", "subsets"}}, scores from 0 to 1 by each task's main metric.

    With `out`, mteb's full results and `scores.json` are kept there, and tasks scored before are not run again.
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
            told = f"{name}: its data could not be fetched ({brief(error)}); connect, or fetch it beforehand"
            raise UserError(told) from None
        entries = [entry for split in result.task_results[0].scores.values() for entry in split]
        subsets = {entry["hf_subset"]: round(float(entry["main_score"]), 6) for entry in entries}
        instruction = encoder.instruction(task.metadata)
        scores[name] = {"score": float(np.mean(list(subsets.values()))), "instruction": instruction, "subsets": subsets}
        if out:
            write_json(out / "scores.json", scores)
    return scores
