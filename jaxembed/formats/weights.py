"""Read and write Hugging Face safetensors files with the conversion table in `weight_table`."""

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
from jaxembed.devices.placement import allocate_aligned, put_global, put_local_parts, to_host
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json
from jaxembed.formats.sentence_transformers import find_projection_weights
from jaxembed.formats.weight_table import TensorMapping, get_model_part, is_unused, list_tensor_mappings, to_table_name
from jaxembed.model.families import TransformerConfig
from jaxembed.model.quantization import quantize

LowRankUpdate = tuple[np.ndarray, np.ndarray]  # factors ([L, in, rank], [L, rank, out]) of an update of a stacked kernel
TensorIndex = tuple[slice, ...]  # one slice with start and stop per axis


POOLING_FOLDER = "1_TokenPooling"  # subfolder of an exported model; tensor names in its file lack "pooling."
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes of unquantized weights
MAX_LISTED_TENSORS = 6  # names that an error lists for each kind of problem
MAX_COPIED_ELEMENTS = 1 << 18  # elements that are read from a file at a time: they stay in a core's cache until converted


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Open a model's (possibly sharded) safetensors files and yield their tensors without reading them.

    Yields:
        Lazy slices of the files by the tensor names of the table.

    Raises:
        UserError: A file is missing or damaged, or two tensors have the same name.
    """
    files = [(path, "") for path in _find_weight_files(folder)]
    files += [(path, f"{part}.") for part, path in find_part_files(folder).items()]
    tensors: dict[str, Any] = {}
    duplicates: list[str] = []
    with contextlib.ExitStack() as stack:
        for path, prefix in files:
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                for name in file.keys():  # noqa: SIM118  (safe_open is not iterable)
                    table_name = prefix + to_table_name(name)
                    if table_name in tensors and not is_unused(table_name):
                        duplicates.append(f"{name} in {path.name}")
                    tensors[table_name] = file.get_slice(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a complete safetensors file ({error}). Download it again.") from None
        if duplicates:
            raise UserError(f"{folder}: duplicate tensors ({_format_names(duplicates)}). Keep one copy of each tensor.")
        yield tensors


def find_part_files(folder: Path) -> dict[str, Path]:
    """Return the weight files besides those of the transformer, by the start of their tensor names: pooling and projections.

    Raises:
        UserError: The folder names such a file and it does not exist.
    """
    pooling = folder / POOLING_FOLDER
    paths = {"pooling": pooling / "model.safetensors"} if exists(pooling) else {}
    projections = find_projection_weights(folder)
    paths |= {f"projection.hidden_{i}": path for i, path in enumerate(projections[:-1])}
    if projections:
        paths["projection"] = projections[-1]
    for part, path in paths.items():
        if not exists(path):
            raise UserError(
                f"{path}: no such file (expected the weights of the {part.partition('.')[0]}). Save them as safetensors."
            )
    return paths


def _find_weight_files(folder: Path) -> list[Path]:
    """Return the files of the model's main weights, as transformers does: model.safetensors, otherwise the index's shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if exists(single) or not exists(index):
        paths = [single]
    else:
        try:
            names = Fields(read_json(index), str(index)).strings("weight_map").values()
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}. Download this index of the weight files again.") from None
        paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        if not exists(path):
            raise UserError(f"{path}: no such file (expected the weights of the model). Save them as safetensors in {folder}.")
    return paths


def load_params(
    folder: Path,
    transformer: TransformerConfig,
    shapes: Any,
    shardings: Any,
    updates: Mapping[str, LowRankUpdate] | None = None,
) -> Any:
    """Load parameters from the safetensors files of `folder` onto the devices.

    Tensors stream through the host one parameter at a time, largest first, so that the peak stays near the size of the
    result. They are rounded on the host. A process reads only the parts that its own devices hold, except for parameters
    that are updated or become int8, which it reads completely.

    Args:
        folder: Folder of the model.
        transformer: The transformer: its family and its number of layers.
        shapes: Tree of `ShapeDtypeStruct`s with the parts to load (`get_model_part`). Its dtypes are those of the result:
            float32, bfloat16, or int8 with scales.
        shardings: Tree of shardings with the same parts.
        updates: Low-rank updates by the path of their kernel. The product of the factors is added before rounding.

    Returns:
        The parameters of the transformer, and those of the other parts that the files contain.

    Raises:
        UserError: A file cannot be read. One error lists all missing, unexpected and misshapen tensors.
    """
    with open_tensors(folder) as tensors:
        error_prefix = f"{folder}: the weights do not match config.json"
        return place_params(tensors, error_prefix, transformer, shapes, shardings, updates)


