"""The loss of token predictions: cross-entropy over the vocabulary, computed block by block.

The logits of all predictions [P, V] are never materialized, in the forward or the backward pass. Letters in shapes: n shards,
P predictions of a shard, V tokens of the vocabulary, W tokens of a block, D model width, B texts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.config import TokenObjectiveConfig
from jaxembed.data.token_batch import TokenBatch
from jaxembed.devices.collectives import replicate
from jaxembed.losses.blockwise import HIGHEST_PRECISION, add_exponentials

Totals = tuple[jax.Array, jax.Array, jax.Array]  # max logit, sum of e^(logit - max), and logit of the target: [n, P] each
MAX_LOGITS_PER_BLOCK = 1 << 24  # on each device: 64 MiB in float32


def token_prediction_loss(
    config: TokenObjectiveConfig, hidden: Float[Array, "n p d"], table: Float[Array, "v d"], batch: TokenBatch
) -> Float[Array, ""]:
    """Compute the mean loss of the predicted tokens, over groups of texts.

    The loss of a group is the weighted sum of its predictions' cross-entropies over the sum of its texts' sizes. With one group
    and equal weights it is the mean over tokens (BehnamGhader et al. 2024, arXiv:2404.05961); with groups of one text it is
    the mean over texts (Muennighoff et al. 2024, arXiv:2402.09906). With weights 1 / rate and the tokens of the texts as sizes
    it is the bound of masked diffusion (Nie et al. 2025, arXiv:2502.09992, equation 3).

    Args:
        config: The objective.
        hidden: Hidden states at the predicting positions.
        table: The kernel of the language-model head, one row for each token of the vocabulary.
        batch: The texts, with the tokens to predict.

    Returns:
        The loss, float32. Groups without predicted tokens do not count.
    """
    return average_over_groups(config, cross_entropy(hidden, table, batch.target), batch)


def average_over_groups(config: TokenObjectiveConfig, losses: Float[Array, "n p"], batch: TokenBatch) -> Float[Array, ""]:
    """Return the mean over groups of texts of the losses of their predictions, as `token_prediction_loss` defines it."""
    weighted_losses = batch.weight * losses
    # Number the texts of the whole batch, and sum losses and sizes over the groups of consecutive texts.
    text_count, texts_per_shard = len(batch.size), len(batch.size) // len(batch.weight)
    group_size = config.group or text_count
    group_count = -(-text_count // group_size)
    text = batch.text + texts_per_shard * jnp.arange(len(batch.weight))[:, None]
    sums = jax.ops.segment_sum(weighted_losses.ravel(), (text // group_size).ravel(), group_count)
    sizes = jax.ops.segment_sum(batch.size, jnp.arange(text_count) // group_size, group_count)
    # Average over the groups that have predicted tokens.
    is_counted = sizes > 0
    return jnp.sum(jnp.where(is_counted, sums / jnp.where(is_counted, sizes, 1), 0)) / jnp.maximum(is_counted.sum(), 1)


def kl_divergence(
    reference: Float[Array, "n p d"], hidden: Float[Array, "n p d"], table: Float[Array, "v d"]
) -> Float[Array, "n p"]:
    """Return the KL divergence of each prediction, from the distribution of `reference` to that of `hidden`, in float32.

    With logits r of the reference, z of the model, and p the softmax of r: sum p (r - z) - logsumexp(r) + logsumexp(z).
    The backward pass computes the blocks of logits again.

    Args:
        reference: Hidden states of the reference model. They get no gradient.
        hidden: Hidden states of the model at the same positions.
        table: The kernel of the language-model head, which both share. It gets no gradient.

    Returns:
        The divergence of each prediction, which is 0 or more.
    """
    reference, table = jax.lax.stop_gradient((reference, table))
    blocks, first_tokens = _split_vocabulary(table, hidden)
    no_target = jnp.full(hidden.shape[:2], -1)

    # Carry max and sum of e^(logit - max) of both models (z, r), and `weighted_sum`: the sum of e^(r - r_max) (r - z).
    @jax.checkpoint
    def add_block(totals: tuple[jax.Array, ...], block: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        z_max, z_total, r_max, r_total, weighted_sum = totals
        z, r = (_compute_logits(states, no_target, len(table), *block)[0] for states in (hidden, reference))
        new_r_max, r_total = add_exponentials(r_max, r_total, r)
        terms = jnp.where(jnp.isfinite(r), jnp.exp(r - new_r_max[..., None]) * (r - z), 0)  # padding has logits of -inf
        weighted_sum = weighted_sum * jnp.exp(r_max - new_r_max) + jnp.sum(terms, axis=-1)
        return (*add_exponentials(z_max, z_total, z), new_r_max, r_total, weighted_sum), None

    zeros = jnp.zeros(hidden.shape[:2], jnp.float32)
    lowest = zeros + jnp.finfo(jnp.float32).min
    totals, _ = jax.lax.scan(add_block, (lowest, zeros, lowest, zeros, zeros), (blocks, first_tokens))
    z_max, z_total, r_max, r_total, weighted_sum = totals
    return weighted_sum / r_total - (r_max + jnp.log(r_total)) + (z_max + jnp.log(z_total))


@jax.custom_vjp
def cross_entropy(hidden: Float[Array, "n p d"], table: Float[Array, "v d"], target: Int[Array, "n p"]) -> Float[Array, "n p"]:
    """Return the cross-entropy of each prediction, log(sum of e^logit) - (logit of the target), in float32.

    The logits are hidden @ table^T, in the dtype of `hidden` and summed in float32.

    Args:
        hidden: Hidden states at the predicting positions.
        table: The kernel of the language-model head, one row for each token of the vocabulary.
        target: The tokens to predict.
    """
    return _forward(hidden, table, target)[0]


def _forward(hidden: jax.Array, table: jax.Array, target: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the cross-entropies, and the residuals for the backward pass: inputs and log-sum-exp of every prediction."""
    blocks, first_tokens = _split_vocabulary(table, hidden)
    lowest = jnp.finfo(jnp.float32).min

    def add_block(totals: Totals, block: tuple[jax.Array, jax.Array]) -> tuple[Totals, None]:
        max_logit, total, target_logit = totals
        logits, is_target = _compute_logits(hidden, target, len(table), *block)
        target_logit += jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        return (*add_exponentials(max_logit, total, logits), target_logit), None

    zeros = jnp.zeros(target.shape, jnp.float32)
    (max_logit, total, target_logit), _ = jax.lax.scan(add_block, (zeros + lowest, zeros, zeros), (blocks, first_tokens))
    lse = max_logit + jnp.log(total)
    return lse - target_logit, (hidden, table, target, lse)


