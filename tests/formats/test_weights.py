"""Reading and writing Hugging Face weights."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import tiny
from helpers.loading import load
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.weights import save_params
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import from_hf

Folder = Callable[[str], Path]
Tensors = dict[str, np.ndarray]


def write(folder: Path, config: Path, files: dict[str, Tensors], index: bool = False) -> Path:
    """A folder of these safetensors files, with the config of another one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((config / "config.json").read_bytes())
    for name, tensors in files.items():
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    if index:
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def params_of(folder: Path) -> Any:
    return load(folder, EmbeddingSpec())[1]["decoder"]


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True)
    return all(path == other and np.array_equal(x, y) for (path, x), (other, y) in pairs)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_saving_gives_back_the_tensors_that_were_loaded(base_folder: Folder, tmp_path: Path, family: str) -> None:
    save_params(tmp_path / "model.safetensors", {"decoder": params_of(base_folder(family))}, {"decoder": ""}, lambda x: x)
    original, saved = tensors_of(base_folder(family)), tensors_of(tmp_path)
    assert sorted(original) == sorted(saved)
    for name, tensor in original.items():
        assert saved[name].dtype == np.float32
        assert np.array_equal(saved[name], tensor), name


def test_saving_converts_every_tensor(base_folder: Folder, tmp_path: Path) -> None:
    save_params(
        tmp_path / "model.safetensors",
        {"decoder": params_of(base_folder("qwen2"))},
        {"decoder": ""},
        lambda x: x.astype(np.float16),
    )
    assert {tensor.dtype.name for tensor in tensors_of(tmp_path).values()} == {"float16"}


def test_layers_are_stacked_in_order_and_kernels_transposed(base_folder: Folder) -> None:
    tensors, params = tensors_of(base_folder("qwen2")), params_of(base_folder("qwen2"))
    for i in range(3):
        kernel = params["layers"]["attention"]["q"]["kernel"][i]
        assert np.array_equal(kernel, tensors[f"layers.{i}.self_attn.q_proj.weight"].T)
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 48, 32)


def test_files_of_any_usual_form_load_alike(base_folder: Folder, tmp_path: Path) -> None:
    base = base_folder("qwen2")
    tensors, want = tensors_of(base), params_of(base)
    names = sorted(tensors)
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    extra = {"lm_head.weight": tensors["embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    shards = {f"part-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    forms = [
        write(tmp_path / "prefixed", base, {"model.safetensors": prefixed}),
        write(tmp_path / "with head", base, {"model.safetensors": prefixed | extra}),
        write(tmp_path / "sharded", base, shards, index=True),
        tiny.folder(tmp_path / "causal", "qwen2", head=True),
    ]
    assert all(same(params_of(form), want) for form in forms)


def test_a_head_of_its_own_is_left_out(base_folder: Folder, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, "mistral", head=True)
    assert "lm_head.weight" in tensors_of(folder)
    assert same(params_of(folder), params_of(base_folder("mistral")))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(base_folder: Folder, tmp_path: Path, dtype: Any) -> None:
    base = base_folder("qwen2")
    stored = {name: tensor.astype(dtype) for name, tensor in tensors_of(base).items()}
    params = params_of(write(tmp_path / "base", base, {"model.safetensors": stored}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert np.array_equal(params["embedding"], stored["embed_tokens.weight"].astype(np.float32))


def test_one_error_names_every_tensor_that_does_not_fit(base_folder: Folder, tmp_path: Path) -> None:
    base = base_folder("qwen2")
    tensors = tensors_of(base)
    del tensors["layers.1.mlp.up_proj.weight"]
    tensors["score.weight"] = np.zeros((1, 32), np.float32)
    tensors["norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(UserError) as error:
        params_of(write(tmp_path / "base", base, {"model.safetensors": tensors}))
    assert str(error.value) == (
        f"{tmp_path / 'base'}: the weights do not fit config.json; missing: layers.1.mlp.up_proj.weight; "
        "unexpected: score.weight; misshapen: norm.weight (31,) (expected (32,))"
    )


def test_quantised_weights_are_refused(base_folder: Folder, tmp_path: Path) -> None:
    tensors = tensors_of(base_folder("qwen2")) | {"norm.weight": np.ones(32, np.int8)}
    with pytest.raises(UserError, match=r"mistyped: norm.weight I8 \(expected one of F64, F32, F16, BF16\)$"):
        params_of(write(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": tensors}))


def test_a_long_list_of_tensors_is_cut(base_folder: Folder, tmp_path: Path) -> None:
    only = {"norm.weight": tensors_of(base_folder("qwen2"))["norm.weight"]}
    with pytest.raises(UserError, match=r"missing: embed_tokens.weight, .* and 31 more$"):
        params_of(write(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": only}))


@pytest.mark.parametrize("kept", [0, 4, 1000, -10])
def test_a_truncated_file(base_folder: Folder, tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": tensors_of(base_folder("qwen2"))})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file .*; fetch it again$"):
        params_of(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "model.safetensors: no such file; expected the model's weights as safetensors"),
        ('{"weight_map": {"norm.weight": "part-7.safetensors"}}', "part-7.safetensors: no such file"),
        ("[]", "index.json: expected a JSON object, found a list; not a weight index, fetch it again$"),
        ("{", "index.json: not valid JSON .*; not a weight index, fetch it again$"),
        ('{"weight_map": {"norm.weight": 3}}', "index.json: weight_map is a mapping of 1; expected an object of .*; not a"),
    ],
)
def test_absent_files(base_folder: Folder, tmp_path: Path, index: str | None, message: str) -> None:
    folder = write(tmp_path / "base", base_folder("qwen2"), {})
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        params_of(folder)


def test_parameters_are_placed_on_every_device(base_folder: Folder) -> None:
    _, params = load(base_folder("qwen2"), EmbeddingSpec(), devices=8)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    assert same(params["decoder"], params_of(base_folder("qwen2")))


# A child process, whose anonymous memory (RssAnon leaves out the pages of the mapped file) a thread samples.
LOADING = """
import json, sys, threading, time
from pathlib import Path
import jax
from jaxembed.config.spec import EmbeddingSpec
from helpers.loading import load

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def sample():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

big, small = map(Path, sys.argv[1:])
load(small, EmbeddingSpec())
done, before, peaks = False, anonymous(), []
thread = threading.Thread(target=sample)
thread.start()
_, params = load(big, EmbeddingSpec())
done = True
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
after = anonymous()
print(json.dumps([size, max(*peaks, after) - before, after - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_parameters(base_folder: Folder, tmp_path: Path) -> None:
    sizes = {"vocab_size": 50_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    config = json.loads((base_folder("llama") / "config.json").read_text()) | sizes | {"head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    boxed = parameter_shapes(EmbeddingModel(from_hf(config, "test"), EmbeddingSpec()))["decoder"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nn.unbox(boxed))
    save_params(tmp_path / "model.safetensors", {"decoder": zeros}, {"decoder": ""}, lambda x: x.astype(np.float32))
    command = [sys.executable, "-c", LOADING, str(tmp_path), str(base_folder("llama"))]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {"PYTHONPATH": ":".join(paths), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    size, peak, after = json.loads(done.stdout.splitlines()[-1])
    assert size > 190e6
    assert 0.9 * size < after <= peak <= 1.3 * size
