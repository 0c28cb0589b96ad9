"""LLM servers that answer requests. Options that a server refuses are left out of later requests."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import threading
from typing import Any

from jaxembed.errors import UserError, summarize
from jaxembed.files import finite_or_none
from jaxembed.synthesis.answers import drop_limits
from jaxembed.synthesis.completions import Choice, read_chat, read_echo, read_json_answer
from jaxembed.synthesis.endpoints import Endpoints, OptionRefusedError, ServerOptions, exceeds_context
from jaxembed.synthesis.requests import Answer, Request, estimate_tokens

log = logging.getLogger("jaxembed")
PROMPT_LOGPROBS = "logprobs of a prompt"  # the option that scoring a text needs
RESPONSE_FORMAT = "response_format"
MAX_LOGPROBS = 20  # OpenAI's limit on top_logprobs
# Ways to ask for a structured answer. After a server refuses one, the next is used.
SCHEMA, SCHEMA_WITHOUT_LIMITS, JSON_MODE, PLAIN_TEXT = range(4)
STRUCTURE_NAMES = ("a JSON schema", "a JSON schema without limits", "JSON", "text that is parsed")


class LlmServers:
    """Sends requests to LLM servers that serve the same model. Threads may share it.

    Attributes:
        options: The servers and how to call them.
    """

    def __init__(self, options: ServerOptions):
        """Create the HTTP clients; send nothing. Raise `UserError` if a URL is not valid, or openai is not installed."""
        self.options = options
        self._endpoints = Endpoints(options)
        self._structure = SCHEMA
        self._refused_options: set[str] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Wake all threads that wait for a server."""
        self._endpoints.close()

    def ask(self, request: Request) -> Answer:
        """Return the answer of a server to a request. Later requests leave out the options that it refuses.

        Raises:
            TooLongError: The request does not fit into the model's context.
            OptionRefusedError: The server cannot score a text.
            UserError: The server cannot be used.
        """
        send = self._score if request.scored_text else self._chat
        if request.scored_text and PROMPT_LOGPROBS in self._refused_options:
            raise OptionRefusedError(PROMPT_LOGPROBS, "refused before")
        while True:
            structure, refused_options = self._structure, frozenset(self._refused_options)
            try:
                return self._endpoints.call(lambda client: send(client, request))
            except OptionRefusedError as refusal:
                if refusal.option in refused_options or (refusal.option == RESPONSE_FORMAT and structure == PLAIN_TEXT):
                    raise UserError(
                        f"--server: refuses {refusal.option}, which was not in the request ({refusal}). Check the server's log."
                    ) from None
                self._note_refusal(refusal, structure)
                if refusal.option == PROMPT_LOGPROBS:
                    raise

    def _supports(self, option: str) -> bool:
        """Return whether no server has refused an option so far."""
        return option not in self._refused_options

    def _note_refusal(self, refusal: OptionRefusedError, structure: int) -> None:
        """Leave out an option from now on, and log it once. `structure` is the way in which the request asked for structure."""
        with self._lock:
            if refusal.option == RESPONSE_FORMAT:
                if self._structure == structure:
                    self._structure += 1
                    name = STRUCTURE_NAMES[self._structure]
                    log.info(
                        "the server refuses %s (%s); answers are requested as %s", STRUCTURE_NAMES[structure], refusal, name
                    )
            elif refusal.option not in self._refused_options:
                self._refused_options.add(refusal.option)
                log.info("the server refuses %s (%s); requests leave it out", refusal.option, refusal)

    def _chat(self, client: Any, request: Request) -> Answer:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.prompt})
        content = self._send(
            client.chat.completions,
            {"messages": messages, **self._list_options(request), **self._structure_options(request)},
            request,
        )
        choice = read_chat(content)
        logprobs = {grade: choice.logprobs[grade] for grade in request.grades if grade in choice.logprobs}
        refusal, reason = self.options.redact(choice.refusal), choice.finish_reason or "stop"
        return dataclasses.replace(self._make_answer(request, choice), refusal=refusal, finish_reason=reason, logprobs=logprobs)

    def _score(self, client: Any, request: Request) -> Answer:
        """Return the mean log-probability of the scored text, from the logprobs of an echoed prompt."""
        import openai

        text = request.prompt + request.scored_text
        try:
            options = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            content = self._send(client.completions, options, request)
        except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as error:
            if exceeds_context(error):
                raise
            raise OptionRefusedError(PROMPT_LOGPROBS, summarize(self.options.redact(error.message))) from None
        choice, tokens = read_echo(content)
        if not tokens:
            raise OptionRefusedError(PROMPT_LOGPROBS, "none in the answer")
        values = [logprob for offset, logprob in tokens.items() if len(request.prompt) <= offset < len(text)]
        mean = math.fsum(values) / len(values) if values else math.nan
        return dataclasses.replace(self._make_answer(request, choice), likelihood=finite_or_none(mean))

    def _send(self, api: Any, options: dict[str, Any], request: Request) -> Any:
        """Send a request, and return the JSON value of the answer."""
        with api.with_streaming_response.create(model=request.model, **options) as response:
            return read_json_answer(response, self.options.timeout_s)

    def _make_answer(self, request: Request, choice: Choice) -> Answer:
        prompt = request.system + request.prompt + request.scored_text
        prompt_tokens, completion_tokens = choice.prompt_tokens, choice.completion_tokens
        return Answer(
            text=self.options.redact(choice.text),
            prompt_tokens=estimate_tokens(prompt) if prompt_tokens is None else prompt_tokens,
            completion_tokens=estimate_tokens(choice.text) if completion_tokens is None else completion_tokens,
            model=self.options.redact(choice.model or request.model),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _list_options(self, request: Request) -> dict[str, Any]:
        """Return the options of a chat request that the server has not refused."""
        limit_name = "max_tokens" if self._supports("max_tokens") else "max_completion_tokens"
        sampling = request.sampling
        options = {
            limit_name: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
        }
        if request.grades and self._supports("logprobs"):
            options |= {"logprobs": True, "top_logprobs": MAX_LOGPROBS}
        return {name: value for name, value in options.items() if name == limit_name or self._supports(name)}

    def _structure_options(self, request: Request) -> dict[str, Any]:
        """Return the option that makes the server enforce a schema."""
        if request.schema is None or self._structure == PLAIN_TEXT:
            return {}
        if self._structure == JSON_MODE:
            return {RESPONSE_FORMAT: {"type": "json_object"}}
        schema = request.schema if self._structure == SCHEMA else drop_limits(request.schema)
        json_schema = {"name": "answer", "strict": True, "schema": schema}
        return {RESPONSE_FORMAT: {"type": "json_schema", "json_schema": json_schema}}
