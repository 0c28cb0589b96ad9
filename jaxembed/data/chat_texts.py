"""Conversations as tokens. The generative objective of GRIT predicts the tokens of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from jaxembed.config import CausalLMConfig
from jaxembed.data.chat import CHAT_ROLES, read_messages
from jaxembed.data.schema import Row
from jaxembed.data.token_batch import NOT_PREDICTED, TokenText
from jaxembed.data.tokenize import MAX_TEXT_CHARS, TextTokenizer, find_start_token, starts_with_bos
from jaxembed.errors import UserError


class FormattedChat(NamedTuple):
    """A conversation as one text.

    Attributes:
        text: The text.
        answers: Start and end of each answer in characters, including its end token.
    """

    text: str
    answers: list[tuple[int, int]]


class ChatReader:
    """Turns conversations into tokens, of which those of the answers are predicted, each from the tokens before it.

    A conversation is written as one text and tokenized once. A token belongs to an answer if it starts in it: so the prompt
    before the answer has the same tokens as when text is generated (Muennighoff et al. 2024, arXiv:2402.09906).
    """

    def __init__(self, config: CausalLMConfig, tokenizer: TextTokenizer, key: str):
        """Find the end of answers.

        Args:
            config: Templates and mask.
            tokenizer: Its Hugging Face tokenizer and its maximum length apply. BOS precedes a text if the tokenizer adds it.
            key: Key of the objective in the config, for errors.

        Raises:
            UserError: The tokenizer has no EOS token, and the config no other end of answers.
        """
        hf_tokenizer = tokenizer.hf_tokenizer
        if config.answer_end is None and hf_tokenizer.eos_token is None:
            raise UserError(f"{key}.answer_end: the base's tokenizer has no EOS token to end answers with. Set answer_end.")
        self._config, self._max_length = config, tokenizer.spec.max_length
        self._answer_end: str = hf_tokenizer.eos_token if config.answer_end is None else config.answer_end
        start = find_start_token(hf_tokenizer)
        self._first_ids = [start[1]] if start is not None and starts_with_bos(hf_tokenizer) else []
        self._backend = Tokenizer.from_str(hf_tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()

    def __call__(self, rows: Sequence[Row], rngs: Sequence[np.random.Generator]) -> list[TokenText]:
        """Return the tokens of conversations. Nothing is drawn from the generators."""
        chats = [self.format(read_messages(row)) for row in rows]
        encodings = self._backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
        return [self._build(chat.answers, encoding) for chat, encoding in zip(chats, encodings, strict=True)]

    def format(self, messages: Sequence[Mapping[str, str]]) -> FormattedChat:
        """Write messages as one text, without BOS. White space around answers is removed."""
        config, text, answers = self._config, "", list[tuple[int, int]]()
        templates = dict(
            zip(CHAT_ROLES, (config.system_template, config.user_template, config.assistant_template), strict=True)
        )
        for i, message in enumerate(messages):
            before, after = templates[message["role"]].split("{text}")
            if message["role"] == "assistant":
                start = len(text) + len(before)
                text += before + message["content"].strip() + self._answer_end
                answers.append((start, len(text)))
                text += config.turn_separator if i + 1 < len(messages) else ""
            else:
                text += before + message["content"] + after
        return FormattedChat(text[:MAX_TEXT_CHARS], answers)

    def _build(self, answers: Sequence[tuple[int, int]], encoding: Encoding) -> TokenText:
        is_prefix_lm, first = self._config.attention == "prefix_lm", len(self._first_ids)
        tokens = np.array([*self._first_ids, *encoding.ids], np.int32)[: self._max_length]
        # Select the predicted tokens: those that start in an answer, or in the last one.
        starts = np.array([start for start, _ in encoding.offsets], np.int64)[: max(0, self._max_length - first)]
        is_predicted = np.zeros(len(tokens), bool)
        for start, end in answers[-1:] if is_prefix_lm else answers:
            is_predicted[first:] |= (starts >= start) & (starts < end)
        # The token before each predicts it.
        targets = np.where(np.append(is_predicted[1:], False), np.append(tokens[1:], 0), NOT_PREDICTED).astype(np.int32)
        context = first + int(np.sum(starts < answers[-1][0])) if is_prefix_lm else 0
        size = 1 if self._config.average == "texts" else np.sum(targets != NOT_PREDICTED)
        return TokenText(tokens, targets, context, size=float(size))
