"""The Python interface: `Embedder.load(MODEL).encode(texts)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed.config.spec import EmbeddingSpec, FewShotExample
from jaxembed.data.packing import PackedTexts, fill, max_segments, pack_by_length
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.cpu import compiler_options
from jaxembed.devices.mesh import make_mesh, shard_count
from jaxembed.devices.placement import batch_sharding, put_global, to_host, unstack_views
from jaxembed.devices.processes import progress
from jaxembed.errors import UserError
from jaxembed.hub.base import Base, content_hash, find_base
from jaxembed.hub.restore import RunParts, base_params, open_trained, shapes_and_shardings, text_tokenizer
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.training.run_dir import RECORD

WINDOW = 4096  # texts tokenised and packed together
TOKENS_AT_ONCE, ON_CPU = 8192, 2048  # tokens a device takes at once; a CPU's caches want fewer
SHORTEST_ROW = 64
# How the vectors of a long text's pieces become one; a mean is a sum, since the result is made unit length.
COMBINED = {"mean": np.add, "max": np.maximum}


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model with its parameters and tokenizer. Vectors do not depend on the batch, the order or the devices.

    `base` is what its shape came from; `revision` identifies its weights.
    """

    model: EmbeddingModel
    params: Any
    tokenizer: TextTokenizer
    mesh: Mesh
    base: Base
    revision: str = ""
    _apply: Callable[[Any, PackedTexts], jax.Array] | None = None

    def __post_init__(self) -> None:
        if self._apply is None:
            model, options = self.model, compiler_options()

            def apply(params: Any, texts: PackedTexts) -> jax.Array:
                return model.apply({"params": _layers_stacked(params)}, texts)

            object.__setattr__(self, "_apply", jax.jit(apply, compiler_options=options))

    @property
    def spec(self) -> EmbeddingSpec:
        return self.model.spec

    @functools.cached_property
    def _by_layer(self) -> Any:
        """The parameters as programs take them: on one CPU with each layer by itself, which XLA would otherwise copy out of
        the stacked ones for every program.
        """
        if self.mesh.size > 1 or self.mesh.devices.flat[0].platform != "cpu" or not self.model.compute.unroll:
            return self.params
        leaves, tree = jax.tree.flatten(self.params["decoder"]["layers"])
        by_leaf = (unstack_views(self.mesh, x) for x in leaves)
        layers = [jax.tree.unflatten(tree, of_layer) for of_layer in zip(*by_leaf, strict=True)]
        return _with_layers(self.params, layers)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        dtype: str = "float32",
        checkpoint: str = "best",
        layers: int | None = None,
        adapter: str | None = None,
        mesh: Mesh | None = None,
    ) -> Embedder:
        """Loads a run directory, an exported or Hugging Face folder, or a hub id.

        `dtype` is that of the computation. `checkpoint` picks a run's step: best (on the held-out sets), last, or a number.
        `layers` keeps the first ones only (early exit). `adapter` names one of a run that has several. `mesh` says on
        which devices texts and parameters lie (`make_mesh`): on all, with all parameters on each, if absent.
        """
        whole = cls._load(model, dtype, checkpoint, adapter, make_mesh() if mesh is None else mesh)
        return whole if layers is None else whole.first_layers(layers)

    @classmethod
    def _load(cls, model: str | Path, dtype: str, checkpoint: str, adapter: str | None, mesh: Mesh) -> Embedder:
        compute = Compute(dtype=jnp.dtype(dtype))
        path = Path(model)
        if (path / RECORD).is_file():
            return from_run(open_trained(path, compute, mesh, checkpoint).of(adapter), mesh)
        if adapter is not None:
            raise UserError(f"{model}: not a run directory, so it has no adapter {adapter!r} to choose; leave that out")
        base = find_base(str(model))
        if base.folder is None:
            raise UserError(f"{model}: a preset has no weights; train it first")
        return from_base(base, base.spec, compute, mesh)

    def with_params(self, params: Any) -> Embedder:
        """The same model with other parameters; what was compiled is shared."""
        return dataclasses.replace(self, params=params)

    def first_layers(self, count: int) -> Embedder:
        """The model cut to its first layers, the final norm after them; it can be exported. `UserError` if it has fewer."""
        decoder = self.model.decoder
        if not 0 < count <= decoder.layers:
            raise UserError(f"layers is {count}; expected 1 to {decoder.layers}, the layers of this model")
        config = dict(self.base.hf_config) | {"num_hidden_layers": count}
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:count]
        cut = dataclasses.replace(decoder, layers=count, windows=decoder.windows[:count])
        kept = jax.tree.map(lambda x: x[:count], self.params["decoder"]["layers"])
        return dataclasses.replace(
            self,
            model=self.model.clone(decoder=cut),
            params=_with_layers(self.params, kept),
            base=dataclasses.replace(self.base, hf_config=config, decoder=cut),
            revision=f"{self.revision}-{count}-layers",
            _apply=None,
        )

    def encode(
        self,
        texts: Sequence[str],
        instruction: str | None = None,
        dim: int | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
        long_texts: str = "cut",
        show_progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors, float32 [N, D], in the order of `texts`.

        `instruction` is put before every text by the model's template; `prompt` is put there as it is; `prompt_name`
        names one stored with the model (`spec.prompts`). `examples` are (query, response) pairs that show, before the
        instruction, what it asks for (few-shot). Texts beyond `spec.max_length` are cut there; with `long_texts`
        mean or max they are read in pieces, whose unit vectors are so combined. `dim` keeps the first numbers of each
        vector (Matryoshka) and makes it unit length again. Scores are dot products. `UserError` on a dim, a name or a way
        that the model does not have, and on examples that leave no room for a text.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one string")
        width = self.model.width
        if dim is not None and not 0 < dim <= width:
            raise UserError(f"dim is {dim}; expected 1 to {width}, the width of this model's vectors")
        if long_texts not in ("cut", *COMBINED):
            raise UserError(f"long_texts is {long_texts!r}; expected cut, {', '.join(COMBINED)}")
        lead = self._lead(instruction, prompt, prompt_name, examples)
        out = np.zeros((len(texts), dim or width), np.float32)
        starts = progress(range(0, len(texts), WINDOW), disable=not show_progress, unit=f"x{WINDOW} texts")
        for start in starts:
            window = list(texts[start : start + WINDOW])
            vectors = self._vectors(window, lead, long_texts)[:, :dim]
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            out[start : start + len(window)] = vectors / np.maximum(norms, 1e-12)
        return out

    def latent_weights(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """How much each text attends to each latent, by head, mean over its tokens: float32 [N, heads, latents].

        For models with latent attention (NV-Embed, appendix C); `UserError` for others.
        """
        if not self.spec.pooling.startswith("latent_attention"):
            raise UserError(f"this model has {self.spec.pooling} pooling, which has no latents")

        def weights(params: Any, packed: PackedTexts) -> jax.Array:
            _, sown = self.model.apply({"params": _layers_stacked(params)}, packed, mutable=["intermediates"])
            return jnp.asarray(sown["intermediates"]["pooling"]["latent_weights"][0])

        apply, lead = jax.jit(weights, compiler_options=compiler_options()), self._lead(instruction, None, None)
        starts = range(0, len(texts), WINDOW)
        parts = [self._run(list(texts[start : start + WINDOW]), lead, apply) for start in starts]
        return np.concatenate(parts) if parts else np.zeros((0, self.spec.pooling_heads, self.spec.latents), np.float32)

    def _lead(
        self, instruction: str | None, prompt: str | None, prompt_name: str | None, examples: Sequence[tuple[str, str]] = ()
    ) -> str:
        """What is put before every text."""
        if sum(given is not None for given in (instruction, prompt, prompt_name)) > 1:
            raise TypeError("encode takes one of instruction, prompt and prompt_name")
        if examples and not instruction:
            raise TypeError("encode presents examples under an instruction; give it one")
        if prompt_name is not None and prompt_name not in self.spec.prompts:
            known = ", ".join(self.spec.prompts) or "none"
            raise UserError(f"prompt name {prompt_name!r}: not stored with this model; stored: {known}")
        stored = self.spec.prompts[prompt_name] if prompt_name is not None else prompt
        if stored is not None:
            return stored
        if any(not isinstance(example, tuple) or len(example) != 2 for example in examples):
            raise TypeError("examples are pairs (query, response)")
        lead = self.spec.prompt(instruction, [FewShotExample(instruction or "", *example) for example in examples])
        if examples and self.tokenizer.room([lead])[0] < 1:
            taken, most = int(self.tokenizer.untruncated_lengths([""], [lead])[0]), self.tokenizer.max_length
            told = f"the instruction and its examples ({len(examples)}) take {taken} of the {most} tokens that the model reads"
            raise UserError(f"{told}; name fewer or shorter examples")
        return lead

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines [A, B] of two sets of vectors from `encode`."""
        return np.asarray(a @ b.T)

    def _vectors(self, texts: list[str], prompt: str, long_texts: str) -> np.ndarray:
        assert self._apply is not None
        if long_texts == "cut":
            return self._run(texts, prompt, self._apply)
        pieces = self.tokenizer.pieces(texts, prompt)
        starts = np.cumsum([0, *(len(of_text) for of_text in pieces[:-1])])
        vectors = self._run([piece for of_text in pieces for piece in of_text], prompt, self._apply)
        return np.asarray(COMBINED[long_texts].reduceat(vectors, starts, axis=0))

    def _run(self, texts: list[str], prompt: str, apply: Callable[[Any, PackedTexts], jax.Array]) -> np.ndarray:
        """Packs texts into rows, applies [R, S, ...] to some rows at a time, puts the results in order."""
        tokenized = self.tokenizer(texts, [prompt] * len(texts))
        lengths = np.array([len(ids) for ids in tokenized.ids], np.int64)
        shards, split = shard_count(self.mesh), batch_sharding(self.mesh)
        at_once = functools.partial(_rows_at_once, shards)
        pending = []
        for among, (row, place, rows), length in pack_by_length(lengths, SHORTEST_ROW, at_once):
            segments = max_segments(length)
            for first, last, count in _groups(rows, at_once(length), shards):
                here = np.flatnonzero((row >= first) & (row < last))
                members = among[here]
                ids = [tokenized.ids[i] for i in members]
                arrays = fill(ids, tokenized.pool_from[members], row[here] - first, place[here], (count, length))
                packed = put_global(split, PackedTexts(**arrays, segments=segments, shards=shards))
                slots = (row[here] - first) * segments + place[here]
                with jax.set_mesh(self.mesh):
                    pending.append((members, slots, apply(self._by_layer, packed)))
        out = np.zeros((len(texts), *pending[0][2].shape[2:]), np.float32)
        for members, slots, results in pending:
            out[members] = np.asarray(to_host(results), np.float32).reshape(-1, *out.shape[1:])[slots]
        return out


def _with_layers(params: Any, layers: Any) -> Any:
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def _layers_stacked(params: Any) -> Any:
    """The parameters as the model takes them."""
    layers = params["decoder"]["layers"]
    if not isinstance(layers, list):
        return params
    return _with_layers(params, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *layers))


def _rows_at_once(shards: int, row_length: int) -> int:
    tokens = ON_CPU if jax.default_backend() == "cpu" else TOKENS_AT_ONCE
    return max(1, tokens // row_length) * shards


def _groups(rows: int, most: int, shards: int) -> Iterator[tuple[int, int, int]]:
    """(first row, last row, rows with padding) of what is computed at once: full groups, the last of a power of two."""
    for first in range(0, rows, most):
        last = min(first + most, rows)
        per_shard = -(-(last - first) // shards)
        yield first, last, min(most, shards << (per_shard - 1).bit_length())


def from_run(parts: RunParts, mesh: Mesh) -> Embedder:
    """An embedder with a run's parameters, adapters merged."""
    return Embedder(*parts.merged, parts.tokenizer, mesh, parts.base, parts.revision)


def from_base(base: Base, spec: EmbeddingSpec, compute: Compute, mesh: Mesh) -> Embedder:
    """An embedder with the weights and tokenizer of a base folder, read under `spec`."""
    assert base.folder is not None
    model = EmbeddingModel(base.decoder, spec, compute)
    shapes, shardings = shapes_and_shardings(model, mesh)
    params = base_params(base, shapes, shardings)
    if absent := shapes.keys() - params.keys():
        told = f"{spec.pooling} pooling" if "pooling" in absent else "projection"
        raise UserError(f"{base.name}: has no weights of its {told}; train it, or choose a model without")
    return Embedder(model, params, text_tokenizer(base.tokenizer(), spec, base), mesh, base, content_hash(base)[:16])
