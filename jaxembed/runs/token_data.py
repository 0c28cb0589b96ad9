"""Objectives that predict tokens: check that a model supports them, and build their batches."""

from __future__ import annotations

from collections.abc import Sequence

from jaxembed.config import (
    CausalLMConfig,
    Config,
    EmbeddingSpec,
    MaskedPredictionConfig,
    StageConfig,
    TokenObjectiveConfig,
)
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.chat_texts import ChatReader
from jaxembed.data.masked_texts import MaskedTextReader
from jaxembed.data.token_batch import ReadTokenTexts, TokenBatchBuilder
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import Shards
from jaxembed.errors import UserError
from jaxembed.hub.base import Base
from jaxembed.losses.objectives import Objectives
from jaxembed.model.families import FAMILIES


def check_token_objectives(config: Config, base: Base, spec: EmbeddingSpec) -> None:
    """Check that the model supports the objectives that predict tokens.

    Raises:
        UserError: One of these holds:
            - The base is an encoder, or has no language-model head.
            - The head is tied to an embedding that is updated lazily.
            - The mask is causal, but an objective is masked prediction.
            - An objective has `kl_to_base`, but the base is trained.
            - The adapters have names.
    """
    for index, stage in enumerate(config.stages):
        for i, objective in stage.token_objectives.items():
            where = f"{config.get_key_prefix(index)}objectives.{i}: {objective.name}"
            if FAMILIES[base.transformer.family].is_encoder:
                raise UserError(
                    f"{where} trains a causal language model, but {base.name} is an encoder ({base.transformer.family}). "
                    "Remove it, or name a decoder as model.base."
                )
            if not base.transformer.tie_embeddings and not base.has_untied_head():
                raise UserError(
                    f"{where} needs a language-model head, but {base.name} has none (expected lm_head.weight among its "
                    "weights). Name a base that has one."
                )
            if stage.optim.lazy_embedding and base.transformer.tie_embeddings:
                raise UserError(
                    f"{where} trains every row of the embedding, which is also the language-model head of {base.name}, but "
                    f"{config.get_key_prefix(index)}optim.lazy_embedding is true. Remove it."
                )
            if isinstance(objective, MaskedPredictionConfig) and spec.attention == "causal":
                raise UserError(
                    f"{where} predicts tokens from both sides, but model.attention is causal (expected bidirectional). Set it."
                )
            if isinstance(objective, CausalLMConfig) and objective.kl_to_base and config.model.lora is None:
                raise UserError(
                    f"{where}: kl_to_base compares with the frozen base, but model.lora is not set, so the base is trained. "
                    "Set model.lora, or remove kl_to_base."
                )
            if config.model.lora is not None and config.model.lora.names:
                raise UserError(f"{where} trains one adapter, but model.lora.names has several. Remove the names.")


def make_token_builders(
    stage: StageConfig,
    plans: Sequence[BatchPlan],
    tokenizer: TextTokenizer,
    shards: Shards,
    first_step: int,
    prefix: str,
) -> dict[str, TokenBatchBuilder]:
    """Return the builder of each objective that predicts tokens, by its label.

    Args:
        stage: The stage.
        plans: The texts of every step for each such objective.
        tokenizer: Tokenizer of the stage.
        shards: The shards of a batch.
        first_step: Steps of the run before the stage.
        prefix: Prefix of the stage's keys, for errors.

    Raises:
        UserError: The tokenizer lacks a token that an objective needs.
    """
    keys = [f"{prefix}objectives.{i}" for i in stage.token_objectives]
    configs = Objectives(stage.objectives).token_configs
    plain_tokenizer = TextTokenizer(tokenizer.hf_tokenizer, tokenizer.spec.replace(echo="", plain_echo=""))
    return {
        label: TokenBatchBuilder(
            plan=plan,
            read=_make_reader(config, plain_tokenizer, key),
            row_length=stage.row_length,
            shards=shards,
            seed=stage.train.seed,
            step_offset=first_step,
        )
        for (label, config), plan, key in zip(configs.items(), plans, keys, strict=True)
    }


def _make_reader(config: TokenObjectiveConfig, tokenizer: TextTokenizer, key: str) -> ReadTokenTexts:
    """Return the reader of the texts of an objective. `key` is its config key, for errors."""
    if isinstance(config, MaskedPredictionConfig):
        return MaskedTextReader(config, tokenizer, key)
    assert isinstance(config, CausalLMConfig)
    return ChatReader(config, tokenizer, key)
