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
import transformers
from safetensors.numpy import load_file, save_file

from helpers import tiny
from helpers.loading import load_model
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.formats.weights import save_params
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes

FolderFixture = Callable[[str], Path]
Tensors = dict[str, np.ndarray]


def write_model(folder: Path, config: Path, files: dict[str, Tensors], index: bool = False) -> Path:
    """Write a folder with these safetensors files and the config.json of the folder `config`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((config / "config.json").read_bytes())
    for name, tensors in files.items():
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    if index:
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def load_transformer(folder: Path) -> Any:
    return load_model(folder, EmbeddingSpec())[1]["decoder"]


def are_equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True)
    return all(path == other and np.array_equal(x, y) for (path, x), (other, y) in pairs)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_saved_tensors_equal_the_loaded_ones(base_folder: FolderFixture, tmp_path: Path, family: str) -> None:
    params, family_name = (
        {"decoder": load_transformer(base_folder(family))},
        family.partition("-window")[0].partition("-mixed")[0],
    )
    save_params(tmp_path / "model.safetensors", params, {"decoder": ""}, lambda x: x, family_name)
    original = {name: x for name, x in read_tensors(base_folder(family)).items() if not name.startswith("pooler.")}
    saved = read_tensors(tmp_path)
    assert sorted(original) == sorted(saved)
    for name, tensor in original.items():
        assert saved[name].dtype == np.float32
        assert np.array_equal(saved[name], tensor), name


def test_save_params_converts_every_tensor(base_folder: FolderFixture, tmp_path: Path) -> None:
    save_params(
        tmp_path / "model.safetensors",
        {"decoder": load_transformer(base_folder("qwen2"))},
        {"decoder": ""},
        lambda x: x.astype(np.float16),
    )
    assert {tensor.dtype.name for tensor in read_tensors(tmp_path).values()} == {"float16"}


def test_layers_are_stacked_in_order_and_kernels_are_transposed(base_folder: FolderFixture) -> None:
    tensors, params = read_tensors(base_folder("qwen2")), load_transformer(base_folder("qwen2"))
    for i in range(3):
        kernel = params["layers"]["attention"]["q"]["kernel"][i]
        assert np.array_equal(kernel, tensors[f"layers.{i}.self_attn.q_proj.weight"].T)
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 48, 32)


def test_every_common_file_layout_loads_the_same_parameters(base_folder: FolderFixture, tmp_path: Path) -> None:
    base = base_folder("qwen2")
    tensors, expected = read_tensors(base), load_transformer(base)
    names = sorted(tensors)
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    unused = {"lm_head.weight": tensors["embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    shards = {f"part-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    folders = [
        write_model(tmp_path / "prefixed", base, {"model.safetensors": prefixed}),
        write_model(tmp_path / "with head", base, {"model.safetensors": prefixed | unused}),
        write_model(tmp_path / "sharded", base, shards, index=True),
        tiny.write_folder(tmp_path / "causal", "qwen2", head=True),
    ]
    assert all(are_equal(load_transformer(folder), expected) for folder in folders)


@pytest.mark.parametrize("head", ["score", "classifier", "qa_outputs"])
def test_other_heads_are_ignored(base_folder: FolderFixture, tmp_path: Path, head: str) -> None:
    tensors = read_tensors(base_folder("qwen2"))
    stored = tensors | {f"{head}.weight": np.ones((1, 32), np.float32), f"{head}.bias": np.ones(1, np.float32)}
    folder = write_model(tmp_path, base_folder("qwen2"), {"model.safetensors": stored})
    assert are_equal(load_transformer(folder), load_transformer(base_folder("qwen2")))


def test_a_stale_index_beside_a_single_file_is_not_read(base_folder: FolderFixture, tmp_path: Path) -> None:
    """transformers reads model.safetensors first, and so does this reader."""
    new = read_tensors(base_folder("qwen2"))
    old = {name: tensor * 2 for name, tensor in new.items()}
    write_model(tmp_path, base_folder("qwen2"), {"model-00001-of-00001.safetensors": old}, index=True)
    assert not are_equal(load_transformer(tmp_path), load_transformer(base_folder("qwen2")))
    write_model(tmp_path, base_folder("qwen2"), {"model.safetensors": new})
    assert are_equal(load_transformer(tmp_path), load_transformer(base_folder("qwen2")))
    torch_model = transformers.AutoModel.from_pretrained(str(tmp_path))
    assert np.array_equal(torch_model.state_dict()["norm.weight"].numpy(), new["norm.weight"])
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    assert are_equal(load_transformer(tmp_path), load_transformer(base_folder("qwen2")))


def test_weights_that_are_not_finite_are_not_written(base_folder: FolderFixture, tmp_path: Path) -> None:
    params = {"decoder": load_transformer(base_folder("qwen2"))}
    for number in (np.nan, np.inf):
        params["decoder"]["norm"]["scale"] = np.full(32, number, np.float32)
        with pytest.raises(UserError, match=r"^norm\.weight: these weights of the model are not finite"):
            save_params(tmp_path / "model.safetensors", params, {"decoder": ""}, lambda x: x)
        assert not (tmp_path / "model.safetensors").exists()


def test_an_untied_language_model_head_is_ignored(base_folder: FolderFixture, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, "mistral", head=True)
    assert "lm_head.weight" in read_tensors(folder)
    assert are_equal(load_transformer(folder), load_transformer(base_folder("mistral")))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes_become_float32(base_folder: FolderFixture, tmp_path: Path, dtype: Any) -> None:
    base = base_folder("qwen2")
    stored = {name: tensor.astype(dtype) for name, tensor in read_tensors(base).items()}
    params = load_transformer(write_model(tmp_path / "base", base, {"model.safetensors": stored}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert np.array_equal(params["embedding"], stored["embed_tokens.weight"].astype(np.float32))


def test_one_error_lists_every_tensor_that_does_not_match(base_folder: FolderFixture, tmp_path: Path) -> None:
    base = base_folder("qwen2")
    tensors = read_tensors(base)
    del tensors["layers.1.mlp.up_proj.weight"]
    tensors["other.weight"] = np.zeros((1, 32), np.float32)
    tensors["norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(UserError) as error:
        load_transformer(write_model(tmp_path / "base", base, {"model.safetensors": tensors}))
    assert str(error.value) == (
        f"{tmp_path / 'base'}: the weights do not match config.json (missing: layers.1.mlp.up_proj.weight; "
        "unexpected: other.weight; misshapen: norm.weight (31,), expected (32,)). Use weights and a config of the same model."
    )


@pytest.mark.parametrize("index", [True, False])
def test_duplicate_tensors_are_refused(base_folder: FolderFixture, tmp_path: Path, index: bool) -> None:
    """The same name in two shards, or two spellings of one name in a file; a head that nobody reads does no harm."""
    tensors = read_tensors(base_folder("qwen2"))
    duplicate = {"model.norm.weight": tensors["norm.weight"]}
    heads = [{"lm_head.weight": tensors["norm.weight"]}, {"model.lm_head.weight": tensors["norm.weight"]}]
    if index:
        files = {"a.safetensors": tensors | heads[0], "b.safetensors": heads[1]}
        again = {**files, "b.safetensors": heads[1] | duplicate}
    else:
        files = {"model.safetensors": tensors | heads[0] | heads[1]}
        again = {"model.safetensors": files["model.safetensors"] | duplicate}
    load_transformer(write_model(tmp_path / "base", base_folder("qwen2"), files, index))
    with pytest.raises(UserError, match=r"base: duplicate tensors \((model.)?norm.weight in (b|model).safetensors\). Keep one"):
        load_transformer(write_model(tmp_path / "base", base_folder("qwen2"), again, index))


def test_quantized_weights_are_refused(base_folder: FolderFixture, tmp_path: Path) -> None:
    tensors = read_tensors(base_folder("qwen2")) | {"norm.weight": np.ones(32, np.int8)}
    message = r"\(unsupported dtype: norm.weight I8, expected one of F64, F32, F16, BF16\)"
    with pytest.raises(UserError, match=message):
        load_transformer(write_model(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": tensors}))


def test_a_long_list_of_tensors_is_truncated(base_folder: FolderFixture, tmp_path: Path) -> None:
    only = {"norm.weight": read_tensors(base_folder("qwen2"))["norm.weight"]}
    with pytest.raises(UserError, match=r"missing: embed_tokens.weight, .* and 31 more\)"):
        load_transformer(write_model(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": only}))


@pytest.mark.parametrize("size", [0, 4, 1000, -10])
def test_a_truncated_file_is_refused(base_folder: FolderFixture, tmp_path: Path, size: int) -> None:
    folder = write_model(tmp_path / "base", base_folder("qwen2"), {"model.safetensors": read_tensors(base_folder("qwen2"))})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file \(.*\). Download it again.$"):
        load_transformer(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"model.safetensors: no such file \(expected the weights of the model\). Save them as safetensors in .*/base.$"),
        ('{"weight_map": {"norm.weight": "part-7.safetensors"}}', "part-7.safetensors: no such file"),
        ("[]", r"index.json: .*JSON object.*Download this index of the weight files again.$"),
        ("{", r"index.json: not valid JSON .*Download this index of the weight files again.$"),
        ('{"weight_map": {"norm.weight": 3}}', r"index.json: .*weight_map.*Download this index of the weight files again.$"),
    ],
)
def test_missing_files_are_named(base_folder: FolderFixture, tmp_path: Path, index: str | None, message: str) -> None:
    folder = write_model(tmp_path / "base", base_folder("qwen2"), {})
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        load_transformer(folder)


def test_parameters_are_placed_on_every_device(base_folder: FolderFixture) -> None:
    _, params = load_model(base_folder("qwen2"), EmbeddingSpec(), devices=8)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    assert are_equal(params["decoder"], load_transformer(base_folder("qwen2")))


# Script of a child process, in which a thread samples the anonymous memory. RssAnon excludes pages of the mapped file.
MEASURE_MEMORY = """
import json, sys, threading, time
from pathlib import Path
import jax
from jaxembed.config.spec import EmbeddingSpec
from helpers.loading import load_model

