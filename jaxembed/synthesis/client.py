"""A client of LLM servers that stores their answers and counts tokens."""

from __future__ import annotations

import dataclasses
import threading
from typing import Protocol

from jaxembed.synthesis.endpoints import ServerOptions
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.store import AnswerStore


@dataclasses.dataclass
class TokenCounts:
    """Requests and tokens so far.

    Attributes:
        requests: Answered requests, from a server or the store.
        stored_answers: Requests answered from the store.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens of the answers.
        new_tokens: Tokens of prompts and answers that did not come from the store.
    """

    requests: int = 0
    stored_answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens


class AnswerSource(Protocol):
    """Answers requests: `servers.LlmServers` in this process, or `ray_servers.RayServers` in the processes of a cluster.

    Attributes:
        options: The servers and how to call them.
    """

    options: ServerOptions

    def ask(self, request: Request) -> Answer:
        """Return the answer to a request. The exceptions are those of `LlmServers.ask`."""
        ...


class LlmClient:
    """Asks LLM servers and stores the answers. Threads may share it.

    Attributes:
        model: Name of the model.
        counts: Requests and tokens so far.
    """

    def __init__(self, source: AnswerSource, store: AnswerStore):
        """Start with the answers of the store. `source` gives the others."""
        self.model = source.options.model
        self.counts = TokenCounts()
        self._source, self._store = source, store
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Answer:
        """Return the answer to a request, from the store or a server. New answers are stored.

        Raises:
            TooLongError: The request does not fit into the model's context.
            OptionRefusedError: The server cannot score a text.
            UserError: The server cannot be used.
        """
        stored_answer = self._store.get(request.key)
        answer = stored_answer or self._source.ask(request)
        with self._lock:
            self.counts.requests += 1
            self.counts.stored_answers += stored_answer is not None
            self.counts.prompt_tokens += answer.prompt_tokens
            self.counts.completion_tokens += answer.completion_tokens
            self.counts.new_tokens += 0 if stored_answer else answer.total_tokens
        if stored_answer is None:
            self._store.add(request, answer)
        return answer
