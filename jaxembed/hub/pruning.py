"""Make a model smaller without training: fewer layers, narrower feed-forward layers, a smaller vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.data.packing import PackedTexts
from jaxembed.data.tokenize import TextTokenizer, load_tokenizer
from jaxembed.data.vocabulary import renumber_config, shrink_vocabulary
from jaxembed.devices.cpu import get_compiler_options
from jaxembed.errors import UserError
from jaxembed.hub.embedder import TEXTS_PER_WINDOW, Embedder
from jaxembed.hub.layer_cuts import SizedModel, check_config, score_mlp_units, select_layers, select_mlp_units
from jaxembed.model.parameters import stack_layers

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")  # other files with tokens or their ids


def prune_layers(embedder: Embedder, indices: Sequence[int]) -> Embedder:
    """Return a model with some of its layers.

    Args:
        embedder: The model.
        indices: Layers to keep, counted from 0.

    Raises:
        UserError: The model does not have these layers, or none is left.
    """
    layers = embedder.model.transformer.layers
    kept_layers = sorted(set(indices))
    if not kept_layers or kept_layers[0] < 0 or kept_layers[-1] >= layers:
        raise UserError(f"--keep-layers: {list(indices)} is out of range (this model has {layers}, counted from 0).")
    cut = select_layers(_get_sizes(embedder), kept_layers)
    check_config(cut)
    return embedder.with_sizes(cut, embedder.spec.replace(exit_layers=()), f"{len(kept_layers)}-of-{layers}-layers")


def spread_layers(layers: int, count: int) -> list[int]:
    """Return `count` of the layers, evenly spread, the first and the last among them.

    Raises:
        UserError: The model does not have so many layers.
    """
    if not 0 < count <= layers:
        raise UserError(f"--layer-count: {count} is out of range (this model has {layers} layers). Choose 1 to {layers}.")
    return [layers - 1] if count == 1 else np.rint(np.linspace(0, layers - 1, count)).astype(int).tolist()


def prune_mlp(embedder: Embedder, width: int, texts: Iterable[str] | None) -> Embedder:
    """Return a model with narrower feed-forward layers. Each layer keeps the units with the highest scores (`score_mlp_units`).

    Args:
        embedder: The model.
        width: The new width.
        texts: Texts on which the activations are measured. None: only the weights decide.

    Raises:
        UserError: The feed-forward layers are not that wide.
    """
    transformer = embedder.model.transformer
    if not 0 < width <= transformer.mlp_width:
        raise UserError(
            f"--mlp-width: {width} is out of range (the feed-forward layers of this model have {transformer.mlp_width} units). "
            f"Choose 1 to {transformer.mlp_width}."
        )
    activity = None if texts is None else measure_activity(embedder, texts)
    scores = score_mlp_units(embedder.params["decoder"]["layers"], activity)
    units = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :width], axis=1)
    return embedder.with_sizes(select_mlp_units(_get_sizes(embedder), units), embedder.spec, f"mlp-{width}")


def measure_activity(embedder: Embedder, texts: Iterable[str]) -> np.ndarray:
    """Return the root of the mean squared activation of each unit of the feed-forward layers on some texts, [L, F]."""
    model = embedder.model

    @functools.partial(jax.jit, compiler_options=get_compiler_options())
    def sum_squares(params: Any, packed: PackedTexts) -> tuple[jax.Array, jax.Array]:
        _, sown = model.apply({"params": stack_layers(params)}, packed, mutable=["intermediates"])
        return sown["intermediates"]["decoder"]["layers"]["mlp"]["hidden_squares"][0], jnp.sum(packed.segment_ids > 0)

    totals, tokens = np.zeros((model.transformer.layers, model.transformer.mlp_width)), 0

    def apply(params: Any, packed: PackedTexts) -> jax.Array:
        nonlocal totals, tokens
        squares, count = sum_squares(params, packed)
        totals, tokens = totals + np.asarray(squares, np.float64), tokens + int(count)
        return jnp.zeros((len(packed.tokens), packed.segments, 1))  # results by text are not needed

    for window in _group(texts):
        embedder.apply_to_texts(window, [embedder.spec.plain_prompt] * len(window), apply)
    return np.asarray(np.sqrt(totals / max(tokens, 1)))


def prune_vocabulary(embedder: Embedder, texts: Iterable[str]) -> Embedder:
    """Return a model with the tokens that some texts use. It gives these texts the same vectors (`shrink_vocabulary`).

    The prompts that are stored with the model count as texts.

    Args:
        embedder: The model.
        texts: The texts.

    Raises:
        UserError: The tokenizer cannot be shrunk, or the new one tokenizes the texts differently.
    """
    old = embedder.tokenizer
    prompts = [*embedder.spec.prompts.values(), embedder.spec.plain_prompt, embedder.spec.query_suffix]
    samples = list(dict.fromkeys([*prompts, *texts]))
    tokens = [ids for window in _group(samples) for ids in old.hf_tokenizer(window)["input_ids"]]
    used_ids = set().union(*tokens)
    state, old_ids = shrink_vocabulary(json.loads(old.hf_tokenizer.backend_tokenizer.to_str()), used_ids)
    tokenizer = _rebuild_tokenizer(old.hf_tokenizer, state)
    _check_tokens(tokenizer, samples, tokens, old_ids)
    config = renumber_config(embedder.hf_config, old_ids)
    transformer = dataclasses.replace(embedder.model.transformer, vocab_size=len(old_ids))
    tables = {part: embedder.params[part] for part in ("decoder", "head") if part in embedder.params}
    params = {**embedder.params, **{part: {**t, "embedding": t["embedding"][np.array(old_ids)]} for part, t in tables.items()}}
    check_config(sizes := SizedModel(transformer, config, params))
    pruned = embedder.with_sizes(sizes, embedder.spec, f"vocabulary-{len(old_ids)}")
    return dataclasses.replace(pruned, tokenizer=TextTokenizer(tokenizer, embedder.spec))


def _get_sizes(embedder: Embedder) -> SizedModel:
    return SizedModel(embedder.model.transformer, embedder.hf_config, embedder.params)


def _rebuild_tokenizer(tokenizer: Any, state: Any) -> Any:
    """Return a Hugging Face tokenizer with another tokenizer.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for other in VOCABULARY_FILES:
            (folder / other).unlink(missing_ok=True)
        (folder / TOKENIZER_FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # has the old ids
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(folder)


def _check_tokens(tokenizer: Any, texts: Sequence[str], tokens: Sequence[Sequence[int]], old_ids: Sequence[int]) -> None:
    """Raise `UserError` if a tokenizer does not split texts into these tokens, with their new ids."""
    new = (ids for window in _group(texts) for ids in tokenizer(window)["input_ids"])
    for text, ids, expected in zip(texts, new, tokens, strict=True):
        if [old_ids[i] for i in ids] != list(expected):
            raise UserError(
                f"--vocabulary-from: the smaller tokenizer splits a text differently ({text[:40]!r}). It cannot be shrunk."
            )


def _group(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in batches."""
    iterator = iter(texts)
    while window := list(islice(iterator, TEXTS_PER_WINDOW)):
        yield window
