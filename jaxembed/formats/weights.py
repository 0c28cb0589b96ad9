"""Hugging Face safetensors <-> our parameter tree, by one table read both ways.

Linear weights are [out, in] there and [in, out] here; the tensors of all layers are stacked on a leading axis here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxembed.config.fields import Fields
from jaxembed.devices.placement import aligned_empty, put_global, put_local_parts, to_host
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json
from jaxembed.formats.sentence_transformers import projection_weights
from jaxembed.model.quantization import quantize


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path in our tree, its name there ({i} where stacked), whether it is transposed."""

    ours: str
    theirs: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs


def _linear(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", True), Entry(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


LAYERS, BLOCKS = "decoder/layers", "pooling.cross_attend_blocks"
TABLE: tuple[Entry, ...] = (
    Entry("decoder/embedding", "embed_tokens.weight"),
    *_linear(f"{LAYERS}/attention/q", "layers.{i}.self_attn.q_proj"),
    *_linear(f"{LAYERS}/attention/k", "layers.{i}.self_attn.k_proj"),
    *_linear(f"{LAYERS}/attention/v", "layers.{i}.self_attn.v_proj"),
    *_linear(f"{LAYERS}/attention/out", "layers.{i}.self_attn.o_proj"),
    Entry(f"{LAYERS}/attention/q_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
    Entry(f"{LAYERS}/attention/k_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
    *_linear(f"{LAYERS}/mlp/gate", "layers.{i}.mlp.gate_proj"),
    *_linear(f"{LAYERS}/mlp/up", "layers.{i}.mlp.up_proj"),
    *_linear(f"{LAYERS}/mlp/down", "layers.{i}.mlp.down_proj"),
    Entry(f"{LAYERS}/attention_norm/scale", "layers.{i}.input_layernorm.weight"),
    Entry(f"{LAYERS}/mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    Entry("decoder/norm/scale", "norm.weight"),
    # The poolings that have weights, under the names of NV-Embed's release.
    Entry("pooling/latents", "pooling.latents"),
    *_norm("pooling/latent_norm", f"{BLOCKS}.0.norm_context"),
    *_norm("pooling/attention_norm", f"{BLOCKS}.0.norm"),
    *_linear("pooling/attention/q", f"{BLOCKS}.0.fn.to_q"),
    *_linear("pooling/attention/kv", f"{BLOCKS}.0.fn.to_kv"),
    *_linear("pooling/attention/out", f"{BLOCKS}.0.fn.to_out"),
    *_norm("pooling/mlp_norm", f"{BLOCKS}.1.norm"),
    *_linear("pooling/mlp/in", f"{BLOCKS}.1.fn.net.0"),
    *_linear("pooling/mlp/out", f"{BLOCKS}.1.fn.net.2"),
    *_linear("pooling/mlp_in", "pooling.mlp.0"),
    *_linear("pooling/mlp_out", "pooling.mlp.2"),
    *_linear("projection", "projection.linear"),
)
POOLING_FOLDER = "1_TokenPooling"  # of an exported folder; its file's names go without "pooling."
# What names in published files begin with -> what they begin with in the table.
PREFIXES = {"model.": "", "embedding_model.": "", "latent_attention_model.": "pooling."}


FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the types of weights that are not quantised


def _ignored(name: str) -> bool:
    """Tensors of checkpoints that an embedding model has no use for: the language-model head, old RoPE buffers."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name, as the table spells it -> a lazy slice of the (possibly sharded) safetensors files."""
    files = [(path, "") for path in _files(folder)]
    files += [(path, f"{part}.") for part, path in part_files(folder).items()]
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path, prefix in files:
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                tensors |= {prefix + _bare(name): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        yield tensors


def part_files(folder: Path) -> dict[str, Path]:
    """The weights of those parts that have a file of their own in a folder; `UserError` where one is not there."""
    pooling = folder / POOLING_FOLDER
    files = {
        "pooling": pooling / "model.safetensors" if exists(pooling) else None,
        "projection": projection_weights(folder),
    }
    found = {part: path for part, path in files.items() if path is not None}
    for part, path in found.items():
        if not exists(path):
            raise UserError(f"{path}: no such file; expected the weights of the model's {part} as safetensors")
    return found


def _part(name: str) -> str:
    """The part of a model that a tensor belongs to, by its name in the table."""
    first = name.partition(".")[0]
    return first if first in ("pooling", "projection") else "decoder"


def _bare(name: str) -> str:
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    paths = [folder / "model.safetensors"]
    if exists(index):
        try:
            names = Fields(read_json(index), str(index)).texts("weight_map").values()
        except UserError as error:
            raise UserError(f"{error}; not a weight index, fetch it again") from None
        paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        if not exists(path):
            raise UserError(f"{path}: no such file; expected the model's weights as safetensors in {folder}")
    return paths


def load_params(
    folder: Path, layers: int, shapes: Any, shardings: Any, updates: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
) -> Any:
    """Parameters from the safetensors files of `folder`, in the dtypes of `shapes`: float32, bfloat16, or int8 with scales.

    They are those of the decoder, and of what else the files hold. `shapes` and `shardings` are trees of the parts that are
    wanted: decoder, pooling, projection. Tensors stream through the host one parameter at a time, largest first, so that the
    peak stays near the size of the result; they are rounded there. A process reads what its own devices hold, of parameters
    that are updated or become int8 all. `updates` are low-rank ones of kernels, by path:
    ([L, in, rank], [L, rank, out]), whose product is added before that. One `UserError` names every missing, unexpected and
    misshapen tensor.
    """
    with open_tensors(folder) as tensors:
        return place_params(tensors, f"{folder}: the weights do not fit config.json", layers, shapes, shardings, updates)


def place_params(
    tensors: Mapping[str, Any],
    told: str,
    layers: int,
    shapes: Any,
    shardings: Any,
    updates: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Any:
    """As `load_params`, out of slices by the table's names; `told` begins the `UserError` where they do not fit."""
    tensors = {name: tensor for name, tensor in tensors.items() if _part(name) in shapes}
    parts = shapes.keys() & {"decoder", *map(_part, tensors)}
    flat_shapes, flat_shardings = (flatten_dict({part: tree[part] for part in parts}, sep="/") for tree in (shapes, shardings))
    wanted = sorted((e for e in TABLE if e.ours in flat_shapes), key=lambda e: -flat_shapes[e.ours].size)
    _check(told, tensors, wanted, {e: flat_shapes[e.ours].shape for e in wanted}, layers)
    loaded: dict[str, jax.Array] = {}
    for entry in wanted:
        shape, update = flat_shapes[entry.ours], (updates or {}).get(entry.ours)
        if shape.dtype == np.int8:
            paths = entry.ours, f"{entry.ours}_scale"
            for path, host in zip(paths, _read_int8(entry, tensors, shape.shape, update), strict=True):
                loaded[path] = _placed(host, flat_shardings[path])
        elif update is not None:
            host = _read(entry, tensors, shape.dtype, _whole(shape.shape), update)
            loaded[entry.ours] = _placed(host, flat_shardings[entry.ours])
        else:
            read = functools.partial(_read, entry, tensors, shape.dtype)
            loaded[entry.ours] = put_local_parts(flat_shardings[entry.ours], shape.shape, read)
        jax.block_until_ready(loaded)
    return unflatten_dict(loaded, sep="/")


def _placed(x: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=True)
    return put_global(sharding, x)


def _check(
    told: str, tensors: Mapping[str, Any], wanted: list[Entry], shapes: Mapping[Entry, tuple[int, ...]], layers: int
) -> None:
    expected = {e.theirs.format(i=i): _their_shape(e, shapes[e]) for e in wanted for i in range(layers if e.stacked else 1)}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not _ignored(name)]
    misshapen = [
        f"{name} {tuple(tensors[name].get_shape())} (expected {shape})"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].get_shape()) != shape
    ]
    mistyped = [
        f"{name} {tensors[name].get_dtype()} (expected one of {', '.join(FLOATS)})"
        for name in expected
        if name in tensors and tensors[name].get_dtype() not in FLOATS
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "mistyped": mistyped}
    found = [f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{told}; {'; '.join(found)}")


def _shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[1:] if entry.stacked else shape
    return one[::-1] if entry.transposed else one


def _read(
    entry: Entry,
    tensors: Mapping[str, Any],
    dtype: Any,
    index: tuple[slice, ...],
    update: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The part of a parameter at `index`, with an update that is added to the whole of it."""
    held = aligned_empty(tuple(one.stop - one.start for one in index), dtype)
    layers, rest = (range(index[0].start, index[0].stop), index[1:]) if entry.stacked else (range(1), index)
    for i, part in zip(layers, held if entry.stacked else [held], strict=True):
        one = part if part.dtype == np.float32 else np.empty(part.shape, np.float32)
        _read_one(entry, tensors, i, rest, one, update)
        if one is not part:
            part[...] = one
    return held


def _read_int8(
    entry: Entry, tensors: Mapping[str, Any], shape: tuple[int, ...], update: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """A stacked kernel rounded to int8, and its scales."""
    held, scales = aligned_empty(shape, np.int8), []
    for i, part in enumerate(held):
        one = np.empty(part.shape, np.float32)
        _read_one(entry, tensors, i, _whole(part.shape), one, update)
        part[...], scale = quantize(one)
        scales.append(scale)
    return held, np.stack(scales)


def _read_one(
    entry: Entry,
    tensors: Mapping[str, Any],
    i: int,
    index: tuple[slice, ...],
    into: np.ndarray,
    update: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Copies what lies at `index` of a tensor, that of layer i where there are several, and adds the layer's update."""
    tensor = tensors[entry.theirs.format(i=i)]
    if entry.transposed:
        _copy_rows(tensor, index[::-1], into.T)
    else:
        _copy_rows(tensor, index, into)
    if update is not None:
        into += update[0][i] @ update[1][i]


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _copy_rows(source: Any, index: tuple[slice, ...], into: np.ndarray, numbers_at_once: int = 1 << 24) -> None:
    """Copies a part of a lazy tensor into a float32 array, a block of rows at a time: there is never a second copy of it."""
    block = max(1, numbers_at_once // max(1, into[0].size))
    first = index[0].start
    for start in range(0, into.shape[0], block):
        stop = min(start + block, into.shape[0])
        into[start:stop] = source[slice(first + start, first + stop), *index[1:]]


@dataclasses.dataclass(frozen=True)
class Slice:
    """A float32 tensor in memory, read as a lazy slice of a safetensors file is."""

    values: np.ndarray

    def get_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.values[index]


def slices_of(params: Any) -> dict[str, Slice]:
    """Float32 parameters of a model, as `open_tensors` gives those of files."""
    return {name: Slice(tensor) for name, tensor in _published(params)}


def _published(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as published files hold them, one layer at a time: the table's name of each, and a view of it."""
    flat = flatten_dict(params, sep="/")
    for entry in (entry for entry in TABLE if entry.ours in flat):
        host = to_host(flat[entry.ours])
        for i, one in enumerate(host if entry.stacked else [host]):
            yield entry.theirs.format(i=i), one.T if entry.transposed else one


def save_params(path: Path, params: Any, prefixes: Mapping[str, str], convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """Writes parts of a model (decoder, pooling, projection) to a safetensors file, each tensor passed through `convert`.

    `prefixes` are what the names of a part begin with there.
    """
    tensors = {
        prefix + name.removeprefix(f"{part}."): np.ascontiguousarray(convert(tensor))
        for part, prefix in prefixes.items()
        for name, tensor in _published({part: params[part]})
    }
    save_file(tensors, path, metadata={"format": "pt"})
