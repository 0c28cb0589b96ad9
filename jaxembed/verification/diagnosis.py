"""Find out what a server does differently from its folder, by trying variants of the model in JAX.

A variant is a transformer (mask, positions), a tokenization, and what follows the transformer (pooling, projection). The
transformer runs once for each of its variants and each tokenization; all poolings are computed from its hidden states. The
fewest differences that give the vectors of the server are the diagnosis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.data.packing import PackedTexts
from jaxembed.devices.cpu import get_compiler_options
from jaxembed.devices.processes import progress_bar
from jaxembed.hub.embedder import Apply, Embedder
from jaxembed.hub.parity import Probe
from jaxembed.model.masks import MASKS
from jaxembed.model.parameters import stack_layers
from jaxembed.model.transformer import Transformer
from jaxembed.verification.variants import (
    Change,
    Changes,
    PoolVariant,
    TokenVariant,
    TransformerVariant,
    iter_truncation_variants,
    list_pool_variants,
    list_token_variants,
    list_transformer_variants,
)

TEXTS_PER_PROMPT, MAX_SHORT_TEXTS = 4, 24  # short texts that all variants are tried on, per prompt and in total
MAX_EXTENDED_MATCHES = 4  # variants that explain the short texts and are tried on the long ones
HALF_DTYPES = ("float16", "bfloat16")
# The error (1 - cosine) that half precision explains, relative to that of our own computation in half precision. Export allows
# 1.5 times the difference of a component, and 1 - cosine grows with the square of the difference.
HALF_PRECISION_SLACK = 1.5**2


@dataclasses.dataclass(frozen=True)
class VariantMatch:
    """A set of differences, and the least cosine between the vectors that it gives and those of the server."""

    changes: Changes
    cosine: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a server does differently.

    Attributes:
        matches: The smallest sets of differences that give the server's vectors. If there are several, the probe texts cannot
            distinguish them. Empty: no variant gives these vectors. A set without differences: the vectors are the folder's.
        closest: The variant whose vectors are closest to the server's.
    """

    matches: list[VariantMatch]
    closest: VariantMatch


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A variant, and the cosines between its vectors and those of the server on some texts.

    Attributes:
        transformer: Variant of the transformer.
        tokens: Variant of the tokenization.
        pool_index: Index of the variant of pooling and projection in `VariantEncoder.pools`.
        changes: The differences of all three.
        cosines: Cosine of each text, float64 [n].
    """

    transformer: TransformerVariant
    tokens: TokenVariant
    pool_index: int
    changes: Changes
    cosines: np.ndarray

    @property
    def cosine(self) -> float:
        return float(self.cosines.min())

    def count_equal(self, min_cosine: float) -> int:
        return int(np.count_nonzero(self.cosines >= min_cosine))

    def to_match(self) -> VariantMatch:
        return VariantMatch(self.changes, self.cosine)


class VariantEncoder:
    """Computes the vectors of probe texts under variants. Each pass of the transformer is computed once.

    Attributes:
        embedder: The model.
        probes: N probe texts.
        width: Width of the vectors; longer ones are truncated.
        dim: Width that was requested from the server. None: the model's.
        transformers, tokenizations, pools: The variants. The first of each is the model's own.
    """

    def __init__(self, embedder: Embedder, probes: Sequence[Probe], width: int, dim: int | None = None):
        self.embedder, self.probes, self.width = embedder, probes, width
        self.transformers = list_transformer_variants(embedder)
        self.tokenizations = list_token_variants(embedder)
        self.pools = list_pool_variants(embedder, width, dim)
        self._programs: dict[TransformerVariant, Apply] = {}
        self._half_precision: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        self._truncations: dict[tuple[TokenVariant, int, tuple[int, ...]], list[TokenVariant]] = {}
        self._vectors: dict[tuple[TransformerVariant, TokenVariant, tuple[int, ...]], np.ndarray] = {}

    @functools.cached_property
    def input_lengths(self) -> np.ndarray:
        """Tokens of each whole input, before truncation, int64 [N]."""
        texts, prompts = [probe.text for probe in self.probes], [probe.prompt for probe in self.probes]
        return self.embedder.tokenizer.count_untruncated_tokens(texts, prompts)

    def select_short(self, indices: Iterable[int]) -> list[int]:
        """Return the indices of the shortest texts of each prompt, at most `MAX_SHORT_TEXTS` in total."""
        shortest_first = sorted(indices, key=lambda i: (self.input_lengths[i], i))
        prompts = dict.fromkeys(self.probes[i].prompt for i in sorted(shortest_first))
        groups = [[i for i in shortest_first if self.probes[i].prompt == prompt][:TEXTS_PER_PROMPT] for prompt in prompts]
        return sorted(itertools.chain.from_iterable(groups[: MAX_SHORT_TEXTS // TEXTS_PER_PROMPT]))

    def encode(self, transformer: TransformerVariant, tokens: TokenVariant, indices: Sequence[int]) -> np.ndarray:
        """Return the unit vectors of n texts under every variant of `pools`, float32 [n, P, W]."""
        key = transformer, tokens, tuple(indices)
        if key not in self._vectors:
            self._vectors[key] = self._compute(self._get_program(transformer), tokens, indices)
        return self._vectors[key]

    def encode_unchanged(self, indices: Sequence[int]) -> np.ndarray:
        """Return the unit vectors of n texts under the folder's own model, float32 [n, W]."""
        return self.encode(self.transformers[0], self.tokenizations[0], indices)[:, 0]

    def encode_in_half_precision(self, dtype: str, indices: Sequence[int]) -> np.ndarray:
        """Return the unit vectors of n texts under the folder's own model, computed in a dtype, float32 [n, W]."""
        key = dtype, tuple(indices)
        if key not in self._half_precision:
            program = self._compile(self.transformers[0], self.pools[:1], dtype)
            self._half_precision[key] = self._compute(program, self.tokenizations[0], indices)[:, 0]
        return self._half_precision[key]

    def list_truncations(
        self, tokens: TokenVariant, indices: Sequence[int], server_lengths: Sequence[int]
    ) -> list[TokenVariant]:
        """Return variants of a tokenization that truncate n texts differently (`iter_truncation_variants`)."""
        longest_input = int(self.input_lengths[list(indices)].max())
        key = tokens, longest_input, tuple(server_lengths)
        if key not in self._truncations:
            max_positions = self.embedder.model.transformer.max_positions
            self._truncations[key] = list(iter_truncation_variants(tokens, longest_input, max_positions, server_lengths))
        return self._truncations[key]

    def _compute(self, program: Apply, tokens: TokenVariant, indices: Sequence[int]) -> np.ndarray:
        """Return the unit vectors of n texts that a program computes after a tokenization, float32 [n, P, W]."""
        inputs = [tokens.rewrite(self.probes[i].prompt, self.probes[i].text) for i in indices]
        embedder = dataclasses.replace(self.embedder, tokenizer=tokens.tokenizer)
        prompts, texts = zip(*inputs, strict=True)
        vectors = embedder.apply_to_texts(texts, prompts, program, few_shapes=True)
        return to_unit_vectors(vectors)

    def _get_program(self, transformer: TransformerVariant) -> Apply:
        if transformer not in self._programs:
            self._programs[transformer] = self._compile(transformer, self.pools, self.embedder.model.compute.dtype)
        return self._programs[transformer]

    def _compile(self, variant: TransformerVariant, pools: Sequence[PoolVariant], dtype: Any) -> Apply:
        """Return a program from packed texts to the vectors [R, S, P, W] of variants after one pass of the transformer."""
        compute = dataclasses.replace(self.embedder.model.compute, dtype=jnp.dtype(dtype))
        model = self.embedder.model.clone(transformer=variant.transformer, compute=compute)
        transformer, width = Transformer(variant.transformer, MASKS[variant.attention], compute), self.width

        def apply(params: Any, packed: PackedTexts) -> jax.Array:
            params = stack_layers(params)
            hidden = transformer.apply({"params": params["decoder"]}, packed)
            vectors = [model.clone(spec=pool.spec).apply({"params": params}, packed, hidden)[..., :width] for pool in pools]
            return jnp.stack(vectors, axis=2)

        return jax.jit(apply, compiler_options=get_compiler_options())


