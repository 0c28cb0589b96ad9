"""The steps of a task. Each takes drafts and yields drafts, in an order that does not depend on the timing of answers."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxembed.config.synthesis_steps import AskStepConfig, FilterStepConfig, SynthesisStepConfig
from jaxembed.config.templates import get_only_placeholder
from jaxembed.errors import UserError, summarize
from jaxembed.synthesis.answers import AnswerReader, InvalidAnswerError
from jaxembed.synthesis.client import LlmClient
from jaxembed.synthesis.drafts import Draft, WeightedChoices, draw_values, fill_template, make_request_seed, make_rng
from jaxembed.synthesis.endpoints import TooLongError
from jaxembed.synthesis.novelty import SeenTexts
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.workers import Job, Workers

MAX_CONTEXT_OVERFLOWS = 16  # stop after this many requests that do not fit into the context, if none did fit
CONTEXT_OVERFLOW = "too long for the context"
NO_VALID_ANSWER, DUPLICATE_ANSWER = "no valid answer", "known already"


@dataclasses.dataclass
class StepCounts:
    """Counts of one step.

    Attributes:
        drafts_in: Drafts that reached it.
        drafts_out: Drafts that left it.
        answers: Answers, valid or not.
        invalid: Invalid answers, by reason.
        dropped: Drafts that the step dropped, by reason.
    """

    drafts_in: int = 0
    drafts_out: int = 0
    answers: int = 0
    invalid: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class TaskContext:
    """The resources that the steps of a task share.

    Attributes:
        seed: Seed of all draws.
        client: Asks the server.
        workers: Threads for requests.
        get_max_in_progress: Returns how many drafts of a step may be in progress at once.
        update_progress: Called after each answer.
    """

    seed: int
    client: LlmClient
    workers: Workers
    get_max_in_progress: Callable[[], int]
    update_progress: Callable[[], None]


class Step(abc.ABC):
    """Base class of the steps of a task."""

    def __init__(self, config: SynthesisStepConfig):
        """Start without drafts."""
        self.name, self.counts = config.name, StepCounts()

    @abc.abstractmethod
    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts that leave the step."""

    def iter_inputs(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts that reach the step, and count them."""
        for draft in drafts:
            self.counts.drafts_in += 1
            yield draft

    def count_output(self, draft: Draft) -> Draft:
        """Count a draft that leaves the step, and return it."""
        self.counts.drafts_out += 1
        return draft


class AskResult(NamedTuple):
    """Result of the requests for one draft.

    Attributes:
        draft: The draft.
        drawn_values: The values that were drawn for the placeholders of the step.
        request_key: Key of the request with a valid answer; empty if there is none.
        answer: The valid answer, or None.
        records: Fields of the answer: one record for each new draft.
        invalid: Why the other answers were not valid, one reason for each.
    """

    draft: Draft
    drawn_values: Mapping[str, str]
    request_key: str
    answer: Answer | None
    records: list[dict[str, Any]]
    invalid: tuple[str, ...]


class AskStep(Step):
    """Sends a prompt for each draft, and sends it again if the answer is not valid."""

    def __init__(
        self, config: AskStepConfig, context: TaskContext, reader: AnswerReader, choices: Mapping[str, WeightedChoices]
    ):
        """Start without drafts. `choices` are the possible values of each placeholder of the step."""
        super().__init__(config)
        self._config, self._context, self._reader, self._choices = config, context, reader, choices
        self._seen = SeenTexts(config.unique) if config.unique != "none" else None
        self._overflow_message = ""

    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield a draft for each valid answer, or for each item of a valid list."""
        config = self._config
        repeats = (
            dataclasses.replace(draft, path=(*draft.path, i) if config.repeat > 1 else draft.path)
            for draft in self.iter_inputs(drafts)
            for i in range(config.repeat)
        )
        for result in self._context.workers.run_in_order(map(self._make_job, repeats), self._get_max_in_progress):
            self.counts.answers += len(result.invalid) + (result.answer is not None)
            self.counts.invalid.update(result.invalid)
            if result.answer is None:
                self.counts.dropped[NO_VALID_ANSWER] += 1
            self._check_context()
            self._context.update_progress()
            yield from self._make_drafts(result)

    def _get_max_in_progress(self, num_results: int) -> int:
        """Return how many drafts may be in progress at once. A list gives many drafts, so the number starts at one."""
        limit = self._context.get_max_in_progress()
        return min(limit, num_results + 1) if self._config.answer.type == "list" else limit

    def _make_job(self, draft: Draft) -> Job[AskResult]:
        config, seed = self._config, self._context.seed
        path = (*draft.path, config.name)
        drawn_values = draw_values(self._choices, config.distinct, make_rng(seed, path))
        request = make_request(config, draft, drawn_values, self._context.client.model, self._reader.schema)
        requests = [
            dataclasses.replace(request, seed=make_request_seed(seed, (*path, attempt))) for attempt in range(config.attempts)
        ]
        languages = self._get_expected_languages(draft, drawn_values)
        return Job(lambda: self._ask(draft, drawn_values, requests, languages), request.max_total_tokens * config.attempts)

    def _get_expected_languages(self, draft: Draft, drawn_values: Mapping[str, str]) -> dict[str, str]:
        """Return the expected language of each field of the answer that has one."""
        answer = self._config.answer
        rules = answer.fields or {"text": answer.items, "items": answer.items}
        return {name: fill_template(rule.language, draft, drawn_values) for name, rule in rules.items() if rule.language}

    def _ask(
        self, draft: Draft, drawn_values: Mapping[str, str], requests: list[Request], languages: Mapping[str, str]
    ) -> tuple[AskResult, int]:
        """Send requests until one has a valid answer. Return the result and the tokens of all answers. Runs in a thread."""
        invalid: list[str] = []
        tokens = 0
        for request in requests:
            try:
                answer = self._context.client.ask(request)
            except TooLongError as error:
                self._record_overflow(error)
                invalid.append(CONTEXT_OVERFLOW)
                break  # a retry would have the same length
            tokens += answer.total_tokens
            try:
                records = self._reader.read(answer, languages)
                return AskResult(draft, drawn_values, request.key, answer, records, tuple(invalid)), tokens
            except InvalidAnswerError as error:
                invalid.append(str(error))
        return AskResult(draft, drawn_values, "", None, [], tuple(invalid)), tokens

    def _record_overflow(self, error: TooLongError) -> None:
        self._overflow_message = summarize(error)

    def _check_context(self) -> None:
        """Raise `UserError` if `MAX_CONTEXT_OVERFLOWS` requests did not fit into the context, and none did."""
        num_overflows = self.counts.invalid[CONTEXT_OVERFLOW]
        if num_overflows >= MAX_CONTEXT_OVERFLOWS and num_overflows == self.counts.answers:
            self.raise_if_all_overflow()

    def raise_if_all_overflow(self) -> None:
        """Raise `UserError` if no request of the step fitted into the context of the model."""
        if self.counts.answers and self.counts.invalid[CONTEXT_OVERFLOW] == self.counts.answers:
            raise UserError(
                f"step {self.name}: its prompts do not fit into the context of the model ({self._overflow_message}). Lower "
                "sampling.max_tokens of the step or input_chars, or start the server with a longer context."
            )

    def _make_drafts(self, result: AskResult) -> Iterator[Draft]:
        """Yield the new drafts of a valid answer."""
        for i, record in enumerate(result.records):
            text = record.get("item") or record.get("text") or "\n".join(map(str, record.values()))
            if self._seen is not None and not self._seen.add(str(text)):
                self.counts.dropped[DUPLICATE_ANSWER] += 1
                continue
            draft, answer = result.draft, result.answer
            assert answer is not None
            path = (*draft.path, i) if "item" in record else draft.path
            draft = dataclasses.replace(
                draft,
                path=path,
                request_keys=(*draft.request_keys, result.request_key),
                time=max(draft.time, answer.time),
                model=answer.model,
            )
            yield self.count_output(draft.add_fields(self.name, {**result.drawn_values, **record}))


def make_request(
    config: AskStepConfig, draft: Draft, drawn_values: Mapping[str, str], model: str, schema: Mapping[str, Any] | None
) -> Request:
    """Return the request of an ask step for a draft, with seed 0.

    Args:
        config: The section of the step.
        draft: The draft.
        drawn_values: Drawn values of the placeholders of the step.
        model: Name of the model.
        schema: JSON schema of the answer; None for text.
    """
    prompt, system = (fill_template(template, draft, drawn_values) for template in (config.prompt, config.system))
    return Request(model, prompt, config.sampling, seed=0, system=system, schema=schema)


class FilterStep(Step):
    """Keeps the drafts whose value meets a condition."""

    def __init__(self, config: FilterStepConfig):
        """Start without drafts."""
        super().__init__(config)
        self._config = config

    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts that meet the condition."""
        for draft in self.iter_inputs(drafts):
            if problem := self._find_problem(draft):
                self.counts.dropped[problem] += 1
            else:
                yield self.count_output(draft)

    def _find_problem(self, draft: Draft) -> str | None:
        config = self._config
        text = fill_template(config.value, draft)
        if config.allowed:
            return None if text in config.allowed else "not one of allowed"
        name = get_only_placeholder(config.value)
        value = draft.get_value(name) if name else text
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return "not a number"
        if math.isnan(number):
            return "not a number"
        is_low = config.minimum is not None and number < config.minimum
        is_high = config.maximum is not None and number > config.maximum
        return "below minimum" if is_low else "above maximum" if is_high else None