def place_params(
    tensors: Mapping[str, Any],
    error_prefix: str,
    transformer: TransformerConfig,
    shapes: Any,
    shardings: Any,
    updates: Mapping[str, LowRankUpdate] | None = None,
) -> Any:
    """Convert tensors to parameters and place them on the devices, as `load_params` does.

    Args:
        tensors: Lazy slices by the tensor names of the table, as `open_tensors` yields them.
        error_prefix: Start of the error for tensors that do not match `shapes`: where, and what is wrong.
        transformer: See `load_params`.
        shapes: See `load_params`.
        shardings: See `load_params`.
        updates: See `load_params`.
    """
    # Select the rows of the table for the parts that are wanted and there, and check all tensors before any is read.
    tensors = {name: tensor for name, tensor in tensors.items() if get_model_part(name) in shapes}
    parts = shapes.keys() & {"decoder", *map(get_model_part, tensors)}
    flat_shapes, flat_shardings = (flatten_dict({part: tree[part] for part in parts}, sep="/") for tree in (shapes, shardings))
    mappings = [mapping for mapping in list_tensor_mappings(transformer.family) if mapping.path in flat_shapes]
    mappings.sort(key=lambda mapping: -flat_shapes[mapping.path].size)
    _check_tensors(tensors, _list_tensor_shapes(mappings, flat_shapes, transformer.layers), error_prefix)
    # Read and place one parameter at a time. Devices read their own parts of those that are neither quantized nor updated.
    params: dict[str, jax.Array] = {}
    for mapping in mappings:
        shape, update = flat_shapes[mapping.path], (updates or {}).get(mapping.path)
        if shape.dtype == np.int8:
            paths = mapping.path, f"{mapping.path}_scale"
            for path, array in zip(paths, _read_int8_kernel(mapping, tensors, shape.shape, update), strict=True):
                params[path] = _put_on_devices(array, flat_shardings[path])
        elif update is not None:
            array = _read_param(mapping, tensors, shape.dtype, _make_full_index(shape.shape), update)
            params[mapping.path] = _put_on_devices(array, flat_shardings[mapping.path])
        else:
            read_part = functools.partial(_read_param, mapping, tensors, shape.dtype)
            params[mapping.path] = put_local_parts(flat_shardings[mapping.path], shape.shape, read_part)
        jax.block_until_ready(params)  # so that the host never holds two parameters
    return unflatten_dict(params, sep="/")


def _put_on_devices(array: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding, may_alias=True)
    return put_global(sharding, array)