def to_unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., W] to unit length. Zeros remain zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def measure_half_precision(encoder: VariantEncoder, dtype: str, indices: Sequence[int]) -> float:
    """Return the least cosine that half precision explains: our own error in that dtype, with some slack."""
    exact = encoder.encode_unchanged(indices)
    least_cosine = np.sum(exact * encoder.encode_in_half_precision(dtype, indices), axis=-1).min()
    return 1 - HALF_PRECISION_SLACK * (1 - float(least_cosine))


def diagnose(
    encoder: VariantEncoder,
    served_vectors: np.ndarray,
    indices: Sequence[int],
    min_cosine: float,
    server_lengths: Sequence[int] = (),
) -> Diagnosis:
    """Find the differences that explain the vectors of a server.

    Args:
        encoder: Computes variants.
        served_vectors: Unit vectors of the server [N, W].
        indices: The texts that the server has encoded, n of the N.
        min_cosine: Minimum cosine of equal vectors.
        server_lengths: Token limits that the server reports.
    """
    return _Search(encoder, served_vectors, list(indices), server_lengths).run(min_cosine)


class _Search:
    """The search for the differences of one server. See `diagnose` for the arguments."""

    def __init__(self, encoder: VariantEncoder, served_vectors: np.ndarray, indices: list[int], server_lengths: Sequence[int]):
        self.encoder, self.served_vectors, self.indices, self.server_lengths = encoder, served_vectors, indices, server_lengths
        self.short_indices = encoder.select_short(indices)
        self.candidates: list[_Candidate] = []

    def run(self, min_cosine: float) -> Diagnosis:
        """Search at the precision of float32, then at those of half precision."""
        matches = self._search(min_cosine)
        if not matches and min_cosine > measure_half_precision(self.encoder, HALF_DTYPES[-1], self.short_indices):
            for dtype in HALF_DTYPES:
                bound = min(min_cosine, measure_half_precision(self.encoder, dtype, self.short_indices))
                rounding = Change("dtype", f"{dtype} or a similar rounding", "float32")
                if inexact_matches := self._extend(_select_fewest_changes(self.candidates, bound), bound):
                    matches = [dataclasses.replace(match, changes=(*match.changes, rounding)) for match in inexact_matches]
                    break
        return Diagnosis(matches, max(self.candidates, key=lambda candidate: candidate.cosine).to_match())

    def _search(self, min_cosine: float) -> list[VariantMatch]:
        """Try transformers and tokenizations with one difference, then truncations, then those with several differences."""
        passes = list(itertools.product(self.encoder.transformers, self.encoder.tokenizations))
        self._try_passes([variant_pair for variant_pair in passes if _count_changes(variant_pair) <= 1])
        candidates = _select_fewest_changes(self.candidates, min_cosine)
        if candidates and len(candidates[0].changes) <= 1:
            return self._extend(candidates, min_cosine)
        # Texts that one variant explains, and longer ones that it does not: the server may truncate even the short texts.
        best = max(self.candidates, key=lambda candidate: (candidate.count_equal(min_cosine), -len(candidate.changes)))
        if 0 < best.count_equal(min_cosine) < len(self.short_indices) and (matches := self._explain_failing(best, min_cosine)):
            return matches
        self._try_passes([variant_pair for variant_pair in passes if _count_changes(variant_pair) > 1])
        return self._extend(_select_fewest_changes(self.candidates, min_cosine), min_cosine)

    def _try_passes(self, passes: Sequence[tuple[TransformerVariant, TokenVariant]]) -> None:
        """Add candidates with their cosines on short texts: each pass of the transformer with each pooling and projection."""
        for transformer, tokens in progress_bar(passes, unit="variants", leave=False):
            vectors = self.encoder.encode(transformer, tokens, self.short_indices)
            cosines = np.einsum("npw,nw->pn", vectors, self.served_vectors[self.short_indices])
            for p, pool in enumerate(self.encoder.pools):
                changes = transformer.changes + tokens.changes + pool.changes
                self.candidates.append(_Candidate(transformer, tokens, p, changes, cosines[p]))

    def _extend(self, candidates: Sequence[_Candidate], min_cosine: float) -> list[VariantMatch]:
        """Return the matches that explain all texts. If there are none, add differences on long texts to the first."""
        extended = [self._with_cosines(candidate, self.indices) for candidate in candidates[:MAX_EXTENDED_MATCHES]]
        complete = [candidate.to_match() for candidate in extended if candidate.cosine >= min_cosine]
        return complete or (self._explain_failing(extended[0], min_cosine) if extended else [])

    def _explain_failing(self, candidate: _Candidate, min_cosine: float) -> list[VariantMatch]:
        """Return variants of a candidate that explain all texts. The candidate itself explains only some of them."""
        cosines = self._with_cosines(candidate, self.indices).cosines
        failing = [i for i, cosine in zip(self.indices, cosines, strict=True) if cosine < min_cosine]
        variants = [self._with_cosines(other, failing[:1]) for other in self._iter_long_variants(candidate, failing)]
        matches = [self._with_cosines(other, self.indices) for other in variants if other.cosine >= min_cosine]
        return [match.to_match() for match in _select_fewest_changes(matches, min_cosine)]

    def _iter_long_variants(self, candidate: _Candidate, failing: Sequence[int]) -> Iterable[_Candidate]:
        """Yield variants of a candidate that may differ on long texts alone: truncation, windows, rotary positions."""
        pool = self.encoder.pools[candidate.pool_index]
        if not candidate.transformer.changes:
            for transformer in self.encoder.transformers[1:]:
                yield dataclasses.replace(candidate, transformer=transformer, changes=transformer.changes + candidate.changes)
        for tokens in self.encoder.list_truncations(candidate.tokens, failing, self.server_lengths):
            yield dataclasses.replace(
                candidate, tokens=tokens, changes=candidate.transformer.changes + tokens.changes + pool.changes
            )

    def _with_cosines(self, candidate: _Candidate, indices: Sequence[int]) -> _Candidate:
        """Return a candidate with its cosines on some texts."""
        vectors = self.encoder.encode(candidate.transformer, candidate.tokens, indices)[:, candidate.pool_index]
        return dataclasses.replace(candidate, cosines=np.sum(vectors * self.served_vectors[list(indices)], axis=-1))


def _count_changes(variant_pair: tuple[TransformerVariant, TokenVariant]) -> int:
    return sum(len(variant.changes) for variant in variant_pair)


def _select_fewest_changes(candidates: Sequence[_Candidate], min_cosine: float) -> list[_Candidate]:
    """Return the matching candidates with the fewest changes, the closest first."""
    matching = [candidate for candidate in candidates if candidate.cosine >= min_cosine]
    fewest = min((len(candidate.changes) for candidate in matching), default=0)
    return sorted((c for c in matching if len(c.changes) == fewest), key=lambda c: -c.cosine)
