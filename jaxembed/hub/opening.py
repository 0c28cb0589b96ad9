"""From a base folder or a run directory to shapes, parameters and tokenizer: what `Embedder.load` and training open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxembed import parallel
from jaxembed.data.tokenize import TextTokenizer, append_eos, load_tokenizer
from jaxembed.errors import UserError
from jaxembed.fields import Fields
from jaxembed.files import read_json
from jaxembed.hub.base import Base, content_hash, find_base, read_spec
from jaxembed.hub.peft import read_adapters
from jaxembed.hub.weights import load_params
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.lora import TARGETS, LoRA, join, merge, split
from jaxembed.model.presets import from_hf
from jaxembed.spec import EmbeddingSpec
from jaxembed.training.checkpoint import Checkpoints, pick_step
from jaxembed.training.run_dir import kept


def base_params(base: Base, shapes: Any, shardings: Any) -> dict[str, Any]:
    """The parameters of those parts of a model (decoder, pooling, projection) that its base has weights of."""
    assert base.folder is not None
    params = load_params(base.folder, base.decoder.layers, shapes, shardings)
    for folder in base.adapters:
        lora, adapters = read_adapters(folder, base.decoder.layers)
        _check_adapters(folder, adapters, shapes)
        params = merge(join(adapters, params), lora)
    if base.adapters:  # the products were not told where to lie
        places = flatten_dict(shardings)
        params = jax.device_put(params, unflatten_dict({path: places[path] for path in flatten_dict(params)}))
    return dict(params)


def _check_adapters(folder: Path, adapters: Any, shapes: Any) -> None:
    """`UserError` where adapters do not fit the kernels they are for."""
    flat, ours = flatten_dict(adapters), flatten_dict(shapes)
    for path, a in flat.items():
        if path[-1] == "lora_a":
            inward, outward = a.shape[-2], flat[*path[:-1], "lora_b"].shape[-1]
            kernel = ours[*path[:-1], "kernel"].shape[-2:]
            if (inward, outward) != kernel:
                told = f"{'/'.join(path[1:-1])} from {inward} to {outward}; expected {kernel[0]} to {kernel[1]}"
                raise UserError(f"{folder}: the adapters do not fit the base: {told}")


def _recorded_lora(record: Fields, where: str) -> LoRA | None:
    """The adapters of a run, as its base.json tells of them."""
    values = record.mapping("lora", {})
    if not values:
        return None
    fields = Fields(values, f"{where}: lora")
    targets = values.get("targets")
    if not isinstance(targets, list) or not targets or any(target not in TARGETS for target in targets):
        raise UserError(f"{where}: lora.targets must be a list of some of {', '.join(TARGETS)}")
    return LoRA(fields.whole("rank", most=2**14), fields.number("alpha"), targets=tuple(targets))


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
    return TextTokenizer(
        tokenizer,
        spec.max_length,
        eos_as_text=spec.eos_as_text,
        pool_last_instruction_token=spec.pool_last_instruction_token,
        pool_text_tokens=spec.pool_text_tokens,
        echo=spec.echo,
        plain_echo=spec.plain_echo,
        suffix=spec.query_suffix,
        text_length=spec.text_length,
    )


def shapes_and_shardings(model: EmbeddingModel, mesh: Mesh) -> tuple[Any, Any]:
    """Trees of ShapeDtypeStructs and of shardings of a model's parameters."""
    boxed = parameter_shapes(model)
    return nn.unbox(boxed), parallel.param_shardings(mesh, nn.get_partition_spec(boxed))


@dataclasses.dataclass(frozen=True)
class RunParts:
    """What a run directory holds of a model: its trained parameters, under `model`, which has the run's adapters."""

    base: Base
    model: EmbeddingModel
    trained: Any
    frozen: Any
    tokenizer: TextTokenizer
    revision: str

    @property
    def merged(self) -> tuple[EmbeddingModel, Any]:
        """The model without adapters, and its parameters."""
        whole, lora = join(self.trained, self.frozen), self.model.lora
        return (self.model, whole) if lora is None else (self.model.clone(lora=None), merge(whole, lora))


def open_trained(run_dir: Path, compute: Compute, mesh: Mesh, checkpoint: str) -> RunParts:
    """A step of a run; the base under its adapters is read from where the run found it. `UserError` if it is not there."""
    where = str(run_dir / "base.json")
    record = Fields(kept(read_json, run_dir / "base.json", "train anew"), where)
    config = record.mapping("config")
    decoder = from_hf(config, f"{where}: config")
    base = Base(record.text("name"), run_dir / "tokenizer", config, decoder, read_spec(str(run_dir), run_dir, config, decoder))
    lora = _recorded_lora(record, where)
    model = EmbeddingModel(decoder, base.spec, compute, lora)
    shapes, shardings = shapes_and_shardings(model, mesh)
    placed = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
    checkpoints = Checkpoints(run_dir)
    step = pick_step(checkpoints, checkpoint, run_dir)
    trained = checkpoints.restore_params(step, split(placed)[0])
    checkpoints.close()
    frozen = {} if lora is None else _frozen(record, shapes, shardings)
    tokenizer = text_tokenizer(load_tokenizer(run_dir / "tokenizer"), base.spec, base)
    return RunParts(base, model, trained, frozen, tokenizer, f"{run_dir.resolve().name}-{step}")
