"""The Python interface: `Embedder.load(MODEL).encode(texts)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed.config.field_lists import log_once
from jaxembed.config.fields import quote_value
from jaxembed.config.spec import EmbeddingSpec, FewShotExample
from jaxembed.data.packing import PackedTexts, compute_max_segments, fill_rows, pack_by_length, split_rows
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.cpu import ENCODE_TOKENS_PER_CALL, get_compiler_options, is_tuned
from jaxembed.devices.mesh import count_shards, make_mesh
from jaxembed.devices.placement import make_batch_sharding, put_global, to_host, unstack_views
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.files import expand_home
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.hub.base import Base, FolderBase
from jaxembed.hub.layer_cuts import SizedModel, select_layers
from jaxembed.hub.resolve import find_base_with_weights, find_run
from jaxembed.hub.restore import RestoredRun
from jaxembed.hub.spec_files import log_default_spec
from jaxembed.hub.text_tokenizer import build_text_tokenizer, check_texts
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.parameters import compute_shapes_and_shardings, replace_layers, stack_layers
from jaxembed.model.transformer import ComputeOptions

TEXTS_PER_WINDOW = 4096  # texts that are tokenized and packed together
TOKENS_PER_CALL = 8192  # tokens per device and program call; for CPUs see `ENCODE_TOKENS_PER_CALL`
MIN_ROW_LENGTH, LONG_ROW_LENGTH = 64, 512  # tokens
# Functions that combine the vectors of a long text's pieces. The mean is a sum, because the result is scaled to unit length.
COMBINE_PIECES = {"mean": np.add, "max": np.maximum}

Apply = Callable[[Any, PackedTexts], jax.Array]  # (parameters, packed texts [R, T]) -> arrays [R, S, ...]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A text-embedding model, ready to encode.

    The vector of a text does not depend on the other texts, their order, or the devices.

    Attributes:
        model: The model.
        params: Its parameters, on the devices of `mesh`.
        tokenizer: Its tokenizer.
        mesh: The devices.
        hf_config: Hugging Face config of its transformer.
        revision: Name of its weights in messages, such as RUN-STEP.
        weights_hash: SHA-256 of the weights that were loaded, and -ADAPTER if one was selected; empty if none were loaded.
    """

    model: EmbeddingModel
    params: Any
    tokenizer: TextTokenizer
    mesh: Mesh
    hf_config: Mapping[str, Any]
    revision: str = ""
    weights_hash: str = ""
    _apply: Apply | None = None

    def __post_init__(self) -> None:
        """Prepare the compiled program."""
        if self._apply is None:
            object.__setattr__(self, "_apply", _compile_encoding_program(self.model.drop_text_fields()))

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
        """Load a model.

        Args:
            model: Run directory, exported, PEFT or Hugging Face folder, or hub id.
            dtype: Dtype of the computation: float32 or bfloat16.
            checkpoint: Checkpoint of a run: best (on its held-out sets), last, or a step.
            layers: Keep only this many of the first layers (early exit). Default: all.
            adapter: Name of the adapter to use, for a run that has several.
            mesh: Devices for texts and parameters (`make_mesh`). Default: all devices, each with all parameters.

        Returns:
            The model. Adapters are merged into its weights.

        Raises:
            UserError: There is no such model, checkpoint or adapter, or its files cannot be read.
        """
        embedder = cls._load(model, dtype, checkpoint, adapter, make_mesh() if mesh is None else mesh)
        return embedder if layers is None else embedder.keep_first_layers(layers)

    @classmethod
    def _load(cls, model: str | Path, dtype: str, checkpoint: str, adapter: str | None, mesh: Mesh) -> Embedder:
        compute = ComputeOptions(dtype=jnp.dtype(dtype))
        if ((folder := expand_home(model)) / BASE_RECORD_FILE).is_file():
            run = find_run(str(model), folder, checkpoint).restore(compute, mesh)
            return build_embedder(run.select_adapter(adapter), mesh)
        if adapter is not None:
            raise UserError(f"{model}: no adapter {adapter!r} to choose (this is not a run directory). Omit the adapter.")
        base = find_base_with_weights(str(model))
        if isinstance(base, FolderBase):
            log_default_spec(base.folder, base.spec)
        return load_embedder(base, base.spec, compute, mesh)

    @property
    def spec(self) -> EmbeddingSpec:
        """How texts become vectors: mask, pooling, prompts, maximum length."""
        return self.model.spec

    def with_params(self, params: Any) -> Embedder:
        """Return the same model with other parameters of the same shapes. It shares the compiled programs.

        Args:
            params: Tree of the parameters.
        """
        return dataclasses.replace(self, params=params)

    def with_spec(self, spec: EmbeddingSpec) -> Embedder:
        """Return the same model with another spec, which needs the same parameters and special tokens.

        Args:
            spec: How texts become vectors.
        """
        tokenizer = TextTokenizer(self.tokenizer.hf_tokenizer, spec)
        return dataclasses.replace(self, model=self.model.clone(spec=spec), tokenizer=tokenizer, _apply=None)

    def keep_first_layers(self, count: int) -> Embedder:
        """Return the model with its first layers only, followed by the final norm. It can be exported.

        Args:
            count: Number of layers.

        Raises:
            UserError: The model does not have so many layers.
        """
        total, exit_layers = self.model.transformer.layers, self.spec.exit_layers
        if not 0 < count <= total:
            raise UserError(f"layers: {count} is out of range (this model has {total}). Choose 1 to {total}.")
        if count not in (total, *exit_layers):
            log_once(f"layers: the model was not trained to end after {count} layers (trained exits: {list(exit_layers)})")
        spec = self.spec.replace(exit_layers=tuple(layers for layers in exit_layers if layers < count))
        cut = select_layers(SizedModel(self.model.transformer, self.hf_config, self.params), range(count))
        return self.with_sizes(cut, spec, f"{count}-layers")

    def with_sizes(self, sizes: SizedModel, spec: EmbeddingSpec, name: str) -> Embedder:
        """Return a model of other sizes with this tokenizer.

        Args:
            sizes: The transformer and the parameters.
            spec: How texts become vectors.
            name: Suffix of the revision.
        """
        model, revision = self.model.clone(transformer=sizes.transformer, spec=spec), f"{self.revision}-{name}"
        resized = dataclasses.replace(self, model=model, revision=revision, _apply=None)
        return dataclasses.replace(resized, params=sizes.params, hf_config=sizes.hf_config)

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
        """Encode texts as unit vectors. The score of two texts is the dot product of their vectors.

        At most one of `instruction`, `prompt` and `prompt_name` may be given. The method has more than six parameters, because
        all of them except the texts are options.

        Args:
            texts: N texts.
            instruction: Describes the task. The model's template turns it into the prompt of every text.
            dim: Keep only the first `dim` dimensions of each vector (Matryoshka), normalized again. Default: all.
            prompt: Text to put before every text, unchanged.
            prompt_name: Name of a prompt that is stored with the model (`spec.prompts`).
            examples: (query, response) pairs before the instruction that show what it asks for (few-shot).
            long_texts: How to treat texts beyond `spec.max_length` tokens. cut: the rest is dropped. mean, max: the text is
                encoded in pieces, whose unit vectors are averaged or combined by their maximum.
            show_progress: Show a progress bar.

        Returns:
            Vectors, float32 [N, D], in the order of `texts`. Equal texts are encoded once.

        Raises:
            UserError: The model has no such `dim` or `prompt_name`, `long_texts` is unknown, the examples leave no room for a
                text, or the model returns values that are not finite.
            TypeError: An argument has another type, such as a string for `texts`, or two kinds of prompts are given.
        """
        check_texts(texts)
        width = self.model.width
        if not isinstance(dim, int | np.integer | None) or isinstance(dim, bool):
            raise TypeError(f"encode: dim is {quote_value(dim)} ({type(dim).__name__}); expected an integer")
        if dim is not None and not 0 < dim <= width:
            raise UserError(f"dim: {dim} is out of range (vectors of this model have {width} dimensions). Choose 1 to {width}.")
        if long_texts not in ("cut", *COMBINE_PIECES):
            raise UserError(f"long_texts: {long_texts!r} is unknown (expected cut, {', '.join(COMBINE_PIECES)}).")
        full_prompt = self._choose_prompt(instruction, prompt, prompt_name, examples)
        positions = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal texts are encoded once
        distinct = list(positions)
        out = np.zeros((len(distinct), dim or width), np.float32)
        starts = range(0, len(distinct), TEXTS_PER_WINDOW)
        for start in progress_bar(starts, disable=not show_progress, unit=f"x{TEXTS_PER_WINDOW} texts"):
            window = distinct[start : start + TEXTS_PER_WINDOW]
            vectors = self._encode_window(window, full_prompt, long_texts)[:, :dim]
            if not np.isfinite(vectors).all():
                index = list(texts).index(window[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])])
                raise UserError(
                    f"encode: the vector of text {index} is not finite (NaN or infinity). The weights are damaged, or the "
                    "dtype is too narrow for them. Use another checkpoint, or --dtype float32."
                )
            out[start : start + len(window)] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return out if len(distinct) == len(texts) else out[[positions[text] for text in texts]]

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the cosine similarities [A, B] of two sets of vectors from `encode`.

        Args:
            a: Unit vectors [A, D].
            b: Unit vectors [B, D].
        """
        return np.asarray(a @ b.T)

    def latent_weights(self, texts: Sequence[str], instruction: str | None = None, *, prompt: str | None = None) -> np.ndarray:
        """Return the attention weights of latent attention, averaged over the tokens of each text (NV-Embed, appendix C).

        Args:
            texts: N texts.
            instruction: Describes the task, as in `encode`.
            prompt: The complete prompt, instead of an instruction.

        Returns:
            Weights, float32 [N, heads, latents]. They sum to 1 over the latents.

        Raises:
            UserError: The model has another pooling.
        """
        if not self.spec.pooling.startswith("latent_attention"):
            raise UserError(f"latent_weights: this model has {self.spec.pooling} pooling (expected latent attention).")

        def apply(params: Any, packed: PackedTexts) -> jax.Array:
            _, sown = self.model.apply({"params": stack_layers(params)}, packed, mutable=["intermediates"])
            return jnp.asarray(sown["intermediates"]["pooling"]["latent_weights"][0])

        program = jax.jit(apply, compiler_options=get_compiler_options())
        check_texts(texts)
        prompt = self._choose_prompt(instruction, prompt, None)
        starts = range(0, len(texts), TEXTS_PER_WINDOW)
        windows = [list(texts[start : start + TEXTS_PER_WINDOW]) for start in starts]
        weights = [self.apply_to_texts(window, [prompt] * len(window), program) for window in windows]
        return np.concatenate(weights) if weights else np.zeros((0, self.spec.pooling_heads, self.spec.latents), np.float32)

    def _choose_prompt(
        self, instruction: str | None, prompt: str | None, prompt_name: str | None, examples: Sequence[tuple[str, str]] = ()
    ) -> str:
        """Return the prompt of every text that the arguments of `encode` define."""
        if sum(argument is not None for argument in (instruction, prompt, prompt_name)) > 1:
            raise TypeError("encode: give one of instruction, prompt and prompt_name")
        for name, value in (("instruction", instruction), ("prompt", prompt), ("prompt_name", prompt_name)):
            if not isinstance(value, str | None):
                raise TypeError(f"encode: {name} is {quote_value(value)} ({type(value).__name__}); expected a string")
        if examples and not instruction:
            raise TypeError("encode: examples need an instruction")
        if prompt is not None:
            return prompt
        if prompt_name is not None:
            if prompt_name not in self.spec.prompts:
                names = ", ".join(self.spec.prompts) or "none"
                raise UserError(f"prompt_name: {prompt_name!r} is not stored with this model (stored: {names}).")
            return self.spec.prompts[prompt_name]
        if any(not isinstance(example, tuple) or len(example) != 2 for example in examples):
            raise TypeError("encode: examples must be pairs (query, response)")
        full_prompt = self.spec.build_prompt(instruction, [FewShotExample(instruction or "", *example) for example in examples])
        if examples and self.tokenizer.max_text_tokens([full_prompt])[0] < 1:
            tokens, limit = int(self.tokenizer.count_untruncated_tokens([""], [full_prompt])[0]), self.spec.max_length
            raise UserError(
                f"examples: no room for a text (instruction and {len(examples)} examples take {tokens} of {limit} tokens). "
                "Give fewer or shorter examples."
            )
        return full_prompt

    def _encode_window(self, texts: list[str], prompt: str, long_texts: str) -> np.ndarray:
        """Return vectors [N, D]. Long texts are truncated, or encoded in pieces whose vectors are combined."""
        assert self._apply is not None
        if long_texts == "cut":
            return self.apply_to_texts(texts, [prompt] * len(texts), self._apply)
        text_pieces = self.tokenizer.split_texts(texts, prompt)
        starts, pieces = np.cumsum([0, *map(len, text_pieces[:-1])]), list(chain.from_iterable(text_pieces))
        vectors = self.apply_to_texts(pieces, [prompt] * len(pieces), self._apply)
        return np.asarray(COMBINE_PIECES[long_texts].reduceat(vectors, starts, axis=0))

    def apply_to_texts(
        self, texts: Sequence[str], prompts: Sequence[str], apply: Apply, few_shapes: bool = False
    ) -> np.ndarray:
        """Apply a program to packed texts, in batches of rows.

        Args:
            texts: N texts.
            prompts: The prompt of each.
            apply: The program, which returns [R, S, ...]. `stack_layers` converts its parameters to those of the model.
            few_shapes: Use one long row per call, so that the program is compiled for few shapes.

        Returns:
            Results, float32 [N, ...], in the order of `texts`.
        """
        tokenized = self.tokenizer(texts, prompts)
        lengths = np.array([len(ids) for ids in tokenized.ids], np.int64)
        shards, sharding = count_shards(self.mesh), make_batch_sharding(self.mesh)
        rows_per_call = (lambda _: shards) if few_shapes else functools.partial(_count_rows_per_call, shards)
        min_row_length = LONG_ROW_LENGTH if few_shapes else MIN_ROW_LENGTH
        # Start all programs before the first result is read, so that the devices do not wait.
        pending = []
        for indices, (row, segment, row_count), row_length in pack_by_length(lengths, min_row_length, rows_per_call):
            segments = compute_max_segments(row_length)
            for first, last, padded in split_rows(row_count, rows_per_call(row_length), shards):
                selected = np.flatnonzero((row >= first) & (row < last))
                members, call_row, call_segment = indices[selected], row[selected] - first, segment[selected]
                ids = [tokenized.ids[i] for i in members]
                arrays = fill_rows(ids, tokenized.pool_start[members], call_row, call_segment, (padded, row_length))
                packed = put_global(sharding, PackedTexts(**arrays, segments=segments, shards=shards))
                with jax.set_mesh(self.mesh):
                    results = apply(self._program_params, packed)
                pending.append((members, call_row * segments + call_segment, results))
        # Put the results in the order of the texts.
        out = np.zeros((len(texts), *pending[0][2].shape[2:]), np.float32)
        for members, slots, results in pending:
            out[members] = np.asarray(to_host(results), np.float32).reshape(-1, *out.shape[1:])[slots]
        return out

    @functools.cached_property
    def _program_params(self) -> Any:
        """The parameters as arguments of programs.

        On a single CPU, each layer is a separate argument: XLA would otherwise copy it out of the stack in every program.
        """
        if self.mesh.size > 1 or not is_tuned(self.mesh.devices.flat[0].platform) or not self.model.compute.unroll:
            return self.params
        leaves, tree = jax.tree.flatten(self.params["decoder"]["layers"])
        unstacked_leaves = (unstack_views(self.mesh, x) for x in leaves)
        layers = [jax.tree.unflatten(tree, layer) for layer in zip(*unstacked_leaves, strict=True)]
        return replace_layers(self.params, layers)


@functools.lru_cache(maxsize=8)
def _compile_encoding_program(model: EmbeddingModel) -> Apply:
    """Return the compiled program of a model. Models that differ only in weights share it."""

    def apply(params: Any, texts: PackedTexts) -> jax.Array:
        return model.apply({"params": stack_layers(params)}, texts)

    return jax.jit(apply, compiler_options=get_compiler_options())


def build_embedder(run: RestoredRun, mesh: Mesh) -> Embedder:
    """Return the embedder of a restored run, with its adapters merged."""
    model, params = run.merge_adapters()
    return Embedder(model, params, run.build_tokenizer(), mesh, run.base.hf_config, run.revision, run.hash())


def load_embedder(base: Base, spec: EmbeddingSpec, compute: ComputeOptions, mesh: Mesh) -> Embedder:
    """Load the weights and the tokenizer of a base under a spec.

    Raises:
        UserError: The base lacks weights that the spec needs.
    """
    model = EmbeddingModel(base.transformer, spec, compute)
    shapes, shardings = compute_shapes_and_shardings(model, mesh)
    params = base.load(shapes, shardings)
    if missing := shapes.keys() - params.keys():
        part = f"{spec.pooling} pooling" if "pooling" in missing else "projection"
        raise UserError(f"{base.name}: has no weights for its {part}. Train it, or choose a model without that part.")
    tokenizer = build_text_tokenizer(base.tokenizer(), spec, base)
    weights_hash = base.hash()
    return Embedder(model, params, tokenizer, mesh, base.hf_config, weights_hash[:16], weights_hash)


def _count_rows_per_call(shards: int, row_length: int) -> int:
    """Return the number of rows of a length per program call, on all shards together."""
    tokens = ENCODE_TOKENS_PER_CALL if is_tuned(jax.default_backend()) else TOKENS_PER_CALL
    return max(1, tokens // row_length) * shards
