"""A small server that speaks the APIs of embedding servers, and computes vectors with a given fault."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing

from jaxembed.hub.torch_model import load_sentence_transformer

Encode = Callable[[Sequence[str]], np.ndarray]  # N inputs -> vectors [N, W]
MODEL = "served-model"
PROGRAMS = ("openai", "vllm", "llama.cpp", "tei", "ollama", "infinity")


class TorchEncoder:
    """Encodes the inputs of a server with sentence-transformers, from an exported folder."""

    def __init__(self, folder: Path):
        self.model = load_sentence_transformer(folder)

    def encode(self, inputs: Sequence[str], prompts: Sequence[str] = ()) -> np.ndarray:
        """Encode inputs one by one, float32 [N, W].

        Args:
            inputs: Prompts with their texts. A server cannot tell the two apart, so nothing is left out of the pooling.
            prompts: Prompts that are recognized nevertheless.
        """
        longest_first = sorted(prompts, key=len, reverse=True)
        vectors = []
        for text in inputs:
            prompt = next((prompt for prompt in longest_first if text.startswith(prompt)), "")
            options = {"show_progress_bar": False, "convert_to_tensor": True}
            vectors.append(self.model.encode(text[len(prompt) :], prompt=prompt, **options).float().cpu().numpy())
        return np.stack(vectors)

    @contextlib.contextmanager
    def change(self, **settings: Any) -> Iterator[TorchEncoder]:
        """Change settings of the model inside the block: those of `_apply`, or attributes of its pooling module."""
        original = self.model
        self.model = copy.deepcopy(original)
        try:
            self._apply(**settings)
            yield self
        finally:
            self.model = original

    def _apply(
        self,
        special_tokens: tuple[Sequence[str], Sequence[str]] | None = None,
        is_causal: bool | None = None,
        max_length: int | None = None,
        truncation_side: str = "right",
        dtype: torch.dtype | None = None,
        **pooling: Any,
    ) -> None:
        """Apply settings. All have defaults, so there are more than six.

        Args:
            special_tokens: Tokens before and after every text.
            is_causal: Whether the mask is causal.
            max_length: Tokens at which texts are truncated.
            truncation_side: Side at which they are truncated.
            dtype: Dtype of weights and computation.
            **pooling: Attributes of the pooling module.
        """
        transformer, pooling_module = self.model[0], self.model[1]
        tokenizer = transformer.tokenizer
        tokenizer.truncation_side = truncation_side
        for name, value in pooling.items():
            assert hasattr(pooling_module, name)
            setattr(pooling_module, name, value)
        if special_tokens is not None:
            before, after = special_tokens
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
            template = " ".join([*before, "$A", *after])
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
        if is_causal is not None:
            for module in (transformer.auto_model.config, *transformer.auto_model.modules()):
                if hasattr(module, "is_causal"):
                    module.is_causal = is_causal
        if max_length is not None:
            self.model.max_seq_length = max_length
        if dtype is not None:
            self.model.to(dtype)


class EmbeddingHandler(BaseHTTPRequestHandler):
    """Answers by the API of `server.program`."""

    server: FakeServer

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, request: Any) -> None:
        self.server.requests.append((self.path, request, self.headers.get("Authorization")))
        status, content, headers = self.server.answer(self.path, request)
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(body)


class FakeServer(ThreadingHTTPServer):
    """A server of one program.

    Attributes:
        program: One of `PROGRAMS`.
        encode: Computes the vectors.
        overrides: Answers (status, content, headers) by path, which replace the program's.
        requests: (path, content, Authorization header) of every request.
    """

    def __init__(self, program: str, encode: Encode):
        super().__init__(("127.0.0.1", 0), EmbeddingHandler)
        self.program, self.encode = program, encode
        self.overrides: dict[str, tuple[int, Any, dict[str, str]]] = {}
        self.requests: list[tuple[str, Any, str | None]] = []

    @property
    def url(self) -> str:
        """The root URL."""
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, request: Any) -> tuple[int, Any, dict[str, str]]:
        """Return status, content and headers of an answer."""
        if path in self.overrides:
            return self.overrides[path]
        content = self._get(path) if request is None else self._post(path, request)
        return (404, {"detail": "Not Found"}, {}) if content is None else (200, content, {})

    def _get(self, path: str) -> Any:
        owner = {"vllm": "vllm", "llama.cpp": "llamacpp", "infinity": "infinity"}.get(self.program, "someone")
        models = {"data": [{"id": MODEL, "owned_by": owner, "max_model_len": 100}]}
        pages: dict[str, dict[str, Any]] = {
            "openai": {"/v1/models": models},
            "vllm": {"/v1/models": models, "/version": {"version": "0.32.0"}},
            "llama.cpp": {"/v1/models": models, "/props": {"build_info": "b1", "default_generation_settings": {"n_ctx": 99}}},
            "tei": {"/info": {"model_id": MODEL, "max_input_length": 99, "model_dtype": "float32", "version": "1.8.0"}},
            "ollama": {"/api/version": {"version": "0.12.0"}, "/api/tags": {"models": [{"name": MODEL}]}},
            "infinity": {"/models": models},
        }
        return pages[self.program].get(path)

    def _post(self, path: str, request: Any) -> Any:
        vectors = self.encode(request.get("input") or request["inputs"])
        rows = [[float(x) for x in vector] for vector in vectors]
        openai = {"object": "list", "data": [{"index": i, "embedding": row} for i, row in enumerate(rows)][::-1]}
        answers: dict[str, dict[str, Any]] = {
            "openai": {"/v1/embeddings": openai},
            "vllm": {"/v1/embeddings": openai, "/pooling": {"data": [{"index": i, "data": row} for i, row in enumerate(rows)]}},
            "llama.cpp": {
                "/v1/embeddings": openai,
                "/embeddings": [{"index": i, "embedding": [row]} for i, row in enumerate(rows)],
            },
            "tei": {"/embed": rows, "/v1/embeddings": openai},
            "ollama": {"/api/embed": {"embeddings": rows}, "/v1/embeddings": openai},
            "infinity": {"/embeddings": openai},
        }
        return answers[self.program].get(path)


@contextlib.contextmanager
def run_server(encode: Encode, program: str = "openai") -> Iterator[FakeServer]:
    """Run a server in a thread inside the block."""
    with FakeServer(program, encode) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
