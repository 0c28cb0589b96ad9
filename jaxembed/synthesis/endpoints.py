"""OpenAI-compatible endpoints that share the requests: load balancing, retries, and clear errors."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from jaxembed.errors import UserError, suggest, summarize
from jaxembed.verification.http_client import (
    KEY_VARIABLE,
    MAX_QUOTED_CHARS,
    MAX_WAIT_S,
    REACH_ADVICE,
    parse_retry_after,
    parse_root,
)

MIN_SECRET_CHARS = 8  # shorter API keys, such as none or EMPTY, are placeholders
MAX_ATTEMPTS = 8  # for a request with transient failures
FIRST_WAIT_S = 0.5  # the wait doubles up to `MAX_WAIT_S`, unless the server says how long
RETRIED_STATUSES = (408, 409, 425, 429)  # and all from 500 on
CONTEXT_WORDS = ("context length", "context_length", "context window", "context size", "max_model_len", "maximum model length")
API_PATH = "/v1"
# Option of a request -> words in the error of a server that refuses it.
OPTION_WORDS = {
    "response_format": ("response_format", "json_schema", "json schema", "grammar", "guided", "structured"),
    "seed": ("seed",), "logprobs": ("logprobs",), "temperature": ("temperature",), "top_p": ("top_p",),
    "max_tokens": ("max_completion_tokens", "max_tokens"),
}  # fmt: skip
log = logging.getLogger("jaxembed")
T = TypeVar("T")


class TooLongError(Exception):
    """A prompt and its answer do not fit into the model's context."""


class OptionRefusedError(Exception):
    """A server does not support an option of a request."""

    def __init__(self, option: str, reason: str):
        super().__init__(option, reason)  # what unpickling calls
        self.option, self.reason = option, reason

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """The servers and how to call them.

    Attributes:
        urls: URLs of the servers. All serve the same model.
        model: Name of the model.
        api_key: API key for all servers; empty for none.
        key_variable: Environment variable that holds the API key, for messages.
        timeout_s: Timeout of a request, in seconds.
        concurrency: Maximum number of concurrent requests to all servers together.
    """

    urls: Sequence[str]
    model: str
    api_key: str = dataclasses.field(default="", repr=False)
    key_variable: str = KEY_VARIABLE
    timeout_s: float = 120.0
    concurrency: int = 16

    def redact(self, text: str) -> str:
        """Remove the API key from a text that a server sent. A placeholder for a key stays, because it may be a word."""
        return text.replace(self.api_key, "***") if len(self.api_key) >= MIN_SECRET_CHARS else text


def describe_error(error: Any) -> str:
    """Return the code, the parameter and the message of an error of the openai library, in lower case."""
    return f"{error.code} {error.param} {error.message}".lower()


def exceeds_context(error: Any) -> bool:
    """Return whether an error of the openai library says that a request does not fit into the context."""
    return any(word in describe_error(error) for word in CONTEXT_WORDS)


class Endpoint:
    """One server.

    Attributes:
        url: Root of its API.
        client: The client of the library openai.
        running: Number of running requests.
        failures: Number of failures since the last success.
        ready_at: Earliest time of the next request, by `time.monotonic`.
    """

    def __init__(self, url: str, options: ServerOptions):
        """Create the client; send nothing."""
        import openai

        root = parse_root(url)
        self.url = root if root.count("/") > 2 else root + API_PATH
        api_key = options.api_key or "none"  # the library needs one
        self.client = openai.OpenAI(base_url=self.url, api_key=api_key, timeout=options.timeout_s, max_retries=0)
        self.running, self.failures, self.ready_at = 0, 0, 0.0


