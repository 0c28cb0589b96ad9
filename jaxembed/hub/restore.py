"""Restore the model that a run trained from one of its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.config import LoraConfig, read_run_config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError
from jaxembed.files import read_bytes
from jaxembed.formats.checkpoints import CheckpointReader, compute_params_digest
from jaxembed.formats.run_files import BASE_RECORD_FILE, TOKENIZER_FOLDER, read_run_file
from jaxembed.formats.weights import LowRankUpdate, place_params, to_tensors
from jaxembed.hub.base import Base, BaseWithWeights, add_weight_files
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import FROZEN_PARTS, join_params, merge_adapters, pick_adapter, split_params, stack_shapes
from jaxembed.model.parameters import attach_shardings, compute_shapes_and_shardings
from jaxembed.model.transformer import ComputeOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBase(BaseWithWeights):
    """The model of an earlier run at one of its checkpoints.

    Attributes:
        run_dir: Run directory.
        step: Step of the checkpoint.
        trained_from: Name of the base that the run started from.
        trained_spec: Spec of the run. `spec` differs from it if adapters with their own spec are added.
        lora: Adapters of the run, or None if it trained all parameters.
        has_head: Whether the run has an untied language-model head.
        merged_adapters: PEFT folders of adapters that the run has merged into its base, before those of `step`.
        find_frozen_base: Finds the base under the run's adapters. It is called when weights are loaded, so that the tokenizer
            can be read without that base.
    """

    run_dir: Path
    step: int
    trained_from: str
    trained_spec: EmbeddingSpec
    lora: LoraConfig | None
    has_head: bool
    merged_adapters: tuple[Path, ...]
    find_frozen_base: Callable[[], Base]

    def restore(self, compute: ComputeOptions, mesh: Mesh, base_dtype: str | None = None) -> RestoredRun:
        """Restore the model onto a mesh.

        Args:
            compute: How the model computes.
            mesh: The devices.
            base_dtype: Storage dtype of the base under the run's adapters. Default: the run's.

        Raises:
            UserError: The checkpoint is damaged, or the base under the adapters is missing or has changed.
        """
        lora = self.lora
        if lora is not None and base_dtype is not None:
            lora = lora.replace(base_dtype=base_dtype)
        model = EmbeddingModel(self.transformer, self.trained_spec, compute, lora, self.has_head)
        shapes, shardings = compute_shapes_and_shardings(model, mesh)
        trained_params = self._restore_trained(model, shapes, shardings)
        frozen = {}
        if lora is not None:
            parts = shapes.keys() & FROZEN_PARTS
            frozen = self.find_frozen_base().load(*({part: tree[part] for part in parts} for tree in (shapes, shardings)))
        return RestoredRun(self, model, trained_params, frozen, f"{self.run_dir.resolve().name}-{self.step}")

    def _restore_trained(self, model: EmbeddingModel, shapes: Any, shardings: Any) -> Any:
        trained, _ = split_params(attach_shardings(shapes, shardings))
        if model.adapters:
            trained = stack_shapes(trained, len(model.adapters))
        checkpoints = CheckpointReader(self.run_dir)
        try:
            return checkpoints.restore_params(self.step, trained)
        finally:
            checkpoints.close()

    def has_untied_head(self) -> bool:
        """Return whether the run has trained, or kept, such a head."""
        return self.has_head

    @property
    def _tokenizer_folder(self) -> Path:
        return self.run_dir / TOKENIZER_FOLDER

    def _add_weights(self, digest: Any) -> None:
        digest.update(read_bytes(self.run_dir / BASE_RECORD_FILE))  # it contains the hash of the base under the adapters
        digest.update(compute_params_digest(self.run_dir, self.step).encode())
        for folder in self.merged_adapters:
            add_weight_files(digest, folder)

    def _load_weights(self, shapes: Any, shardings: Any, updates: Mapping[str, LowRankUpdate]) -> Mapping[str, Any]:
        mesh = jax.tree.leaves(shardings)[0].mesh
        _, params = self.restore(ComputeOptions(), mesh).select_adapter(None).merge_adapters()
        error_prefix = f"{self.run_dir}: its weights do not fit the requested model"
        tensors = to_tensors(params, self.transformer.family)
        return dict(place_params(tensors, error_prefix, self.transformer, shapes, shardings, updates))


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """The model of a run, restored from a checkpoint.

    Attributes:
        base: The run.
        model: The model with the run's adapters.
        trained: Trained parameters. Named adapters are stacked along a first axis until `select_adapter` picks one.
        frozen: Parameters of the base under the adapters; {} if the run trained all parameters.
        revision: Name of the weights: run directory, step, and adapter.
        adapter: Name of the adapter that was selected, or None.
    """

    base: RunBase
    model: EmbeddingModel
    trained: Any
    frozen: Any
    revision: str
    adapter: str | None = None

    def hash(self) -> str:
        """Return what identifies the weights: the hash of the run at its step, and the name of the selected adapter."""
        return "-".join(filter(None, (self.base.hash(), self.adapter)))

    def select_adapter(self, adapter: str | None) -> RestoredRun:
        """Return the model with one adapter, and with the prompts of the sources that trained it.

        Args:
            adapter: Name of the adapter. None for a run without named adapters, or with a single one.

        Raises:
            UserError: The run has no such adapter, or has several and none is chosen.
        """
        lora, names, run_dir = self.model.lora, self.model.adapters, self.base.run_dir
        name = names[0] if adapter is None and len(names) == 1 else adapter
        if lora is None or not names:
            if name is None:
                return self
            raise UserError(f"{run_dir}: no adapter {name!r} (the run was trained without model.lora.names). Omit the adapter.")
        if name not in names:
            problem = "has several adapters" if name is None else f"no adapter {name!r}"
            raise UserError(f"{run_dir}: {problem} ({', '.join(names)}). Choose one with --adapter (adapter=...).")
        config = read_run_file(read_run_config, run_dir / "config.yaml", "train again")
        spec = self.model.spec.replace(prompts={}).add_source_prompts(config.data.collect_first_instructions(name))
        return dataclasses.replace(
            self,
            model=self.model.clone(spec=spec, lora=lora.replace(names=())),
            trained=pick_adapter(self.trained, names.index(name)),
            revision=f"{self.revision}-{name}",
            adapter=name,
        )

    def merge_adapters(self) -> tuple[EmbeddingModel, Any]:
        """Return the model without adapters and its parameters, with the adapters merged into the kernels."""
        params, lora = join_params(self.trained, self.frozen), self.model.lora
        return (self.model, params) if lora is None else (self.model.clone(lora=None), merge_adapters(params, lora))

    def build_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer of the model."""
        return build_text_tokenizer(self.base.tokenizer(), self.model.spec, self.base)
