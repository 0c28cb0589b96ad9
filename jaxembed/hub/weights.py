"""Hugging Face safetensors <-> our parameter tree, by one table read both ways.

Linear weights are [out, in] there and [in, out] here; the tensors of all layers are stacked on a leading axis here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxembed.errors import UserError
from jaxembed.fields import Fields
from jaxembed.files import exists, read_json
from jaxembed.model.presets import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path under `decoder`, its Hugging Face name ({i} where stacked), whether it is transposed."""

    ours: str
    theirs: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs


def _linear(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", True), Entry(f"{ours}/bias", f"{theirs}.bias")


TABLE: tuple[Entry, ...] = (
    Entry("embedding", "embed_tokens.weight"),
    *_linear("layers/attention/q", "layers.{i}.self_attn.q_proj"),
    *_linear("layers/attention/k", "layers.{i}.self_attn.k_proj"),
    *_linear("layers/attention/v", "layers.{i}.self_attn.v_proj"),
    *_linear("layers/attention/out", "layers.{i}.self_attn.o_proj"),
    Entry("layers/attention/q_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
    Entry("layers/attention/k_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
    *_linear("layers/mlp/gate", "layers.{i}.mlp.gate_proj"),
    *_linear("layers/mlp/up", "layers.{i}.mlp.up_proj"),
    *_linear("layers/mlp/down", "layers.{i}.mlp.down_proj"),
    Entry("layers/attention_norm/scale", "layers.{i}.input_layernorm.weight"),
    Entry("layers/mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    Entry("norm/scale", "norm.weight"),
)


FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the types of weights that are not quantised


def _ignored(name: str) -> bool:
    """Tensors of checkpoints that an embedding model has no use for: the language-model head, old RoPE buffers."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name, without the `model.` prefix -> a lazy slice of the (possibly sharded) safetensors files."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                tensors |= {name.removeprefix("model."): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        yield tensors


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


def load_params(folder: Path, config: DecoderConfig, shapes: Any, shardings: Any) -> Any:
    """The decoder's parameters in float32, from the safetensors files of `folder`.

    `shapes` and `shardings` are trees of the decoder's parameters. Tensors stream through the host one parameter at a
    time, largest first, so that the peak stays near the size of the result. One `UserError` names every missing,
    unexpected and misshapen tensor.
    """
    flat_shapes, flat_shardings = (flatten_dict(tree, sep="/") for tree in (shapes, shardings))
    wanted = sorted((e for e in TABLE if e.ours in flat_shapes), key=lambda e: -flat_shapes[e.ours].size)
    with open_tensors(folder) as tensors:
        _check(folder, tensors, wanted, {e: flat_shapes[e.ours].shape for e in wanted}, config.layers)
        loaded = {e.ours: _load(e, tensors, flat_shapes[e.ours].shape, flat_shardings[e.ours]) for e in wanted}
    return unflatten_dict(loaded, sep="/")


def _check(
    folder: Path, tensors: Mapping[str, Any], wanted: list[Entry], shapes: Mapping[Entry, tuple[int, ...]], layers: int
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
    told = [f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"{folder}: the weights do not fit config.json; {'; '.join(told)}")


def _shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[1:] if entry.stacked else shape
    return one[::-1] if entry.transposed else one


def _load(entry: Entry, tensors: Mapping[str, Any], shape: tuple[int, ...], sharding: Any) -> jax.Array:
    host = _aligned_empty(shape)
    for i, part in enumerate(host if entry.stacked else [host]):
        into = part.T if entry.transposed else part
        _copy_rows(tensors[entry.theirs.format(i=i)], into)
    return jax.block_until_ready(jax.device_put(host, sharding, may_alias=True))


def _copy_rows(source: Any, into: np.ndarray, numbers_at_once: int = 1 << 24) -> None:
    """Copies a lazy tensor into a float32 array a block of rows at a time, so that no second whole copy exists."""
    block = max(1, numbers_at_once // max(1, into[0].size))
    for start in range(0, into.shape[0], block):
        stop = min(start + block, into.shape[0])
        into[start:stop] = source[start:stop]


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array on a 64-byte boundary, which the CPU backend takes without another copy."""
    size = int(np.prod(shape))
    raw = np.empty(size + 16, np.float32)
    skip = (-raw.ctypes.data % 64) // 4
    return raw[skip : skip + size].reshape(shape)


def save_params(path: Path, params: Any, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """Writes the decoder's parameters to one safetensors file under Hugging Face names, each passed through `convert`."""
    flat = flatten_dict(params, sep="/")
    tensors = {}
    for entry in TABLE:
        if entry.ours not in flat:
            continue
        host = np.asarray(flat[entry.ours])
        for i, part in enumerate(host if entry.stacked else [host]):
            tensors[entry.theirs.format(i=i)] = np.ascontiguousarray(convert(part.T if entry.transposed else part))
    save_file(tensors, path, metadata={"format": "pt"})
