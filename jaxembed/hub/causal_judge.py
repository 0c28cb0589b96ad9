"""Score (query, document) pairs with a causal language model that answers yes or no, such as Qwen3-Reranker, in JAX."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.config.curation_models import JudgeConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats.weights import open_tensors
from jaxembed.hub.base import FolderBase
from jaxembed.hub.cross_encoder import ScorePairs, cache_scores
from jaxembed.hub.embedder import Embedder, load_embedder
from jaxembed.hub.resolve import find_base_with_weights
from jaxembed.model.transformer import ComputeOptions

# The tensor that turns the last hidden state into logits, in a model with an untied head and with a tied one.
HEAD_TENSOR, TIED_HEAD_TENSOR = "lm_head.weight", "embed_tokens.weight"


def open_causal_judge(config: JudgeConfig, cache: Path) -> ScorePairs:
    """Open a causal language model as a judge.

    The model reads `config.template` with the query and the document. The score is the probability of the first of
    `config.answers` among both, at the position after the last token (Zhang et al. 2025, arXiv:2506.05176, equation 4).

    Args:
        config: The section of the judge.
        cache: Folder under which scores are stored, so that each is computed once.

    Returns:
        A function from (query, document) pairs to scores from 0 to 1, float32 [P].

    Raises:
        UserError: The model cannot be loaded, or an answer is not one token.
    """
    base = find_base_with_weights(config.model)
    if not isinstance(base, FolderBase):
        raise UserError(f"{config.model}: is a run, which has no language-model head. Name a folder or hub id.")
    before, after = config.split_template()
    spec = EmbeddingSpec(
        attention="causal",
        pooling="last",
        normalize=False,
        append_eos=False,
        query_suffix=after,
        max_length=min(config.max_length, base.transformer.max_positions),
    )
    embedder = load_embedder(base, spec, ComputeOptions(), make_mesh(devices=jax.local_devices()))
    head = read_answer_rows(base, find_answer_ids(config, embedder))

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        queries = truncate_queries([query for query, _ in pairs], embedder, spec.max_length // 2)
        prompts = [before.replace("{instruction}", config.instruction).replace("{query}", query) for query in queries]
        assert embedder._apply is not None
        hidden = embedder.apply_to_texts([document for _, document in pairs], prompts, embedder._apply)
        # The probability of the first answer among the two.
        logits = hidden @ head.T
        return np.asarray(jax.nn.sigmoid(jnp.asarray(logits[:, 0] - logits[:, 1])), np.float32)

    settings = config.model_dump_json(exclude={"kind", "model"})
    digest = hashlib.sha256(f"{base.hash()} {settings}".encode()).hexdigest()
    return cache_scores(config.model, cache / "scores" / digest, score)


def find_answer_ids(config: JudgeConfig, embedder: Embedder) -> list[int]:
    """Return the token ids of both answers. Raise `UserError` if one is not a token."""
    vocabulary = embedder.tokenizer.hf_tokenizer.get_vocab()
    for answer in config.answers:
        if answer not in vocabulary:
            raise UserError(f"{config.model}: {answer!r} is not one token of its tokenizer. Set answers to two tokens.")
    return [vocabulary[answer] for answer in config.answers]


def read_answer_rows(base: FolderBase, ids: Sequence[int]) -> np.ndarray:
    """Return the rows of tokens in the language-model head, float32 [len(ids), D]. A tied head is the token embedding."""
    is_tied = bool(base.hf_config.get("tie_word_embeddings", False))
    with open_tensors(base.folder) as tensors:
        name = TIED_HEAD_TENSOR if is_tied and HEAD_TENSOR not in tensors else HEAD_TENSOR
        if name not in tensors:
            raise UserError(
                f"{base.name}: has no {name}, the head of a language model (expected a model that generates text). "
                "Choose a reranker, or kind: cross_encoder."
            )
        return np.concatenate([np.asarray(tensors[name][i : i + 1], np.float32) for i in ids])


def truncate_queries(queries: Sequence[str], embedder: Embedder, max_tokens: int) -> list[str]:
    """Truncate queries to a number of tokens, so that the document and the end of the template fit."""
    encodings = embedder.tokenizer.hf_tokenizer.backend_tokenizer.encode_batch(list(queries), add_special_tokens=False)
    offsets = [encoding.offsets for encoding in encodings]
    return [
        query if len(token_offsets) <= max_tokens else query[: token_offsets[max_tokens][0]]
        for query, token_offsets in zip(queries, offsets, strict=True)
    ]