def _list_tensor_shapes(
    mappings: list[TensorMapping], flat_shapes: Mapping[str, Any], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor must have in the files, by name."""
    shapes = {}
    for mapping in mappings:
        shape = flat_shapes[mapping.path].shape[1 if mapping.is_stacked else 0 :]
        first, *rest = shape[::-1] if mapping.is_transposed else shape
        for i in range(mapping.first_layer, num_layers if mapping.is_stacked else 1):
            shapes[mapping.tensor_name.format(i=i)] = (first * mapping.part[1], *rest)
    return shapes


def _check_tensors(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], error_prefix: str) -> None:
    """Check that the files hold the expected tensors in their shapes, and no others.

    Raises:
        UserError: They do not. The message starts with `error_prefix` and lists all problems.
    """
    stored_tensors = {name: tensors[name] for name in expected if name in tensors}
    problems = {
        "missing": [name for name in expected if name not in stored_tensors],
        "unexpected": [name for name in tensors if name not in expected and not is_unused(name)],
        "misshapen": [
            f"{name} {tuple(tensor.get_shape())}, expected {expected[name]}"
            for name, tensor in stored_tensors.items()
            if tuple(tensor.get_shape()) != expected[name]
        ],
        "unsupported dtype": [
            f"{name} {tensor.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}"
            for name, tensor in stored_tensors.items()
            if tensor.get_dtype() not in FLOAT_DTYPES
        ],
    }
    problem_list = "; ".join(f"{kind}: {_format_names(names)}" for kind, names in problems.items() if names)
    if problem_list:
        raise UserError(f"{error_prefix} ({problem_list}). Use weights and a config of the same model.")


def _format_names(names: list[str]) -> str:
    more = len(names) - MAX_LISTED_TENSORS
    return ", ".join(names[:MAX_LISTED_TENSORS]) + (f" and {more} more" if more > 0 else "")


def _read_param(
    mapping: TensorMapping, tensors: Mapping[str, Any], dtype: Any, index: TensorIndex, update: LowRankUpdate | None = None
) -> np.ndarray:
    """Read the part of a parameter at `index`. With an update, `index` must cover the whole parameter."""
    out = allocate_aligned(tuple(axis.stop - axis.start for axis in index), dtype)
    if mapping.is_stacked:
        layers, layer_arrays, layer_index = range(index[0].start, index[0].stop), list(out), index[1:]
    else:
        layers, layer_arrays, layer_index = range(1), [out], index
    for i, layer_array in zip(layers, layer_arrays, strict=True):
        # Files are read in float32, into the result itself where it is in float32.
        is_float32 = layer_array.dtype == np.float32
        buffer = layer_array if is_float32 else np.empty(layer_array.shape, np.float32)
        _read_layer(mapping, tensors, i, layer_index, buffer, update)
        if not is_float32:
            layer_array[...] = buffer
    return out


def _read_int8_kernel(
    mapping: TensorMapping, tensors: Mapping[str, Any], shape: tuple[int, ...], update: LowRankUpdate | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a stacked kernel and quantize it. Returns the int8 kernel and its scales."""
    kernel, scales = allocate_aligned(shape, np.int8), []
    for i, layer_kernel in enumerate(kernel):
        buffer = np.empty(layer_kernel.shape, np.float32)
        _read_layer(mapping, tensors, i, _make_full_index(layer_kernel.shape), buffer, update)
        layer_kernel[...], scale = quantize(buffer)
        scales.append(scale)
    return kernel, np.stack(scales)


def _read_layer(
    mapping: TensorMapping,
    tensors: Mapping[str, Any],
    i: int,
    index: TensorIndex,
    out: np.ndarray,
    update: LowRankUpdate | None,
) -> None:
    """Copy the part of a tensor at `index` to `out` and add its update; of a stacked parameter, the tensor of layer `i`."""
    if i < mapping.first_layer:  # the scale of a norm that this layer does not use
        out.fill(1)
        return
    tensor = tensors[mapping.tensor_name.format(i=i)]
    # Convert the index from our layout to the file's, where the parameter may be one of several equal parts.
    first, *rest = index[::-1] if mapping.is_transposed else index
    part, parts = mapping.part
    start = part * (tensor.get_shape()[0] // parts)
    own_index = (slice(start + first.start, start + first.stop), *rest)
    _copy_rows(tensor, own_index, out.T if mapping.is_transposed else out)
    if update is not None:
        out += update[0][i] @ update[1][i]


def _make_full_index(shape: tuple[int, ...]) -> TensorIndex:
    return tuple(slice(0, size) for size in shape)


def _copy_rows(tensor: Any, index: TensorIndex, out: np.ndarray) -> None:
    """Copy a part of a lazy tensor to a float32 array, a block of rows at a time, so that no second copy of it exists."""
    block = max(1, MAX_COPIED_ELEMENTS // max(1, out[0].size))
    first = index[0].start
    for start in range(0, out.shape[0], block):
        stop = min(start + block, out.shape[0])
        out[start:stop] = tensor[slice(first + start, first + stop), *index[1:]]


@dataclasses.dataclass(frozen=True)
class InMemoryTensor:
    """A float32 tensor in memory with the interface of a lazy slice of a safetensors file."""

    values: np.ndarray

    def get_shape(self) -> tuple[int, ...]:
        """Return the shape, as safetensors does."""
        return self.values.shape

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return "F32"

    def __getitem__(self, index: TensorIndex) -> np.ndarray:
        return self.values[index]


def to_tensors(params: Any, family: str) -> dict[str, InMemoryTensor]:
    """Return a model's float32 parameters as tensors like those of `open_tensors`.

    Args:
        params: The parameters.
        family: Family of the transformer.
    """
    return {name: InMemoryTensor(tensor) for name, tensor in _iter_tensors(params, family)}


def _iter_tensors(params: Any, family: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name in the table and a view of each tensor, in the layout of the files, one layer at a time."""
    flat = flatten_dict(params, sep="/")
    mappings_by_tensor: dict[str, list[TensorMapping]] = {}
    for mapping in (mapping for mapping in list_tensor_mappings(family) if mapping.path in flat):
        mappings_by_tensor.setdefault(mapping.tensor_name, []).append(mapping)
    for mapping, *others in mappings_by_tensor.values():
        arrays = [to_host(flat[part.path]) for part in (mapping, *others)]
        for i, layers in enumerate(zip(*arrays, strict=True) if mapping.is_stacked else [arrays]):
            if i >= mapping.first_layer:
                tensors = [layer.T if mapping.is_transposed else layer for layer in layers]
                yield mapping.tensor_name.format(i=i), tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def save_params(
    path: Path,
    params: Any,
    prefixes: Mapping[str, str],
    convert: Callable[[np.ndarray], np.ndarray],
    family: str = "llama",
) -> None:
    """Write parts of a model to a safetensors file.

    Args:
        path: The file to write.
        params: The parameters of the model.
        prefixes: The parts to write (`get_model_part`), each with the prefix of its tensor names in the file.
        convert: Function applied to each tensor, for example a cast.
        family: Family of the transformer, if it is written.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    tensors = {
        prefix + name.removeprefix(f"{part}."): np.ascontiguousarray(convert(tensor))
        for part, prefix in prefixes.items()
        for name, tensor in _iter_tensors({part: params[part]}, family)
    }
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{name}: these weights of the model are not finite (NaN or infinity), so nothing is written. The training has "
                "diverged, or the file is damaged. Use another checkpoint."
            )
    save_file(tensors, path, metadata={"format": "pt"})
