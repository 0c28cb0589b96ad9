"""What an LLM server is asked, and what it answers. A request is identified by its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxembed.config.synthesis_steps import SamplingConfig

CHARS_PER_TOKEN = 4  # of texts whose tokens no server has counted yet, in UTF-8 bytes


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to a model.

    Attributes:
        model: Name of the model.
        prompt: The prompt: of the user, or of a plain completion.
        system: System prompt; empty for none.
        sampling: How the answer is sampled.
        seed: Seed of the sampling. It tells requests with equal prompts apart.
        schema: JSON schema of the answer; None for text.
        grades: Answers whose log-probabilities are wanted.
        scored_text: Text whose log-probability after the prompt is wanted, instead of an answer; empty for none.
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
        """Return the content as plain values, without what is not set."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content |= {"sampling": self.sampling.model_dump()}
        return {name: value for name, value in content.items() if value not in ("", None, ())}

    @property
    def key(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        content = json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def max_tokens(self) -> int:
        """An upper bound of the tokens that the request costs. A token has at least one byte; a chat template adds some."""
        texts = (self.system, self.prompt, self.scored_text)
        return sum(count_bytes(text) for text in texts) + 100 + self.sampling.max_tokens


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        text: The text.
        finish_reason: Why the text ends: stop, length, content_filter, or another reason of the server.
        refusal: What the server says about an answer that it refuses; empty if it does not.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer.
        model: Name of the model, as the server gives it.
        time: When it came, in ISO 8601 and UTC.
        logprobs: Log-probability of each grade that was wanted and that the server gave.
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
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


def count_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def estimate_tokens(text: str) -> int:
    """Return an estimate of the tokens of a text."""
    return -(-count_bytes(text) // CHARS_PER_TOKEN)