class Endpoints:
    """The servers of a synthesis. Threads may share it."""

    def __init__(self, options: ServerOptions):
        """Create the clients; send nothing.

        Raises:
            UserError: A URL is not valid, or openai is not installed.
        """
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError("synthesize: openai is not installed. Run pip install '.[synthesize]'.") from None
        self._options = options
        self._endpoints = [Endpoint(url, options) for url in options.urls]
        self._lock = threading.Lock()
        self._is_checked = False
        self._stop = threading.Event()

    def close(self) -> None:
        """Wake all threads that wait for a server."""
        self._stop.set()

    def call(self, send: Callable[[Any], T]) -> T:
        """Call `send` with the client of a server and return its result. Transient errors are retried.

        Raises:
            TooLongError: The request does not fit into the context.
            OptionRefusedError: The server does not support an option of the request.
            UserError: The server cannot be reached, stays busy, needs another key, or does not serve the model.
        """
        self._check_once()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            endpoint = self._acquire()
            try:
                result = send(endpoint.client)
                self._release(endpoint, None)
                return result
            except Exception as error:
                wait_s = self._compute_retry_wait(error, endpoint)
                self._release(endpoint, wait_s)
                if wait_s is None:
                    self._raise_specific_error(error, endpoint)
                if attempt == MAX_ATTEMPTS or self._stop.is_set():
                    raise UserError(
                        f"{endpoint.url}: failed {attempt} times in a row, the last time with: {self._quote(error)}. Check the "
                        "server and run the same command: finished answers are stored."
                    ) from None
        raise AssertionError

    def _acquire(self) -> Endpoint:
        """Wait for the server that is ready first and return it. Of several, take the one with the fewest running requests."""
        with self._lock:
            now = time.monotonic()
            endpoint = min(self._endpoints, key=lambda e: (max(e.ready_at - now, 0), e.running))
            endpoint.running += 1
        self._stop.wait(max(endpoint.ready_at - time.monotonic(), 0))
        return endpoint

    def _release(self, endpoint: Endpoint, wait_s: float | None) -> None:
        """Count the end of a request. A failure pauses the server; concurrent failures count once."""
        with self._lock:
            endpoint.running -= 1
            now = time.monotonic()
            if wait_s is None:
                endpoint.failures = 0
            elif now >= endpoint.ready_at:
                endpoint.failures, endpoint.ready_at = endpoint.failures + 1, now + wait_s

    def _compute_retry_wait(self, error: Exception, endpoint: Endpoint) -> float | None:
        """Return the seconds to wait before a retry, or None if the error is not transient."""
        import openai

        status = getattr(error, "status_code", None)
        is_transient = isinstance(error, openai.APIConnectionError | ValueError) or (
            status is not None and (status in RETRIED_STATUSES or status >= 500)
        )
        if not is_transient:
            return None
        backoff = min(FIRST_WAIT_S * 2 ** min(endpoint.failures, 10), MAX_WAIT_S) * random.uniform(0.75, 1.25)
        headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
        return min(parse_retry_after(headers.get("retry-after")), MAX_WAIT_S) or backoff

    def _raise_specific_error(self, error: Exception, endpoint: Endpoint) -> NoReturn:
        """Raise an error that says what to do about an error of the openai library."""
        import openai

        if not isinstance(error, openai.APIStatusError):
            raise error
        quote = self._quote(error)
        if error.status_code in (401, 403):
            state = "does not accept the key in" if self._options.api_key else "needs a key, which is read from"
            raise UserError(
                f"{endpoint.url}: the server {state} the environment variable {self._options.key_variable} "
                f"(status {error.status_code}: {quote}). Set it to a key of this server."
            ) from None
        if exceeds_context(error):
            raise TooLongError(quote) from None
        if error.status_code in (400, 422):
            lowered = describe_error(error)
            for option, words in OPTION_WORDS.items():
                if error.param == option or any(word in lowered for word in words):
                    raise OptionRefusedError(option, quote) from None
        raise UserError(
            f"{endpoint.url}: the server refused a request (status {error.status_code}: {quote}). Check --server and --model."
        ) from None

    def _quote(self, error: Exception) -> str:
        """Return the message of an error, without the API key."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        reason = error.__cause__ if getattr(error, "status_code", None) is None and error.__cause__ else error
        return summarize(self._options.redact(str(message or reason or error)), MAX_QUOTED_CHARS)

    def _check_once(self) -> None:
        """Check every server before the first request."""
        with self._lock:
            if not self._is_checked:
                problems = [problem for endpoint in self._endpoints if (problem := self._check(endpoint))]
                if len(problems) == len(self._endpoints):
                    raise UserError(problems[0])
                for problem in problems:
                    log.warning("%s", UserError(problem))
                self._is_checked = True

    def _check(self, endpoint: Endpoint) -> str | None:
        """Return why a server cannot be reached, or None. Raise `UserError` if it needs a key, or does not serve the model."""
        import openai

        try:
            models = [model.id for model in endpoint.client.models.list().data]
        except openai.APIConnectionError as error:
            endpoint.ready_at, endpoint.failures = time.monotonic() + MAX_WAIT_S, 1
            return f"{endpoint.url}: cannot be reached ({self._quote(error)}). {REACH_ADVICE}"
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                self._raise_specific_error(error, endpoint)
            return None  # not every server lists its models
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return None
        if models and self._options.model not in models:
            raise UserError(
                f"{endpoint.url}: does not serve the model {self._options.model!r} (found {', '.join(sorted(models)[:10])}). "
                f"Set --model to one of them.{suggest(self._options.model, models)}"
            )
        return None
