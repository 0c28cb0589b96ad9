"""Request vectors from embedding servers: OpenAI's API and those of TEI, vLLM, llama.cpp and Ollama.

Servers do not add a model's prompt. The client sends prompt and text as one string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.verification.http_client import HttpClient, HttpResponse

# HTTP statuses of a refused input (vLLM, TEI and Ollama). llama.cpp answers 500, with one of the phrases in its message.
REFUSAL_STATUSES = (400, 413, 422)
LLAMA_CPP_REFUSAL_PHRASES = ("too large to process", "larger than the max context size", "exceeds the available context size")
MAX_TEXTS_PER_REQUEST = 16  # TEI takes 32 by default
MAX_LISTED_MODELS = 10
MAX_COMPONENT = 1e30  # magnitude of a component: it must be finite in float32, and its square in float64


class InputRefusedError(Exception):
    """The server refuses these inputs, for example because they are too long. The message is the server's."""


@dataclasses.dataclass(frozen=True)
class Api:
    """An HTTP API for embeddings.

    Attributes:
        paths: Possible paths below the URL of the server. The first one that exists is used.
        inputs_key: Key of the texts in a request.
        read_items: Returns the items of an answer, one per text, in the order of the texts.
        extra_fields: Further fields of every request.
        takes_model: Whether a request names the model.
    """

    paths: tuple[str, ...]
    inputs_key: str
    read_items: Callable[[Any], list[Any]]
    extra_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes_model: bool = True


def _sort_by_index(items: Any) -> list[Any]:
    """Return items in the order of the texts that they belong to. Raise `IndexError` if their indices are not 0, 1, ..."""
    ordered = sorted(items, key=lambda item: item["index"])
    if any(item["index"] != i for i, item in enumerate(ordered)):
        raise IndexError
    return ordered


def _read_openai_items(content: Any) -> list[Any]:
    """Return the vectors of `{"data": [{"index": 0, "embedding": [...]}, ...]}`. vLLM's /pooling calls them `data`."""
    items = _sort_by_index(content["data"])
    return [item["embedding"] if "embedding" in item else item["data"] for item in items]


def _read_llama_cpp_items(content: Any) -> list[Any]:
    """Return the vectors of `[{"index": 0, "embedding": [[...]]}, ...]`. A server without pooling returns one per token."""
    items = [item["embedding"] for item in _sort_by_index(content)]
    return [item[0] if len(item) == 1 and isinstance(item[0], list) else item for item in items]


