"""The step that ranks candidates by relevance grades, query likelihood, and reciprocal rank fusion (Gecko, section 3.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxembed.config.synthesis_steps import RankStepConfig
from jaxembed.search.fusion import fuse_rankings
from jaxembed.synthesis.drafts import Draft, fill_template, make_request_seed, make_rng
from jaxembed.synthesis.endpoints import OptionRefusedError, TooLongError
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.retrieval import CANDIDATES_FIELD, DocumentIndex
from jaxembed.synthesis.steps import CONTEXT_OVERFLOW, NO_VALID_ANSWER, Step, TaskContext
from jaxembed.synthesis.workers import Job

TOO_FEW_CANDIDATES = "fewer than two candidates"


class CandidateScores(NamedTuple):
    """The scored candidates of a draft.

    Attributes:
        draft: The draft.
        scores: For each ranking, the scores of the candidates; larger is better. -inf: no valid answer.
        answers: All answers.
        invalid: Why answers were not valid, one reason for each.
        request_keys: Keys of the answered requests.
    """

    draft: Draft
    scores: list[list[float]]
    answers: list[Answer]
    invalid: list[str]
    request_keys: tuple[str, ...]


class RankStep(Step):
    """Ranks the candidates of each draft. The best becomes the positive, and another one the hard negative."""

    def __init__(self, config: RankStepConfig, context: TaskContext, index: DocumentIndex):
        """Start without drafts. `index` has the documents of the candidates."""
        super().__init__(config)
        self._config, self._context, self._index = config, context, index

    def run(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Yield the drafts with `positive`, `negative` and `is_relabeled`."""
        jobs = map(self._make_job, self._iter_with_candidates(drafts))
        for result in self._context.workers.run_in_order(jobs, lambda num_results: self._context.get_max_in_progress()):
            self.counts.answers += len(result.answers)
            self.counts.invalid.update(result.invalid)
            self._context.update_progress()
            order = rank_scored(result.scores, self._config.fusion_k)
            if len(order) < 2:
                self.counts.dropped[NO_VALID_ANSWER] += 1
                continue
            yield self.count_output(self._choose_documents(result, order))

    def _iter_with_candidates(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        for draft in self.iter_inputs(drafts):
            if len(self._get_candidates(draft)) < 2:
                self.counts.dropped[TOO_FEW_CANDIDATES] += 1
            else:
                yield draft

    def _get_candidates(self, draft: Draft) -> list[int]:
        """Return the indices of the documents that are the candidates of a draft."""
        indices: list[int] = draft.fields[self._config.candidates][CANDIDATES_FIELD]
        return indices

    def _make_job(self, draft: Draft) -> Job[CandidateScores]:
        rankings = [
            [self._make_request(draft, candidate, kind) for candidate in self._get_candidates(draft)]
            for kind in ("relevance", "likelihood")
            if getattr(self._config, kind) is not None
        ]
        reserved_tokens = sum(request.max_total_tokens for requests in rankings for request in requests)
        return Job(lambda: self._score(draft, rankings), reserved_tokens)

    def _make_request(self, draft: Draft, candidate: int, kind: str) -> Request:
        """Return the request that scores a candidate of a draft. `kind` is relevance or likelihood."""
        document = self._index.documents[candidate]
        candidate_values = {"candidate.text": self._index.texts[candidate]}
        candidate_values |= {f"candidate.{field}": str(document.get(field) or "") for field in ("title", "id")}
        seed = make_request_seed(self._context.seed, (*draft.path, self.name, kind, candidate))
        request = Request(self._context.client.model, "", self._config.sampling, seed)
        if kind == "likelihood" and self._config.likelihood:
            prompt, query = (
                fill_template(self._config.likelihood.prompt, draft, candidate_values),
                fill_template(self._config.query, draft),
            )
            return dataclasses.replace(request, prompt=prompt, scored_text=query)
        assert self._config.relevance is not None
        prompt, system = (
            fill_template(text, draft, candidate_values)
            for text in (self._config.relevance.prompt, self._config.relevance.system)
        )
        return dataclasses.replace(request, prompt=prompt, system=system, grades=self._config.relevance.grades)

    def _score(self, draft: Draft, rankings: list[list[Request]]) -> tuple[CandidateScores, int]:
        """Return the scores of all candidates, and the number of tokens that they used. This runs in a thread."""
        result = CandidateScores(draft, [[-math.inf] * len(requests) for requests in rankings], [], [], ())
        request_keys: list[str] = []
        for requests, scores in zip(rankings, result.scores, strict=True):
            for i, request in enumerate(requests):
                try:
                    answer = self._context.client.ask(request)
                except TooLongError:
                    result.invalid.append(CONTEXT_OVERFLOW)
                    continue
                except OptionRefusedError:
                    break  # this server gives no likelihood
                result.answers.append(answer)
                request_keys.append(request.key)
                score = answer.likelihood if request.scored_text else read_grade(answer, request.grades)
                if score is None:
                    result.invalid.append(f"no {'likelihood' if request.scored_text else 'grade'}")
                else:
                    scores[i] = score
        return result._replace(request_keys=tuple(request_keys)), sum(answer.total_tokens for answer in result.answers)

    def _choose_documents(self, result: CandidateScores, order: Sequence[int]) -> Draft:
        """Return the draft with its positive and negative. `order` has the positions of its scored candidates, best first."""
        draft, candidates = result.draft, self._get_candidates(result.draft)
        last = len(order) - 1
        rng = make_rng(self._context.seed, (*draft.path, self.name))
        rank = last if self._config.hard_negative == "last" else int(rng.integers(1, last + 1))
        positive, negative = candidates[order[0]], candidates[order[rank]]
        latest = max(result.answers, key=lambda answer: answer.time)
        draft = dataclasses.replace(
            draft,
            request_keys=(*draft.request_keys, *result.request_keys),
            time=max(draft.time, latest.time),
            model=latest.model,
        )
        texts = self._index.texts
        fields = {"positive": texts[positive], "negative": texts[negative], "is_relabeled": positive != draft.source_index}
        return draft.add_fields(self.name, fields)


def read_grade(answer: Answer, grades: Sequence[str]) -> float | None:
    """Return the expected grade of an answer: the index of the grade, weighted by its probability where the server gives it.

    Without log-probabilities, the index of the grade that the answer starts with, or None if it starts with no grade.
    """
    if answer.logprobs:
        weights = {grades.index(grade): math.exp(value) for grade, value in answer.logprobs.items()}
        return sum(index * weight for index, weight in weights.items()) / (sum(weights.values()) or 1.0)
    text = answer.text.strip()
    matches = [grade for grade in grades if text.startswith(grade)]
    return float(grades.index(max(matches, key=len))) if matches else None


def rank_scored(scores: Sequence[Sequence[float]], fusion_k: int) -> list[int]:
    """Return the positions of the candidates that have a score in a ranking, best first. See `fuse_scores`."""
    is_scored = np.array(scores) > -math.inf
    positions = np.flatnonzero(is_scored.any(axis=0)).tolist()
    rankings = [[ranking[i] for i in positions] for ranking, known in zip(scores, is_scored, strict=True) if known.any()]
    return [positions[i] for i in fuse_scores(rankings, fusion_k)] if rankings else []


def fuse_scores(scores: Sequence[Sequence[float]], fusion_k: int) -> list[int]:
    """Return the positions of the candidates by reciprocal rank fusion, best first (Cormack, Clarke and Büttcher 2009).

    Args:
        scores: Scores of the candidates in each ranking; larger is better. Ties keep the order of the candidates.
        fusion_k: The constant k in 1 / (k + rank).
    """
    rankings = [np.argsort(-np.array(ranking), kind="stable") for ranking in scores]
    return [int(index) for index in fuse_rankings(rankings, fusion_k)]