def _backward(residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Return the gradients of hidden states and table. Recomputes each block of logits.

    With p the softmax and g the gradient of a cross-entropy: d logit = g (p - [is target]).
    """
    hidden, table, target, lse = residuals
    blocks, first_tokens = _split_vocabulary(table, hidden)

    def add_block(hidden_sum: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, is_target = _compute_logits(hidden, target, len(table), *block)
        logit_grad = grad[..., None] * (jnp.exp(logits - lse[..., None]) - is_target)
        rows, states = block[0].astype(jnp.float32), hidden.astype(jnp.float32)
        hidden_sum += jnp.einsum("npw,wd->npd", logit_grad, rows, precision=HIGHEST_PRECISION)
        return hidden_sum, jnp.einsum("npw,npd->wd", logit_grad, states, precision=HIGHEST_PRECISION)

    start = jnp.zeros(hidden.shape, jnp.float32)
    hidden_sum, block_sums = jax.lax.scan(add_block, start, (blocks, first_tokens))
    table_sum = block_sums.reshape(-1, table.shape[-1])[: len(table)]
    return hidden_sum.astype(hidden.dtype), table_sum.astype(table.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _split_vocabulary(table: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return equal blocks of the table's rows, [blocks, W, D], padded with zeros, and the first token of each, [blocks]."""
    count = -(-len(table) * hidden.shape[1] // MAX_LOGITS_PER_BLOCK)
    width = -(-len(table) // count)
    padded = jnp.pad(table, [(0, count * width - len(table)), (0, 0)])
    return padded.reshape(count, width, -1), jnp.arange(count) * width


def _compute_logits(
    hidden: jax.Array, target: jax.Array, vocab_size: int, rows: jax.Array, first_token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of a block, -inf for padding, and True at the targets: [n, P, W] each."""
    kernel = replicate(rows.astype(hidden.dtype))
    logits = jnp.einsum("npd,wd->npw", hidden, kernel, precision=HIGHEST_PRECISION, preferred_element_type=jnp.float32)
    token = first_token + jnp.arange(len(rows))
    return jnp.where(token < vocab_size, logits, -jnp.inf), token == target[..., None]
