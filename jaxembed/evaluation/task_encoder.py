"""The encoder that evaluation tasks score. It can cache the vectors of a task."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxembed.config.field_lists import log_once
from jaxembed.config.instructions import InstructionTable
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.progress import TaskProgress
from jaxembed.evaluation.task_prompts import PromptChooser
from jaxembed.evaluation.vector_cache import VectorCache
from jaxembed.search.precision import Precision, simulate_quantization

EncodeWithPrompt = Callable[[Sequence[str], str], np.ndarray]  # (texts, complete prompt) -> unit vectors [N, D]

TEXTS_PER_UPDATE = 4096  # texts that are encoded between two updates of the progress bar


@dataclasses.dataclass(frozen=True)
class VectorVersion:
    """A form of the vectors in which tasks are scored.

    Attributes:
        width: Width to which vectors are truncated. None: the full width.
        precision: Precision to which they are then quantized.
    """

    width: int | None = None
    precision: Precision = "float32"


FULL_VECTORS = VectorVersion()


@dataclasses.dataclass
class TaskEncoder:
    """A model that tasks score.

    Attributes:
        encode_with_prompt: Encodes texts under a complete prompt.
        spec: Builds the prompts.
        name: Name of the model.
        revision: Identifies everything that the vectors depend on. Stored results are valid for one revision.
        width: Width of the vectors.
        widths: Widths at which tasks are scored, largest first. Empty: the full width only.
        precisions: Precisions at which tasks are scored: the first at all widths, the others at the largest. Empty: float32.
        ranges: Ranges of the vectors for int8 and uint8, float32 [2, W].
        prompts: Chooses the prompts of tasks. Default: no table of the user.
        cache: Keeps the vectors of the current task. Default: none are kept.
        progress: Progress bar over all tasks.
    """

    encode_with_prompt: EncodeWithPrompt
    spec: EmbeddingSpec
    name: str
    revision: str
    width: int = 0
    widths: tuple[int, ...] = ()
    precisions: tuple[Precision, ...] = ()
    ranges: np.ndarray | None = None
    prompts: PromptChooser = dataclasses.field(init=False)
    cache: VectorCache | None = None
    progress: TaskProgress | None = None

    def __post_init__(self) -> None:
        """Choose prompts without a table of the user."""
        self.prompts = PromptChooser(self.spec)

    def use_instructions(self, table: InstructionTable, name: str) -> None:
        """Let the instructions of a user's table override all others."""
        self.prompts = PromptChooser(self.spec, table, name)

    @property
    def results_revision(self) -> str:
        """Identifies everything that scores depend on: the vectors, and the tables of instructions."""
        digest = self.prompts.compute_digest()
        return f"{self.revision}-{digest}" if digest else self.revision

    def encode(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """Return unit vectors, float32 [N, D]. Vectors that the cache holds are not computed again.

        Args:
            texts: N texts.
            prompt: Complete prompt of every text.
        """
        if self.cache is None:
            return self._join(self._encode_parts(texts, prompt), prompt)
        return self.cache.fetch(texts, prompt, lambda: self._encode_parts(texts, prompt))

    @property
    def versions(self) -> list[VectorVersion]:
        """The versions of the vectors to score, one after the other."""
        first, *others = self.precisions or ("float32",)
        versions = [VectorVersion(width, first) for width in self.widths or (None,)]
        return versions + [VectorVersion(versions[0].width, precision) for precision in others]

    def convert(self, vectors: np.ndarray, version: VectorVersion) -> np.ndarray:
        """Return unit vectors [N, W] whose dot products are the scores of a version of `vectors`."""
        return simulate_quantization(
            truncate_vectors(vectors, version.width or vectors.shape[1]), version.precision, self.ranges
        )

    def summarize_versions(self, scores: Sequence[float | None]) -> dict[str, dict[str, float | None]]:
        """Return the scores of all versions, in their order, by width and by precision, where the options name some."""
        version_scores = dict(zip(self.versions, scores, strict=True))
        first, summary = self.versions[0], {}
        if self.widths:
            summary["widths"] = {str(w): version_scores[dataclasses.replace(first, width=w)] for w in self.widths}
        if self.precisions:
            summary["precisions"] = {p: version_scores[dataclasses.replace(first, precision=p)] for p in self.precisions}
        return summary

    def _encode_parts(self, texts: Sequence[str], prompt: str) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), TEXTS_PER_UPDATE):
            part = texts[start : start + TEXTS_PER_UPDATE]
            yield self.encode_with_prompt(part, prompt)
            if self.progress:
                self.progress.advance(len(part))

    def _join(self, parts: Iterator[np.ndarray], prompt: str) -> np.ndarray:
        """Return the parts as one array. Without parts, the model gives the width of the empty array."""
        vectors = list(parts)
        return np.concatenate(vectors) if vectors else self.encode_with_prompt([], prompt)


def truncate_vectors(vectors: np.ndarray, width: int) -> np.ndarray:
    """Return the first `width` dimensions of each vector, normalized again (Matryoshka), float32 [N, width]."""
    if width == vectors.shape[1]:
        return vectors
    leading_dimensions = np.array(vectors[:, :width], np.float32)
    return leading_dimensions / np.maximum(np.linalg.norm(leading_dimensions, axis=1, keepdims=True), 1e-12)


def name_model(model: Path) -> str:
    """Return the name of a model for tables and files: the last part of its path, even of `.`, or of its hub id."""
    return Path(os.path.abspath(model)).name


def check_widths(widths: Sequence[int], spec: EmbeddingSpec, model_width: int, model: str) -> tuple[int, ...]:
    """Return the widths of --dim, largest first, each once.

    Widths that training did not include are logged.

    Args:
        widths: Widths of the option.
        spec: Spec of the model.
        model_width: Width of its vectors.
        model: Its name, for messages.

    Raises:
        UserError: A width is above the model's.
    """
    if widths and max(widths) > model_width:
        raise UserError(f"--dim: {max(widths)} is above the width of {model} ({model_width}). Choose 1 to {model_width}.")
    if untrained := sorted(set(widths) - {model_width, *spec.matryoshka_dims}, reverse=True):
        trained_widths = ", ".join(map(str, spec.matryoshka_dims)) or "none"
        log_once(
            f"--dim: training of {model} did not include {', '.join(map(str, untrained))} (it included: {trained_widths})",
            logging.INFO,
        )
    return tuple(sorted(set(widths), reverse=True))
