"""Requests to an LLM server, and its answers. A request is identified by a hash of its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxembed.config.synthesis_steps import SamplingConfig

BYTES_PER_TOKEN = 4  # in UTF-8, for texts whose tokens no server has counted
MAX_TEMPLATE_TOKENS = 100  # that a chat template adds to a prompt


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to a model.

    Attributes:
        model: Name of the model.
        prompt: The user message, or the prompt of a plain completion.
        system: System prompt; empty for none.
        sampling: Sampling parameters.
        seed: Seed of the sampling. It distinguishes requests with equal prompts.
        schema: JSON schema of the answer; None for text.
        grades: Answers whose log-probabilities are requested.
        scored_text: Text to score: its log-probability after the prompt is requested instead of an answer. Empty for none.
    """

    model: str
    prompt: str
    sampling: SamplingConfig
    seed: int
    system: str = ""
    schema: Mapping[str, Any] | None = None
    grades: tuple[str, ...] = ()
    scored_text: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON values, without unset fields."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content |= {"sampling": self.sampling.model_dump()}
        return {name: value for name, value in content.items() if value not in ("", None, ())}

    @property
    def key(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        content = json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def max_total_tokens(self) -> int:
        """An upper estimate of the tokens of prompt and answer together. Each byte of the prompt counts as one token."""
        num_bytes = sum(count_utf8_bytes(text) for text in (self.system, self.prompt, self.scored_text))
        return num_bytes + MAX_TEMPLATE_TOKENS + self.sampling.max_tokens


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a server.

    Attributes:
        text: The text.
        finish_reason: Why the text ends, as the API gives it: stop, length, content_filter, or another reason.
        refusal: The server's explanation if it refuses to answer; otherwise empty.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer.
        model: Name of the model, as the server gives it.
        time: Time of arrival, in ISO 8601 and UTC.
        logprobs: Log-probabilities of the requested grades, as far as the server returned them.
        likelihood: Mean log-probability of the tokens of the scored text, or None.
    """

    text: str
    finish_reason: str = "stop"
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    time: str = ""
    logprobs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    likelihood: float | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


def count_utf8_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens of a text."""
    return -(-count_utf8_bytes(text) // BYTES_PER_TOKEN)