APIS = {
    "openai": Api(("/v1/embeddings", "/embeddings"), "input", _read_openai_items, {"encoding_format": "float"}),
    "tei": Api(("/embed",), "inputs", list, {"truncate": True}, takes_model=False),
    "vllm": Api(("/pooling",), "input", _read_openai_items, {"task": "embed", "encoding_format": "float"}),
    "llama.cpp": Api(("/embeddings", "/embedding"), "input", _read_llama_cpp_items, takes_model=False),
    "ollama": Api(("/api/embed",), "input", lambda content: list(content["embeddings"]), {"truncate": True}),
}
# The API that `auto` chooses for a program. For all other servers it is OpenAI's.
PREFERRED_APIS = {"TEI": "tei", "Ollama": "ollama"}
# Requests to vLLM need this in both of its APIs: without it, vLLM refuses long texts instead of truncating them.
VLLM_TRUNCATION = {"truncate_prompt_tokens": -1}
# Programs by the `owned_by` of their models.
MODEL_OWNERS = {"vllm": "vLLM", "llamacpp": "llama.cpp", "infinity": "infinity", "library": "Ollama"}


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """What a server reports about itself.

    Attributes:
        program: Name of the program; empty if unknown.
        version: Its version; empty if unknown.
        models: Names of its models.
        dtype: Dtype of its computation; empty if unknown.
        max_lengths: Token limits.
    """

    program: str = ""
    version: str = ""
    models: tuple[str, ...] = ()
    dtype: str = ""
    max_lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return program and version."""
        return f"{self.program or 'a server of unknown kind'} {self.version}".rstrip()


def identify_server(client: HttpClient) -> ServerInfo:
    """Find out the program and the models of a server.

    Raises:
        UserError: The server cannot be reached, or needs a key.
    """
    # TEI has /info and lists no models.
    tei = client.get("/info").read_object()
    if "model_id" in tei and "max_input_length" in tei:
        names = dict.fromkeys(str(tei[key]) for key in ("served_model_name", "model_id") if tei.get(key))
        limit = tei["max_input_length"]
        return ServerInfo(
            "TEI", str(tei.get("version", "")), tuple(names), str(tei.get("model_dtype", "")), _keep_positive(limit)
        )
    # Everything else lists its models; infinity without /v1.
    answer = client.get("/v1/models").read_object() or client.get("/models").read_object()
    models = _read_models(answer, "data", "id")
    names = dict.fromkeys(str(model["id"]) for model in models)
    info = ServerInfo(models=tuple(names), max_lengths=_keep_positive(*(model.get("max_model_len") for model in models)))
    owners = [str(model.get("owned_by")) for model in models]
    program = next((MODEL_OWNERS[owner] for owner in owners if owner in MODEL_OWNERS), "")
    if program == "vLLM":
        version = client.get("/version").read_object().get("version", "")
        return dataclasses.replace(info, program=program, version=str(version))
    if program == "llama.cpp":
        return _read_llama_cpp_properties(client, info)
    if program == "infinity":
        return dataclasses.replace(info, program=program, dtype=str(models[0].get("dtype", "")))
    if version := client.get("/api/version").read_object().get("version"):
        return _read_ollama_models(client, dataclasses.replace(info, program="Ollama", version=str(version)))
    return dataclasses.replace(info, program=program)


def _read_models(answer: Mapping[str, Any], key: str, name_key: str) -> list[Mapping[str, Any]]:
    """Return the models that an answer lists under a key, each with a name; none if there is no such list."""
    models = answer.get(key)
    return [model for model in models if isinstance(model, dict) and name_key in model] if isinstance(models, list) else []


def _read_llama_cpp_properties(client: HttpClient, info: ServerInfo) -> ServerInfo:
    properties = client.get("/props").read_object()
    settings = properties.get("default_generation_settings")
    limit = settings.get("n_ctx") if isinstance(settings, dict) else None
    version = str(properties.get("build_info", ""))
    return dataclasses.replace(info, program="llama.cpp", version=version, max_lengths=_keep_positive(limit))


def _read_ollama_models(client: HttpClient, info: ServerInfo) -> ServerInfo:
    names = [str(model["name"]) for model in _read_models(client.get("/api/tags").read_object(), "models", "name")]
    return dataclasses.replace(info, models=tuple(names) or info.models)


def _keep_positive(*values: Any) -> tuple[int, ...]:
    """Return the values that are positive integers."""
    return tuple(value for value in values if isinstance(value, int) and value > 0)


@dataclasses.dataclass(frozen=True)
class EmbeddingServer:
    """An embedding server, with the model and the API to use.

    Attributes:
        client: Client of the server.
        info: What the server reports about itself.
        api_name: Key of `APIS`.
        path: Path of the API.
        model: Name of the model; empty if none is sent.
        dim: Width to request. None: the server's default.
    """

    client: HttpClient
    info: ServerInfo
    api_name: str
    path: str
    model: str
    dim: int | None = None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Request the vectors of N texts in one request, float64 [N, W].

        Raises:
            UserError: The server cannot be reached, fails, or its answer is not one vector of finite numbers per text.
            InputRefusedError: The server refuses these texts.
        """
        answer = self.client.post(self.path, self.build_request(texts))
        _check_answer(answer, self)
        try:
            items = APIS[self.api_name].read_items(answer.content)
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{answer.url}: the answer has no vectors where the API {self.api_name} has them (it starts with "
                f"{answer.text[:60]!r}). Choose another --api."
            ) from None
        return _parse_vectors(items, len(texts), answer.url)

    def encode_in_groups(self, texts: Sequence[str]) -> np.ndarray:
        """Request the vectors of N texts, `MAX_TEXTS_PER_REQUEST` per request, float64 [N, W]. Raises as `encode` does."""
        starts = range(0, len(texts), MAX_TEXTS_PER_REQUEST)
        return np.concatenate([self.encode(texts[start : start + MAX_TEXTS_PER_REQUEST]) for start in starts])

    def build_request(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the JSON body of a request for the vectors of texts."""
        api = APIS[self.api_name]
        model = {"model": self.model} if api.takes_model and self.model else {}
        truncation = VLLM_TRUNCATION if self.info.program == "vLLM" or self.api_name == "vllm" else {}
        width = {} if self.dim is None else {"dimensions": self.dim}
        return {api.inputs_key: list(texts), **model, **api.extra_fields, **truncation, **width}


def connect(client: HttpClient, api_name: str = "auto", model: str | None = None, dim: int | None = None) -> EmbeddingServer:
    """Find the API and the model of a server.

    Args:
        client: Client of the server. Its root may end in the path of an API, such as /v1 or /v1/embeddings.
        api_name: Key of `APIS`, or auto.
        model: Name of the model. Default: the first one that the server lists.
        dim: Width to request. Default: the server's default.

    Raises:
        UserError: The server cannot be reached, or has no such model or API.
    """
    client = dataclasses.replace(client, root=_strip_api_path(client.root))
    info = identify_server(client)
    # Ollama also answers to names without their tag.
    if model is not None and info.models and model not in info.models and f"{model}:latest" not in info.models:
        raise UserError(f"--model: the server has no model {model!r} (it lists {_list_models(info)}). Name one of those.")
    if api_name == "auto":
        api_name = PREFERRED_APIS.get(info.program, "openai")
    chosen_model = model or next(iter(info.models), "")
    for path in APIS[api_name].paths:
        server = EmbeddingServer(client, info, api_name, path, chosen_model, dim)
        if _has_path(server):
            return server
    paths = " or ".join(APIS[api_name].paths)
    raise UserError(
        f"{client.root}: has no embeddings at {paths} ({info}; status 404). Give the root URL of an embedding server, or "
        "another --api."
    )


def _strip_api_path(root: str) -> str:
    """Return the root of a server, given its URL with or without the path of an API."""
    paths = sorted((path for api in APIS.values() for path in api.paths), key=len, reverse=True)
    for path in (*paths, "/v1", "/api"):
        if root.endswith(path):
            return root.removesuffix(path)
    return root


def _has_path(server: EmbeddingServer) -> bool:
    """Return whether the path of a server's API exists. Status 405 means that it exists for another method only."""
    answer = server.client.post(server.path, server.build_request(["text"]))
    return answer.status not in (404, 405) or _names_missing_model(answer)


def _names_missing_model(answer: HttpResponse) -> bool:
    """Return whether a 404 is about the model of the request, not about the path."""
    return isinstance(answer.content, dict) and "model" in answer.quote_error().lower()


def _list_models(info: ServerInfo) -> str:
    names = ", ".join(info.models[:MAX_LISTED_MODELS])
    return names + (", ..." if len(info.models) > MAX_LISTED_MODELS else "") or "none"


def _check_answer(answer: HttpResponse, server: EmbeddingServer) -> None:
    """Raise `UserError` or `InputRefusedError` unless the answer is good JSON."""
    message = answer.quote_error()
    if answer.is_ok and answer.content is not None:
        return
    if answer.is_ok:
        kind = "an HTML page" if "<html" in answer.text[:1000].lower() else "not JSON"
        raise UserError(f"{answer.url}: the answer is {kind} (it starts with {answer.text[:60]!r}). Check the URL.")
    if answer.status == 404:
        raise UserError(
            f"{answer.url}: the server has no model {server.model!r} (it lists {_list_models(server.info)}; status 404: "
            f"{message}). Name one with --model."
        )
    if answer.status in REFUSAL_STATUSES or any(phrase in message for phrase in LLAMA_CPP_REFUSAL_PHRASES):
        raise InputRefusedError(f"status {answer.status}: {message}")
    raise UserError(f"{answer.url}: the server failed (status {answer.status}: {message}). Check its log.")


def _parse_vectors(items: list[Any], count: int, url: str) -> np.ndarray:
    """Return the vectors of an answer, float64 [N, W].

    Raises:
        UserError: They are not `count` vectors of one width with finite numbers.
    """
    if len(items) != count:
        raise UserError(f"{url}: {len(items)} vectors for {count} texts. Check that the server embeds texts.")
    for index, item in enumerate(items):
        if problem := _describe_vector_problem(item, items[0]):
            raise UserError(f"{url}: the vector of text {index} of the request {problem}")
    return np.array(items, np.float64)


def _describe_vector_problem(vector: Any, first_vector: Any) -> str:
    """Return what is wrong with a vector and what to do, or an empty string. All must be as wide as the first one."""
    if isinstance(vector, list) and vector and isinstance(vector[0], list):
        return f"is {len(vector)} vectors, one per token. Start the server with pooling."
    if not isinstance(vector, list) or not vector:
        return f"is {str(vector)[:40]!r} (expected a list of numbers). Choose another --api."
    if any(number is not None and type(number) not in (int, float) for number in vector):
        return "has entries that are not numbers. Choose another --api."
    if not all(number is not None and abs(number) < MAX_COMPONENT for number in vector):
        return "has numbers that are not finite (NaN or infinity). Use another dtype or device in the server."
    if len(vector) != len(first_vector):
        return f"has {len(vector)} dimensions, but that of text 0 has {len(first_vector)}. Check the server."
    return ""
