"""A small LLM server over HTTP that answers the same request always alike, and misbehaves on purpose."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stub-model"
WORDS = ("river", "market", "engine", "violin", "harbor", "garden", "budget", "planet", "letter", "winter", "copper", "window",
         "forest", "dollar", "basket", "camera", "desert", "island", "mirror", "pocket")  # fmt: skip
GERMAN = "Dieser Satz ist leider in einer ganz anderen Sprache geschrieben, als der Nutzer verlangt hatte."
# What can go wrong with a request: each fault comes once for a request, before its answer.
FAULTS = ("slow", "429", "500", "cut")
# What can be wrong with an answer, by the hash of its request.
FLAWS = ("invalid", "refusal", "language", "length")


def make_text(key: str, words: int = 12) -> str:
    """Return English words that depend on a key."""
    digest = hashlib.sha256(key.encode()).digest()
    return "The " + " of the ".join(WORDS[digest[i % 32] % len(WORDS)] for i in range(words)) + f" {key[:6]}."


@dataclasses.dataclass
class Behavior:
    """How the server behaves. Shares are of all requests.

    Attributes:
        fault_share: Share of the requests that fail once or more before they are answered.
        flaw_share: Share of the answers that are not valid.
        key: Key that requests must have; empty for none.
        refused: Options that it refuses, with status 400.
        max_prompt_chars: Longer prompts do not fit into the context.
        delay_s: Seconds that each answer takes.
        gives_logprobs: Whether it gives the log-probabilities of grades and of prompts.
        write: Returns the answer to a request instead of the one of `write_answer`, or None for that one.
        change: Returns the whole JSON value that is sent, given the one of an honest server.
    """

    fault_share: float = 0.0
    flaw_share: float = 0.0
    key: str = ""
    refused: tuple[str, ...] = ()
    max_prompt_chars: int = 10**9
    delay_s: float = 0.0
    gives_logprobs: bool = True
    write: Callable[[Mapping[str, Any]], str | None] = lambda body: None
    change: Callable[[dict[str, Any]], Any] = lambda content: content


class LlmServer:
    """A running server, and what it was asked.

    Attributes:
        url: Its URL.
        behavior: How it behaves. It can be replaced at any time.
        answered: How often each request was answered, by its hash.
        bodies: The requests that were answered, in order.
        headers: Headers of all requests.
    """

    def __init__(self, behavior: Behavior):
        self.behavior = behavior
        self.answered = Counter[str]()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.lock = threading.Lock()
        self.faults = Counter[str]()

        class Handler(StubHandler):
            stub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class StubHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    stub: LlmServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if not self._refuse_key():
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "test"}]})

    def do_POST(self) -> None:
        stub, behavior = self.stub, self.stub.behavior
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub.headers.append(str(self.headers))
        digest = hash_body(body)
        if self._refuse_key() or self._refuse_options(body):
            return
        if len(read_prompt(body)) > behavior.max_prompt_chars:
            return self._fail(400, "This model's maximum context length is 10 tokens. Please reduce the length.")
        if choose(digest, "fault", behavior.fault_share):
            with stub.lock:
                stub.faults[digest] += 1
                count = stub.faults[digest]
            kind = FAULTS[int(digest[:8], 16) % len(FAULTS)]
            if kind == "slow":
                time.sleep(0.02)
            elif count == 1:
                return self._misbehave(kind)
        time.sleep(behavior.delay_s)
        answer = self._answer(body, digest)
        with stub.lock:
            stub.answered[digest] += 1
            stub.bodies.append(body)
        self._send(200, behavior.change(answer))

    def _misbehave(self, kind: str) -> None:
        if kind == "cut":
            # Half of an answer, and a reset of the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"choices": [')
            self.close_connection = True
        else:
            self._fail(int(kind), f"try again, {self.headers.get('Authorization')}", {"Retry-After": "0.01"})

    def _refuse_key(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.stub.behavior.key and given != f"Bearer {self.stub.behavior.key}":
            self._fail(401, f"Incorrect API key provided: {given}")
            return True
        return False

    def _refuse_options(self, body: Mapping[str, Any]) -> bool:
        for name in self.stub.behavior.refused:
            if name in body or (name == "lengths" and "maxLength" in json.dumps(body.get("response_format", ""))):
                option = "response_format" if name == "lengths" else name
                self._fail(400, f"unsupported parameter {option}")
                return True
        return False

    def _answer(self, body: Mapping[str, Any], digest: str) -> dict[str, Any]:
        behavior = self.stub.behavior
        usage = {"prompt_tokens": len(read_prompt(body)) // 4, "completion_tokens": 30, "total_tokens": 0}
        common = {"id": "x", "created": 0, "model": MODEL, "usage": usage}
        if "messages" not in body:
            return common | {"object": "text_completion", "choices": [score_prompt(body, behavior.gives_logprobs)]}
        text, reason = behavior.write(body), "stop"
        if text is None:
            text = write_answer(body, digest)
            if choose(digest, "flaw", behavior.flaw_share):
                text, reason = spoil(text, FLAWS[int(digest[8:16], 16) % len(FLAWS)])
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and behavior.gives_logprobs:
            tops = [{"token": text, "logprob": -0.1, "bytes": []}, {"token": "0", "logprob": -2.4, "bytes": []}]
            choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "bytes": [], "top_logprobs": tops}]}
        return common | {"object": "chat.completion", "choices": [choice]}

    def _fail(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "error", "code": None, "param": None}}, headers)

    def _send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        with contextlib.suppress(OSError):  # the reader may have been killed
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


def hash_body(body: Mapping[str, Any]) -> str:
    """Return a hash of what is asked, without how the answer is to be structured."""
    content = {key: body.get(key) for key in ("messages", "prompt", "seed", "model")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_prompt(body: Mapping[str, Any]) -> str:
    """Return the text of the last message, or the prompt of a completion."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def choose(digest: str, purpose: str, share: float) -> bool:
    """Return whether a request belongs to a share of all requests."""
    return int(hashlib.sha256(f"{digest}{purpose}".encode()).hexdigest()[:8], 16) < share * 2**32


