"""From a base folder or a run directory to shapes, parameters and tokenizer: what `Embedder.load` and training open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxembed.config import parse_config, read_run_tree
from jaxembed.config.fields import Fields
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import TextTokenizer, append_eos, load_tokenizer
from jaxembed.devices.mesh import logical_axis_table, param_shardings
from jaxembed.errors import UserError
from jaxembed.formats.peft import read_adapters
from jaxembed.formats.weights import load_params, place_params, to_tensors
from jaxembed.hub.base import Base, content_hash, find_base, recorded_lora, run_base
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.lora import join, merge, pick_adapter, split, stacked_shapes
from jaxembed.training.checkpoint import Checkpoints, pick_step
from jaxembed.training.run_dir import read_run_file


def base_params(base: Base, shapes: Any, shardings: Any) -> dict[str, Any]:
    """The parameters of those parts of a model (decoder, pooling, projection) that its base has weights of."""
    assert base.folder is not None
    layers, updates = base.decoder.layers, _updates(base, shapes)
    if base.run is None:
        return dict(load_params(base.folder, layers, shapes, shardings, updates))
    run_dir, step = base.run
    mesh, told = jax.tree.leaves(shardings)[0].mesh, f"{run_dir}: its weights do not fit the model that is asked for"
    _, params = open_trained(run_dir, Compute(), mesh, str(step)).of(None).merged
    return dict(place_params(to_tensors(params), told, layers, shapes, shardings, updates))


def _updates(base: Base, shapes: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of what a base's PEFT folders add to kernels, by path; `UserError` where they do not fit them."""
    ours = flatten_dict(shapes)
    updates: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for folder in base.adapters:
        lora, adapters = read_adapters(folder, base.decoder.layers)
        flat = flatten_dict(adapters)
        for path in (path[:-1] for path in flat if path[-1] == "lora_a"):
            a, b, name = flat[*path, "lora_a"], np.float32(lora.scale) * flat[*path, "lora_b"], "/".join((*path, "kernel"))
            given, kernel = (a.shape[-2], b.shape[-1]), ours[*path, "kernel"].shape[-2:]
            if given != kernel:
                told = f"{'/'.join(path[1:])} from {given[0]} to {given[1]}; expected {kernel[0]} to {kernel[1]}"
                raise UserError(f"{folder}: the adapters do not fit the base: {told}")
            if name in updates:  # a sum of products is the product of the factors side by side
                before_a, before_b = updates[name]
                a, b = np.concatenate((before_a, a), axis=-1), np.concatenate((before_b, b), axis=-2)
            updates[name] = (a, b)
    return updates


def _frozen(record: Fields, shapes: Any, shardings: Any) -> Any:
    """The base's parameters under a run's adapters; `UserError` where the base is gone or is another one."""
    name = record.text("name")
    try:
        base = find_base(name)
    except UserError as error:
        raise UserError(f"{error}; the run holds adapters only and needs its base: put it back there") from None
    if content_hash(base) != record.text("hash"):
        raise UserError(f"{name}: not the base that the run's adapters were trained on (its hash differs); put that back")
    return base_params(base, {"decoder": shapes["decoder"]}, {"decoder": shardings["decoder"]})


def text_tokenizer(tokenizer: Any, spec: EmbeddingSpec, base: Base) -> TextTokenizer:
    """The tokenizer as `spec` wants it; `UserError` where it does not fit the base."""
    if len(tokenizer) > base.decoder.vocab_size:
        raise UserError(
            f"{base.name}: the tokenizer has {len(tokenizer)} entries, the embedding {base.decoder.vocab_size}; "
            "use the tokenizer that belongs to the weights"
        )
    if spec.max_length > base.decoder.max_positions:
        raise UserError(
            f"data.max_length is {spec.max_length}, but {base.name} has {base.decoder.max_positions} positions; lower it"
        )
    if spec.append_eos:
        append_eos(tokenizer)
    if spec.eos_as_text and tokenizer.eos_token is None:
        raise UserError(f"{base.name}: texts are to end with EOS, but the tokenizer has no EOS token")
    special = tokenizer.num_special_tokens_to_add()
    if spec.max_length <= special:
        raise UserError(f"data.max_length is {spec.max_length}, of which {special} are special tokens; raise it")
    if spec.echo and spec.include_instruction:
        raise UserError("model.echo pools the second copy of a text alone; set model.pooling.include_instruction=false")
    return TextTokenizer(tokenizer, spec)