def read_anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def sample():
    while not is_done:
        samples.append(read_anonymous_bytes())
        time.sleep(0.002)

big, small = map(Path, sys.argv[1:])
load_model(small, EmbeddingSpec())
is_done, before, samples = False, read_anonymous_bytes(), []
thread = threading.Thread(target=sample)
thread.start()
_, params = load_model(big, EmbeddingSpec())
is_done = True
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
after = read_anonymous_bytes()
print(json.dumps([size, max(*samples, after) - before, after - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_of_loading_stays_near_the_size_of_the_parameters(base_folder: FolderFixture, tmp_path: Path) -> None:
    sizes = {"vocab_size": 50_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    config = json.loads((base_folder("llama") / "config.json").read_text()) | sizes | {"head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    boxed = infer_parameter_shapes(EmbeddingModel(parse_hf_config(config, "test"), EmbeddingSpec()))["decoder"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nn.unbox(boxed))
    save_params(tmp_path / "model.safetensors", {"decoder": zeros}, {"decoder": ""}, lambda x: x.astype(np.float32))
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path), str(base_folder("llama"))]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {"PYTHONPATH": ":".join(paths), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    size, peak, after = json.loads(done.stdout.splitlines()[-1])
    assert size > 190e6
    assert 0.9 * size < after <= peak <= 1.3 * size
