"""Request JSON from a server over HTTP, with retries while it is busy and one-line errors. Uses only the standard library."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

from jaxembed.errors import UserError, summarize

log = logging.getLogger("jaxembed")

KEY_VARIABLE = "OPENAI_API_KEY"  # environment variable of a server's key, by default
BUSY_STATUSES = (429, 503)  # too many requests, and a model that is still being loaded
KEY_STATUSES = (401, 403)  # the key is missing or wrong
MAX_BUSY_ATTEMPTS = 5  # attempts of a request while the server is busy
FIRST_BUSY_WAIT_S, MAX_WAIT_S = 1.0, 30.0  # the wait doubles, unless the server says how long
MAX_ANSWER_BYTES = 2**28
READ_BYTES = 2**16  # bytes of an answer that are read at a time
MAX_QUOTED_CHARS = 300  # characters of a server's error message in ours
REACH_ADVICE = "Check that the server runs, and the host and port of the URL."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects, because they could send a key to another host."""

    def redirect_request(self, *args: Any) -> None:
        """Return no request, so that urllib raises `HTTPError` with the status of the redirect."""


@dataclasses.dataclass(frozen=True)
class HttpResponse:
    """The answer of a server.

    Attributes:
        url: URL of the request.
        status: HTTP status.
        content: The JSON value of the body; None if the body is not JSON.
        text: The body.
    """

    url: str
    status: int
    content: Any
    text: str

    @property
    def is_ok(self) -> bool:
        """Whether the request succeeded."""
        return 200 <= self.status < 300

    def read_object(self) -> Mapping[str, Any]:
        """Return the JSON object of a successful answer; an empty one for any other answer."""
        return self.content if self.is_ok and isinstance(self.content, dict) else {}

    def quote_error(self) -> str:
        """Return the server's error message on a short line: `error`, `error.message`, `message` or `detail` of its JSON."""
        content = self.content
        if isinstance(content, dict):
            content = content.get("error") or content.get("message") or content.get("detail") or content
        if isinstance(content, dict):
            content = content.get("message") or content
        return summarize(self.text if content is None else content, MAX_QUOTED_CHARS)


