"""Score any encoder on MTEB: choose each task's instruction, run the tasks, write the scores."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.field_lists import log_once
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError, summarize
from jaxembed.files import write_json

log = logging.getLogger("jaxembed")

EncodeWithPrompt = Callable[[Sequence[str], str], np.ndarray]  # (texts, complete prompt) -> unit vectors [N, D]


@dataclasses.dataclass
class MtebEncoder:
    """An encode function as mteb's EncoderProtocol.

    Attributes:
        encode_with_prompt: Encodes texts under a complete prompt.
        spec: Builds the prompts.
        name: Name of the model.
        revision: Identifies everything that decides the vectors. mteb caches results by it.
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
    """Return the mteb tasks with these names, or those of a benchmark.

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
        raise UserError("mteb is not installed. Run pip install '.[eval]'.") from None
    except (OSError, RuntimeError) as error:  # it creates its cache; RuntimeError: there is no home directory
        reason = summarize(error)
        raise UserError(
            f"mteb: cannot be imported ({reason}). Set HOME or MTEB_CACHE to a folder that can be written."
        ) from None
    return mteb


def score_tasks(encoder: MtebEncoder, tasks: Sequence[Any], out: Path | None = None) -> dict[str, Any]:
    """Score an encoder on MTEB tasks.

    Args:
        encoder: The encoder.
        tasks: Task objects of mteb.
        out: Folder for mteb's full results and `scores.json`. Tasks that were scored there before are not run again.

    Returns:
        {task: {"score", "instruction", "subsets", "splits"}}. Scores are the main metric of each task. `score` is mteb's own
        aggregate over all splits and subsets; `subsets` and `splits` are the means by subset and by split. A score that is not
        finite is null.

    Raises:
        UserError: If the data of a task cannot be downloaded.
    """
    mteb = import_mteb()
    from mteb.cache import ResultCache

    log_prompt_choice(encoder)

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
        scores[name] = summarize_task(result.task_results[0], encoder.get_instruction(task.metadata))
        if out:
            write_json(out / "scores.json", scores)
    return scores


def log_prompt_choice(encoder: MtebEncoder) -> None:
    """Log once where the prompts of queries and documents come from."""
    spec = encoder.spec
    if not spec.prompts:
        log_once(f"{encoder.name}: no prompts are stored with the model, so texts get {spec.plain_prompt!r}", logging.INFO)
        return
    stored = "document" in spec.prompts
    document = f"the stored prompt {spec.prompts['document']!r}" if stored else f"{spec.plain_prompt!r}, as no prompt is stored"
    log_once(
        f"{encoder.name}: queries get the task's instruction in {spec.instruction_template!r}, documents get {document}",
        logging.INFO,
    )


def summarize_task(result: Any, instruction: str) -> dict[str, Any]:
    """Return the main scores of a task.

    Args:
        result: mteb's TaskResult.
        instruction: Instruction of the task's queries.

    Returns:
        {"score", "instruction", "subsets", "splits"}, as in `score_tasks`.
    """
    if len(result.scores) > 1:
        log_once(f"{result.task_name}: the score is mteb's mean over the splits {', '.join(result.scores)}", logging.INFO)
    by_subset: dict[str, list[float]] = {}
    by_split: dict[str, list[float]] = {}
    for split, entries in result.scores.items():
        for entry in entries:
            score = float(entry["main_score"])
            by_subset.setdefault(entry["hf_subset"], []).append(score)
            by_split.setdefault(split, []).append(score)
    aggregate = _finite_or_none(float(result.get_score()))
    if aggregate is None:
        log.warning(
            "%s: the score is not finite, which happens if all vectors are equal; it is written as null", result.task_name
        )
    return {
        "score": aggregate,
        "instruction": instruction,
        "subsets": {subset: _mean(values) for subset, values in by_subset.items()},
        "splits": {split: _mean(values) for split, values in by_split.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return _finite_or_none(round(float(np.mean(values)), 6))


def _finite_or_none(score: float) -> float | None:
    return score if math.isfinite(score) else None
