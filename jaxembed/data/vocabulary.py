"""Shrink the vocabulary of a tokenizer.json to the tokens that some texts use. It tokenizes these texts as before.

The functions work on the JSON value of a tokenizer.json of the library tokenizers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from jaxembed.errors import UserError

TokenizerJson = dict[str, Any]
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of a tokenizer that spells unknown characters in bytes
BYTE_LEVEL_ALPHABET = frozenset(ByteLevel.alphabet())  # characters that stand for the 256 bytes
WORD_PREFIXES = ("##", "▁", "Ġ")
POST_PROCESSOR_PAIRS = ("sep", "cls")  # [token, id] in a post-processor of BERT or RoBERTa


def shrink_vocabulary(tokenizer_json: TokenizerJson, used_ids: Collection[int]) -> tuple[TokenizerJson, list[int]]:
    """Return a tokenizer.json with fewer tokens, and the old id of each new one.

    It keeps used tokens, special tokens, bytes, single ASCII characters, and the parts that BPE merges into a used token. Texts
    that use no other tokens are split as before, because the tokenizer never chose a dropped token for them.

    Args:
        tokenizer_json: JSON value of a tokenizer.json.
        used_ids: Ids of the tokens that the texts have.

    Raises:
        UserError: The kind of tokenizer is not supported.
    """
    kind = (tokenizer_json.get("model") or {}).get("type")
    if kind not in REBUILDERS:
        raise UserError(f"--vocabulary-from: cannot shrink a tokenizer of this kind (found {kind}; expected {_list_kinds()}).")
    # The tokens to keep.
    ids_by_token = _collect_ids(tokenizer_json)
    needed_tokens = {token for token, id_ in ids_by_token.items() if id_ in used_ids or _is_always_kept(token)}
    needed_tokens |= {entry["content"] for entry in tokenizer_json["added_tokens"]}
    if kind == "BPE":
        needed_tokens |= _find_merged_parts(tokenizer_json["model"], needed_tokens & tokenizer_json["model"]["vocab"].keys())
    if unknown := tokenizer_json["model"].get("unk_token"):
        needed_tokens.add(unknown)
    if kind == "Unigram" and (unknown_id := tokenizer_json["model"].get("unk_id")) is not None:
        needed_tokens.add(tokenizer_json["model"]["vocab"][unknown_id][0])
    # Number them in their old order, and rebuild each part of the tokenizer that has ids.
    old_ids = sorted(ids_by_token[token] for token in needed_tokens if token in ids_by_token)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    smaller = copy.deepcopy(tokenizer_json)
    smaller["model"] = REBUILDERS[kind](tokenizer_json["model"], new_ids)
    for entry in smaller["added_tokens"]:
        entry["id"] = new_ids[entry["id"]]
    smaller["post_processor"] = _renumber(tokenizer_json.get("post_processor"), new_ids)
    return smaller | {"truncation": None, "padding": None}, old_ids


def renumber_config(config: Mapping[str, Any], old_ids: list[int]) -> dict[str, Any]:
    """Return a model's config.json with the new size of the vocabulary and the new ids of its special tokens.

    The id of a special token that was dropped is null.

    Args:
        config: Content of config.json.
        old_ids: The old id of each new token.
    """
    new_ids = {old: new for new, old in enumerate(old_ids)}
    renumbered = dict(config) | {"vocab_size": len(old_ids)}
    for key, value in config.items():
        if key.endswith("_token_id") and value is not None:
            renumbered[key] = [new_ids.get(v) for v in value] if isinstance(value, list) else new_ids.get(value)
    return renumbered


def _list_kinds() -> str:
    return " or ".join(sorted(REBUILDERS))


def _collect_ids(tokenizer_json: TokenizerJson) -> dict[str, int]:
    """Return the ids of all tokens. Added tokens are not always part of the model's vocabulary."""
    vocab = tokenizer_json["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return ids | {entry["content"]: entry["id"] for entry in tokenizer_json["added_tokens"]}


def _is_always_kept(token: str) -> bool:
    """Return whether a token is a byte or a single ASCII character, also after a prefix, or a byte of byte-level BPE."""
    if BYTE_TOKEN.fullmatch(token) or token in BYTE_LEVEL_ALPHABET:
        return True
    bare = next((token.removeprefix(prefix) for prefix in WORD_PREFIXES if token.startswith(prefix)), token)
    return len(bare) <= 1 and bare.isascii()


def _find_merged_parts(model: TokenizerJson, tokens: Collection[str]) -> set[str]:
    """Return all parts that BPE merges, step by step, into these tokens."""
    ranks = {pair: rank for rank, pair in enumerate(map(_read_pair, model["merges"]))}
    parts: set[str] = set()
    for token in tokens:
        symbols = list(token)
        parts.update(symbols)
        while len(symbols) > 1:
            rank, index = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == len(ranks):  # a token that no merge makes, such as an added one
                break
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
            parts.add(symbols[index])
    return parts


def _read_pair(merge: Any) -> tuple[str, str]:
    """Return the two parts of a merge, which older files write as one string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _rebuild_bpe(model: TokenizerJson, new_ids: Mapping[int, int]) -> TokenizerJson:
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError("--vocabulary-from: cannot shrink a BPE tokenizer that marks parts of words (found such a mark).")
    vocab = {token: new_ids[id_] for token, id_ in model["vocab"].items() if id_ in new_ids}
    merges = [merge for merge in model["merges"] if _is_possible(_read_pair(merge), vocab)]
    return {**model, "vocab": vocab, "merges": merges}


def _is_possible(pair: tuple[str, str], vocab: Mapping[str, int]) -> bool:
    first, second = pair
    return first in vocab and second in vocab and first + second in vocab


def _rebuild_wordpiece(model: TokenizerJson, new_ids: Mapping[int, int]) -> TokenizerJson:
    return {**model, "vocab": {token: new_ids[id_] for token, id_ in model["vocab"].items() if id_ in new_ids}}


def _rebuild_unigram(model: TokenizerJson, new_ids: Mapping[int, int]) -> TokenizerJson:
    vocab = [entry for id_, entry in enumerate(model["vocab"]) if id_ in new_ids]
    unknown = model.get("unk_id")
    return {**model, "vocab": vocab, "unk_id": None if unknown is None else new_ids[unknown]}


REBUILDERS: dict[str, Callable[[TokenizerJson, Mapping[int, int]], TokenizerJson]] = {
    "BPE": _rebuild_bpe, "WordPiece": _rebuild_wordpiece, "Unigram": _rebuild_unigram
}  # fmt: skip


def _renumber(processor: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a post-processor with new ids, at any depth."""
    if isinstance(processor, list):
        return [_renumber(part, new_ids) for part in processor]
    if not isinstance(processor, dict):
        return processor
    renumbered = {key: _renumber(value, new_ids) for key, value in processor.items()}
    if isinstance(ids := processor.get("ids"), list):
        renumbered["ids"] = [new_ids[id_] for id_ in ids]
    for key in POST_PROCESSOR_PAIRS:
        if isinstance(pair := processor.get(key), list):
            renumbered[key] = [pair[0], new_ids[pair[1]]]
    return renumbered