@dataclasses.dataclass(frozen=True)
class HttpClient:
    """Sends requests to the paths below one URL.

    Attributes:
        root: URL without a trailing slash.
        key: Bearer token of every request. Empty: none is sent.
        key_variable: Environment variable that the key comes from, for messages.
        timeout_s: Timeout of a request, in seconds.
    """

    root: str
    key: str = ""
    key_variable: str = ""
    timeout_s: float = 60.0

    def get(self, path: str) -> HttpResponse:
        """Get a path.

        Raises:
            UserError: The server cannot be reached, takes too long, stays busy, redirects, or needs another key.
        """
        return self._request(path, None)

    def post(self, path: str, content: Any) -> HttpResponse:
        """Post a JSON value to a path.

        Raises:
            UserError: As for `get`.
        """
        return self._request(path, json.dumps(content).encode())

    def _request(self, path: str, body: bytes | None) -> HttpResponse:
        """Send a request, again while the server is busy. Return the answer."""
        wait_s = FIRST_BUSY_WAIT_S
        for attempt in range(1, MAX_BUSY_ATTEMPTS + 1):
            answer, headers = self._send_once(path, body)
            if answer.status not in BUSY_STATUSES or attempt == MAX_BUSY_ATTEMPTS:
                break
            seconds = min(parse_retry_after(headers.get("Retry-After")) or wait_s, MAX_WAIT_S)
            log.info("%s: busy (status %d); retrying in %g s", answer.url, answer.status, seconds)
            time.sleep(seconds)
            wait_s *= 2
        self._raise_for_status(answer, headers)
        return answer

    def _send_once(self, path: str, body: bytes | None) -> tuple[HttpResponse, Mapping[str, str]]:
        """Send one request. Return the answer and its headers."""
        url = self.root + path
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            try:
                response = opener.open(urllib.request.Request(url, body, headers), timeout=self.timeout_s)
            except urllib.error.HTTPError as error:
                response = error  # an answer with an error status
            with response:
                text = _read_body(response, url, self.timeout_s)
                if self.key and response.status >= 400:  # messages quote the answer, and must not show the key
                    text = text.replace(self.key, "***")
                return HttpResponse(url, response.status, _parse_json(text), text), response.headers
        except TimeoutError:
            raise self._explain_timeout(url) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._explain_timeout(url) from None
            raise UserError(f"{url}: cannot be reached ({summarize(error.reason)}). {REACH_ADVICE}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            detail = summarize(error) or type(error).__name__
            raise UserError(f"{url}: the request failed ({detail}). {REACH_ADVICE}") from None

    def _explain_timeout(self, url: str) -> UserError:
        return UserError(f"{url}: no answer within {self.timeout_s:g} s. Check the server, or raise --timeout.")

    def _raise_for_status(self, answer: HttpResponse, headers: Mapping[str, str]) -> None:
        """Raise `UserError` for an answer that a retry would not change."""
        if answer.status in KEY_STATUSES:
            state = "does not accept the key in" if self.key else "needs a key, which is read from"
            raise UserError(
                f"{answer.url}: the server {state} the environment variable {self.key_variable} (status {answer.status}: "
                f"{answer.quote_error()}). Set it to a key of this server."
            )
        if answer.status in BUSY_STATUSES:
            raise UserError(
                f"{answer.url}: still busy after {MAX_BUSY_ATTEMPTS} requests (status {answer.status}: "
                f"{answer.quote_error()}). Try again later."
            )
        if 300 <= answer.status < 400:
            target = headers.get("Location", "an unknown place")
            raise UserError(f"{answer.url}: redirects to {target} (status {answer.status}). Give the URL of the server itself.")


def read_key(variable: str) -> str:
    """Return the key in an environment variable, without white space around it; empty if it is not set.

    Raises:
        UserError: It has characters that no header of a request can hold.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable}: the key has other characters than printable ASCII. Correct this environment variable.")
    return key


def parse_root(url: str) -> str:
    """Return a URL without trailing slashes.

    Raises:
        UserError: It is not an http or https URL, or it contains a password.
    """
    expected = "expected one such as http://localhost:8000"
    try:
        parts = urllib.parse.urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or any(c.isspace() for c in url):
        raise UserError(f"{url}: not the URL of a server ({expected}). Start it with http:// or https://.")
    if parts.username is not None or parts.password is not None:
        raise UserError("URL: contains a user name or a password (expected none). Put the key into an environment variable.")
    if parts.query or parts.fragment:
        raise UserError(f"{url}: has a query or a fragment ({expected}). Remove everything from the ? or # on.")
    return url.rstrip("/")


def _read_body(response: Any, url: str, limit_s: float) -> str:
    """Return the body. Raise `TimeoutError` if it takes too long."""
    try:
        body = join_parts(iter(lambda: response.read1(READ_BYTES), b""), MAX_ANSWER_BYTES, limit_s)
    except AnswerTooLongError as error:
        raise UserError(f"{url}: {error}. Check the URL.") from None
    return body.decode("utf-8", errors="replace")


class AnswerTooLongError(Exception):
    """An answer has too many bytes."""


def join_parts(parts: Iterable[bytes], max_bytes: int, limit_s: float) -> bytes:
    """Return a body that arrives in parts. The timeout of a connection only limits each part.

    Raises:
        AnswerTooLongError: It has more than `max_bytes`.
        TimeoutError: It takes more than `limit_s` seconds.
    """
    end, body = time.monotonic() + limit_s, bytearray()
    for part in parts:
        body += part
        if len(body) > max_bytes:
            raise AnswerTooLongError(f"the answer is longer than {max_bytes:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError(f"the answer did not end within {limit_s:g} s")
    return bytes(body)


def _parse_json(text: str) -> Any:
    """Return a JSON value, or None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_retry_after(text: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 if it is missing or a date."""
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
