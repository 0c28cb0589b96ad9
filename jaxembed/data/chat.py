"""Conversations: rows of messages with roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from jaxembed.config.fields import quote_value
from jaxembed.data.sampling import TextSampler
from jaxembed.data.schema import Example, Row, check_text_field, is_text

CHAT_ROLES = ("system", "user", "assistant")
MESSAGE = '{"role": "user", "content": "..."}'  # an example of a message, for errors


def check_chat(row: Row) -> str | None:
    """Check a row of messages, or of a prompt and its response."""
    if "messages" not in row:
        return check_text_field(row, "prompt") or check_text_field(row, "response")
    messages = row["messages"]
    if not isinstance(messages, list | tuple):
        return f'"messages" is {quote_value(messages)} (expected a list of {MESSAGE})'
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f'"messages" contains {quote_value(message)} (expected {MESSAGE})'
        if (role := message.get("role")) not in CHAT_ROLES:
            return f"message {i + 1} has the role {quote_value(role)} (expected one of {', '.join(CHAT_ROLES)})"
        if not isinstance(content := message.get("content"), str):
            return f"message {i + 1} has the content {quote_value(content)} (expected a string)"
    if next(_iter_exchanges(messages), None) is None:
        return '"messages" has no answer (expected a message of the user, then one of the assistant)'
    return None


def read_messages(row: Row) -> Sequence[Mapping[str, str]]:
    """Return the messages of a checked row."""
    if "messages" in row:
        messages: Sequence[Mapping[str, str]] = row["messages"]
        return messages
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def _iter_exchanges(messages: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the texts of each message of the user that the assistant answers, and of the answer."""
    for first, second in pairwise(messages):
        is_exchange = (first["role"], second["role"]) == ("user", "assistant")
        if is_exchange and is_text(first["content"]) and is_text(second["content"]):
            yield first["content"], second["content"]


class ChatSampler(TextSampler):
    """Makes the first answered message of the user and its answer a pair, for objectives that compare vectors."""

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Return the first question and its answer."""
        question, answer = self._read_first_exchange(index)
        return Example(query=question, positive=answer, negatives=(), positives=(answer,))

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the first question and its answer as a pair."""
        question, answer = self._read_first_exchange(index)
        yield {"query": question, "pos": [answer]}

    def _read_first_exchange(self, index: int) -> tuple[str, str]:
        """Return the first message of the user that the assistant answers, and the answer."""
        return next(_iter_exchanges(read_messages(self.rows[index])))
