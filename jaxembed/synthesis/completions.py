"""Read the answer of an LLM server to one request. A malformed, endless or slow answer raises `ValueError`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxembed.errors import summarize
from jaxembed.verification.http_client import READ_BYTES, AnswerTooLongError, join_parts

MAX_COMPLETION_BYTES = 2**26
MAX_LOGPROB = 1e-3  # servers may round a log-probability of 0 up


class Choice(NamedTuple):
    """An answer and its tokens.

    Attributes:
        text: The text.
        finish_reason: Why the text ends; empty if the server does not say.
        refusal: The server's explanation if it refuses to answer; otherwise empty.
        logprobs: Log-probabilities of the likeliest first tokens, by their text.
        model: Name of the model, as the server reports it; empty if it does not.
        prompt_tokens: Tokens of the prompt; None if the server does not count.
        completion_tokens: Tokens of the answer; None if the server does not count.
    """

    text: str
    finish_reason: str
    refusal: str
    logprobs: Mapping[str, float]
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None


@contextmanager
def expect_completion() -> Iterator[None]:
    """Turn the exceptions that a malformed answer causes in the block into `ValueError`."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"the answer is not a completion ({type(error).__name__}: {summarize(error)})") from None


def read_json_answer(response: Any, limit_s: float) -> Any:
    """Return the JSON value of a streamed response of the library openai.

    Args:
        response: The response, whose body has not been read.
        limit_s: Seconds that the body may take. The timeout of the library only limits each read.

    Raises:
        ValueError: The body is too long, takes too long, breaks off, or is not JSON.
    """
    import openai

    try:
        body = join_parts(response.iter_bytes(READ_BYTES), MAX_COMPLETION_BYTES, limit_s)
    except (AnswerTooLongError, TimeoutError) as error:
        raise ValueError(str(error)) from None
    except (ValueError, openai.OpenAIError):
        raise
    except Exception as error:  # of the library's HTTP client, whose kind depends on the version
        raise ValueError(f"the answer broke off ({type(error).__name__}: {summarize(error)})") from None
    with expect_completion():
        return json.loads(body)


def read_chat(content: Any) -> Choice:
    """Return the first choice of a chat completion."""
    with expect_completion():
        choice, usage = content["choices"][0], content.get("usage") or {}
        message = choice["message"]
        first = next(iter((choice.get("logprobs") or {}).get("content") or ()), None) or {}
        return Choice(
            text=_read_text(message.get("content")),
            finish_reason=_read_text(choice.get("finish_reason")),
            refusal=_read_text(message.get("refusal")),
            logprobs=_read_logprobs(first.get("top_logprobs") or ()),
            model=_read_name(content),
            prompt_tokens=_read_count(usage.get("prompt_tokens")),
            completion_tokens=_read_count(usage.get("completion_tokens")),
        )


def read_echo(content: Any) -> tuple[Choice, dict[int, float]]:
    """Read the first choice of a completion that echoes its prompt.

    Returns:
        The choice without text, and the log-probabilities of the tokens by their offset in the prompt. A log-probability is
        NaN if the server gave another number. The first token has none.
    """
    with expect_completion():
        choice, usage = content["choices"][0], content.get("usage") or {}
        logprobs = choice.get("logprobs") or {}
        pairs = zip(logprobs.get("text_offset") or (), logprobs.get("token_logprobs") or (), strict=False)
        tokens = {int(offset): value if is_logprob(value) else math.nan for offset, value in pairs if value is not None}
        counts = (_read_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        return Choice("", "", "", {}, _read_name(content), *counts), tokens


def is_logprob(value: Any) -> bool:
    """Return whether a value is the logarithm of a probability above 0, up to rounding."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < MAX_LOGPROB


def _read_logprobs(tokens: Any) -> dict[str, float]:
    """Return the log-probability of each token, without invalid ones. Of equal tokens, the first and likeliest is used."""
    logprobs = {_read_text(token["token"]).strip(): token.get("logprob") for token in reversed(tokens)}
    return {token: float(value) for token, value in logprobs.items() if is_logprob(value)}


def _read_text(value: Any) -> str:
    """Return a string, or an empty one for null."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"found {str(value)[:40]!r} instead of a text")
    return value or ""


def _read_name(content: Any) -> str:
    """Return the name of the model. Halves of surrogate pairs, which no file can hold, are replaced."""
    return _read_text(content.get("model")).encode("utf-8", "replace").decode()


def _read_count(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or not 0 <= value < 2**53):
        raise TypeError(f"found {str(value)[:40]!r} instead of a number of tokens")
    return value