def write_answer(body: Mapping[str, Any], digest: str) -> str:
    """Return a valid answer: a JSON object of the fields that the prompt quotes, a JSON list, a grade, or words."""
    prompt = read_prompt(body)
    if names := re.findall(r'^"(\w+)":', prompt, re.MULTILINE):
        return json.dumps({name: make_text(f"{digest}{name}") for name in names})
    if "list" in prompt:
        return "Sure!\n```json\n" + json.dumps([make_text(f"{digest}{i}") for i in range(4)]) + "\n```"
    return str(int(digest[0], 16) % 4) if "grade" in prompt else make_text(digest)


def spoil(text: str, flaw: str) -> tuple[str, str]:
    """Return an answer with a flaw, and its finish reason."""
    if flaw == "length":
        return text[: len(text) // 2], "length"
    if flaw == "language" and text.startswith("{"):
        return json.dumps(dict.fromkeys(json.loads(text), GERMAN)), "stop"
    return {"refusal": "I'm sorry, but I can't help with that."}.get(flaw, text[:-4] + "}"), "stop"


def score_prompt(body: Mapping[str, Any], gives_logprobs: bool) -> dict[str, Any]:
    """Return the echo of a prompt, one token a word. A token is likelier if it occurred before."""
    words = re.findall(r"\S+\s*", body["prompt"])
    offsets = [sum(map(len, words[:i])) for i in range(len(words))]
    known = [words[i].strip(".?! \n").lower() in " ".join(words[:i]).lower() for i in range(len(words))]
    logprobs = {"tokens": words, "token_logprobs": [None, *(-0.5 if k else -5.0 for k in known[1:])], "text_offset": offsets}
    logprobs["top_logprobs"] = [{}] * len(words)
    return {"index": 0, "text": body["prompt"], "finish_reason": "length", "logprobs": logprobs if gives_logprobs else None}


@contextlib.contextmanager
def run_llm_server(behavior: Behavior | None = None) -> Iterator[LlmServer]:
    """Run a server inside the block."""
    server = LlmServer(behavior or Behavior())
    try:
        yield server
    finally:
        server.close()
