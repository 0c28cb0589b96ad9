"""Score (query, document) pairs with a language model on an OpenAI-compatible server that answers yes or no."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxembed.config.curation_models import JudgeConfig
from jaxembed.config.synthesis_steps import SamplingConfig
from jaxembed.files import make_private_folder
from jaxembed.hub.cross_encoder import ScorePairs, cache_scores
from jaxembed.synthesis.client import LlmClient
from jaxembed.synthesis.endpoints import ServerOptions, TooLongError
from jaxembed.synthesis.ranking import read_grade
from jaxembed.synthesis.requests import Request
from jaxembed.synthesis.servers import LlmServers
from jaxembed.synthesis.store import AnswerStore
from jaxembed.verification.http_client import KEY_VARIABLE, read_key

SYSTEM = "You judge whether a document meets the requirements of an instruction and a query. Answer only {yes} or {no}."
PROMPT = "Instruction: {instruction}\n\nQuery: {query}\n\nDocument: {document}\n\nAnswer only {yes} or {no}."
MAX_ANSWER_TOKENS = 8
SCORE_WITHOUT_ANSWER = 0.5  # score of a pair that the model does not judge
log = logging.getLogger("jaxembed")


def open_server_judge(config: JudgeConfig, cache: Path) -> ScorePairs:
    """Open a server as a judge. The score is the probability of yes, or 1 or 0 if the server gives no probabilities.

    Args:
        config: The section of the judge.
        cache: Folder under which answers and scores are stored, so that each pair is sent once.

    Returns:
        A function from (query, document) pairs to scores from 0 to 1, float32 [P].

    Raises:
        UserError: The URL is not valid, or openai is not installed. The function raises it if the server cannot be used.
    """
    digest = hashlib.sha256(config.model_dump_json(exclude={"url"}).encode()).hexdigest()
    make_private_folder(folder := cache / "judges" / digest)
    options = ServerOptions([config.url], config.model, read_key(KEY_VARIABLE))
    client = LlmClient(LlmServers(options), open_answer_store(folder / "answers.jsonl"))

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        with ThreadPoolExecutor(options.concurrency) as pool:
            scores = list(pool.map(lambda pair: score_pair(client, config, pair), pairs))
        if num_missing := scores.count(None):
            message = "%s: %d of %d pairs have no answer, and get a score of %s"
            log.warning(message, config.url, num_missing, len(pairs), SCORE_WITHOUT_ANSWER)
        return np.array([SCORE_WITHOUT_ANSWER if value is None else value for value in scores], np.float32)

    return cache_scores(config.model, cache / "scores" / digest, score)


@functools.cache
def open_answer_store(path: Path) -> AnswerStore:
    """Open a store once in a process, because it locks its file. Judges with the same settings share it."""
    return AnswerStore(path)


def score_pair(client: LlmClient, config: JudgeConfig, pair: tuple[str, str]) -> float | None:
    """Return the score of a pair, or None if the model answers something else or the pair is too long for its context."""
    yes, no = config.answers
    fields = {"instruction": config.instruction, "query": pair[0], "document": pair[1], "yes": yes, "no": no}
    request = Request(
        model=config.model,
        prompt=PROMPT.format(**fields),
        system=SYSTEM.format(**fields),
        sampling=SamplingConfig(temperature=0, max_tokens=MAX_ANSWER_TOKENS),
        seed=0,
        grades=(no, yes),
    )
    try:
        return read_grade(client.ask(request), request.grades)
    except TooLongError:
        return None