def shapes_and_shardings(model: EmbeddingModel, mesh: Mesh) -> tuple[Any, Any]:
    """Trees of ShapeDtypeStructs and of shardings of a model's parameters; `UserError` where the mesh cannot split them."""
    boxed, table = parameter_shapes(model), logical_axis_table(mesh, model.decoder.axis_sizes)
    return nn.unbox(boxed), param_shardings(mesh, nn.get_partition_spec(boxed), table)


def placed_shapes(shapes: Any, shardings: Any) -> Any:
    """What `shapes_and_shardings` gives as one tree: ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


@dataclasses.dataclass(frozen=True)
class RunParts:
    """What a run directory holds of a model: its trained parameters, under `model`, which has the run's adapters.

    Several adapters are stacked in `trained` until `of` has chosen one.
    """

    run_dir: Path
    base: Base
    model: EmbeddingModel
    trained: Any
    frozen: Any
    tokenizer: TextTokenizer
    revision: str

    def of(self, adapter: str | None) -> RunParts:
        """The model of one adapter, with the prompts of its sources; `UserError` where that is not one of the run's.

        None where the run has no named ones, or one alone.
        """
        lora, names = self.model.lora, self.model.adapters
        name = names[0] if adapter is None and len(names) == 1 else adapter
        if lora is None or not names:
            if name is None:
                return self
            raise UserError(f"{self.run_dir}: has no adapter {name!r}, for it was trained without model.lora.names")
        if name not in names:
            came = "has several adapters" if name is None else f"has no adapter {name!r}"
            raise UserError(f"{self.run_dir}: {came}; choose one with --adapter (adapter=...): {', '.join(names)}")
        recorded = self.run_dir / "config.yaml"
        instructions = parse_config(read_run_file(read_run_tree, recorded, "train anew"), str(recorded)).data.instructions(name)
        spec = self.base.spec.replace(prompts={}).with_prompts(instructions)
        return dataclasses.replace(
            self,
            base=dataclasses.replace(self.base, spec=spec),
            model=self.model.clone(spec=spec, lora=dataclasses.replace(lora, names=())),
            trained=pick_adapter(self.trained, names.index(name)),
            revision=f"{self.revision}-{name}",
        )

    @property
    def merged(self) -> tuple[EmbeddingModel, Any]:
        """The model without adapters, and its parameters."""
        whole, lora = join(self.trained, self.frozen), self.model.lora
        return (self.model, whole) if lora is None else (self.model.clone(lora=None), merge(whole, lora))


def open_trained(run_dir: Path, compute: Compute, mesh: Mesh, checkpoint: str, base_dtype: str | None = None) -> RunParts:
    """A step of a run; the base under its adapters is read from where the run found it. `UserError` if it is not there.

    `base_dtype` holds that base otherwise than the run did.
    """
    base, record = run_base(run_dir)
    lora = recorded_lora(record, run_dir)
    if lora is not None and base_dtype is not None:
        lora = dataclasses.replace(lora, base_dtype=base_dtype)
    model = EmbeddingModel(base.decoder, base.spec, compute, lora)
    shapes, shardings = shapes_and_shardings(model, mesh)
    checkpoints = Checkpoints(run_dir)
    step = pick_step(checkpoints, checkpoint, run_dir)
    trained = split(placed_shapes(shapes, shardings))[0]
    if model.adapters:
        trained = stacked_shapes(trained, len(model.adapters))
    trained = checkpoints.restore_params(step, trained)
    checkpoints.close()
    frozen = {} if lora is None else _frozen(record, shapes, shardings)
    tokenizer = text_tokenizer(load_tokenizer(run_dir / "tokenizer"), base.spec, base)
    return RunParts(run_dir, base, model, trained, frozen, tokenizer, f"{run_dir.resolve().name}-{step}")
