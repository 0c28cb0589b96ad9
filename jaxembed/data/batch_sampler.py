"""Draw the examples of a batch, as a pure function of (seed, step, ids)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, islice

import numpy as np

from jaxembed.data.batch_plan import ExampleIndex
from jaxembed.data.equality import normalize_text
from jaxembed.data.schema import Example
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer

MAX_EXAMPLE_REDRAWS = 100  # of one example, to find one without duplicates; the loss masks the duplicates that remain


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Draws the examples of a step, and lists their texts and prompts.

    Attributes:
        sources: Sources that the ids of a `BatchPlan` number.
        tokenizer: Counts the tokens of in-context examples. Its spec builds the prompts.
        hard_negatives: Maximum negatives of a query (K).
        seed: Seed of the draws, together with step and id.
        step_offset: Steps of the stages before this one. They make the draws of each stage differ.
        no_duplicates: Replace an example whose query or positive is already in the batch by another one of its source. Applies
            to sources with in-batch negatives.
    """

    sources: Sequence[Source]
    tokenizer: TextTokenizer
    hard_negatives: int
    seed: int
    step_offset: int = 0
    no_duplicates: bool = False

    @cached_property
    def index(self) -> ExampleIndex:
        """Maps the ids to sources."""
        return ExampleIndex(self.sources)

    def sample(self, step: int, ids: np.ndarray, members: np.ndarray | None = None) -> list[Example]:
        """Draw the examples of a step, or only those at the positions `members` of the batch."""
        members = np.arange(len(ids)) if members is None else members
        if not self.no_duplicates:
            return self._limit_few_shot(self._draw_batch(step, ids[members]))
        # Whether an example is a duplicate depends on the whole batch.
        examples = self._draw_batch(step, ids)
        return self._limit_few_shot([examples[i] for i in members])

    def _draw_batch(self, step: int, ids: np.ndarray) -> list[Example]:
        examples: list[Example] = []
        seen: set[str] = set()
        for source_index, index, id_ in zip(*self.index.locate(ids), ids, strict=True):
            source = self.sources[source_index]
            example = self._draw(source, int(index), step, int(id_))
            is_checked = self.no_duplicates and source.in_batch
            for attempt in range(MAX_EXAMPLE_REDRAWS if is_checked else 0):
                if seen.isdisjoint(_normalize_pair(example)):
                    break
                example = self._draw(source, None, step, int(id_), attempt)
            if is_checked:
                seen |= _normalize_pair(example)
            examples.append(example)
        return examples

    def _draw(self, source: Source, index: int | None, step: int, *key: int) -> Example:
        """Draw the example at `index`, or at a random index for None."""
        rng = np.random.default_rng((self.seed, self.step_offset + step, *key))
        return source.draw(int(rng.integers(len(source))) if index is None else index, rng, self.hard_negatives)

    def _limit_few_shot(self, examples: list[Example]) -> list[Example]:
        """Drop in-context examples, the last first, until the prompt takes at most half of the maximum length.

        Tokens are counted per in-context example, so that each one is tokenized once.
        """
        # Count the tokens of the instruction and of each in-context example.
        spec = self.tokenizer.spec
        parts = [
            [spec.build_prompt(example.instruction), *map(spec.format_example, example.few_shot)] if example.few_shot else []
            for example in examples
        ]
        token_counts = iter(self.tokenizer.count_prompt_tokens(list(chain.from_iterable(parts))))
        limited_examples = []
        for example, example_parts in zip(examples, parts, strict=True):
            # Keep as many in-context examples as fit, together with the instruction.
            prompt_tokens = np.cumsum(list(islice(token_counts, len(example_parts))))
            fitting = int((2 * prompt_tokens <= spec.max_length).sum()) - 1
            few_shot = example.few_shot[: max(0, fitting)]
            limited_examples.append(dataclasses.replace(example, few_shot=few_shot) if example_parts else example)
        return limited_examples

    def list_texts(self, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
        """Return the texts of examples in the order query, positive, negatives, and the prompt of each text."""
        return drop_absent(*self.list_padded_texts(examples))

    def list_padded_texts(self, examples: Sequence[Example]) -> tuple[list[str | None], list[str]]:
        """Return query, positive and K negatives of each example, None for an absent one, and the prompt of each text."""
        texts: list[str | None] = []
        prompts: list[str] = []
        for example in examples:
            absent = [None] * (self.hard_negatives - len(example.negatives))
            texts += [example.query, example.positive, *example.negatives, *absent]
            prompts.append(self.tokenizer.spec.build_prompt(example.instruction, example.few_shot, "query"))
            prompts += [self.tokenizer.spec.build_prompt(example.document_instruction, side="document")] * (
                1 + self.hard_negatives
            )
        return texts, prompts


def _normalize_pair(example: Example) -> set[str]:
    """Return the normalized query and positive, which identify duplicates."""
    return {normalize_text(example.query), normalize_text(example.positive)}


def drop_absent(texts: Sequence[str | None], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the texts that are not None, and their prompts."""
    prompted_texts = [(text, prompt) for text, prompt in zip(texts, prompts, strict=True) if text is not None]
    return [text for text, _ in prompted_texts], [prompt for _, prompt in prompted_texts]


def assign_roles(texts: Sequence[str]) -> list[str]:
    """Return the role of each text of one example."""
    return ["query", "positive", *["negative"] * (len(texts) - 2)]
