"""Steps that do not touch all of a large embedding, against plain optax and torch.optim.SparseAdam.

`model.frozen=[embedding]`: the embedding keeps its values, and the other parameters train as with `jax.lax.stop_gradient`.
`optim.lazy_embedding`: only the rows of the batch change, as with SparseAdam.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from helpers import tiny
from helpers.runs import make_config, make_staged_config, read_losses, train_until_stopped, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import Config, load_config
from jaxembed.data.pipeline import iter_batches
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.formats.weights import open_tensors
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.planning.plan import make_planning_target, plan
from jaxembed.runs.open import open_run
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics
from jaxembed.training.state import compute_state_shapes
from jaxembed.training.step import compute_batch_loss

EMBEDDING = ("decoder", "embedding")
VOCABULARY, WIDTH, STEPS, RATE, CLIP, DECAY = 300, 32, 4, 1e-3, 0.5, 0.1
FROZEN = ["model.frozen=[embedding]", "eval.sets=[]", f"train.steps={STEPS}", "train.checkpoint_every=2"]
LAZY = ["optim.lazy_embedding=true", *FROZEN[1:]]
# A constant learning rate, and gradients that are always clipped.
CONSTANT = [f"optim={{learning_rate: {RATE}, schedule: constant, clip: {CLIP}, weight_decay: {DECAY}}}"]
MESHES = {"data": ["mesh.data=8", "gradcache.rows=1"], "all": ["mesh={data: 2, fsdp: 2, tensor: 2}", "gradcache.rows=1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The directory of a finished run on one device."""
    train(make_config(folder, "run", *FROZEN, *CONSTANT, "mesh.data=1"))
    return folder / "run"


@pytest.fixture(scope="module")
def lazily_trained(folder: Path) -> Path:
    """The directory of a finished run with lazy updates, on one device."""
    train(make_config(folder, "lazy", *CONSTANT, *LAZY, "mesh.data=1"))
    return folder / "lazy"


def load_params(model: Path) -> dict[tuple[str, ...], np.ndarray]:
    params = Embedder.load(model, checkpoint="last") if (model / "checkpoints").exists() else Embedder.load(model)
    return {path: np.asarray(x) for path, x in flatten_dict(params.params).items()}


class SparseAdam:
    """torch.optim.SparseAdam on some rows of a table, with weight decay of the same rows."""

    def __init__(self, table: np.ndarray):
        self.table = torch.nn.Parameter(torch.tensor(table))
        self.optimizer = torch.optim.SparseAdam([self.table], lr=RATE)
        self.steps = 0

    def update(self, grads: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Update with the given rows of a dense gradient. Return the table."""
        # It adds epsilon before the correction of the second moment's bias, and optax adds it after that.
        self.steps += 1
        self.optimizer.param_groups[0]["eps"] = 1e-8 * np.sqrt(1 - 0.999**self.steps)
        with torch.no_grad():
            self.table[rows] *= 1 - RATE * DECAY
        self.table.grad = torch.sparse_coo_tensor(
            torch.tensor(rows)[None], torch.tensor(grads[rows]), grads.shape, check_invariants=True
        )
        self.optimizer.step()
        return self.table.detach().numpy().copy()


def train_reference(config: Config, is_frozen: bool) -> tuple[dict[tuple[str, ...], np.ndarray], list[float]]:
    """Train with plain optax. Return the parameters and the norms of the gradients.

    The embedding is under `stop_gradient` if it is frozen. Otherwise torch.optim.SparseAdam updates it.
    """
    mesh = make_mesh(1)
    run = open_run(config, mesh)
    [stage] = run.stages
    params = {path: jnp.array(x) for path, x in load_params(Path(config.model.base)).items()}
    embedding = params.pop(EMBEDDING)
    mask = {path: path[-1] in ("kernel", "positions", "token_types") for path in params}
    optimizer, sparse_adam = optax.adamw(RATE, weight_decay=DECAY, mask=mask), SparseAdam(np.asarray(embedding))
    opt_state, norms = optimizer.init(params), []

    def compute_loss(params: Any, embedding: Any, batch: Any) -> jax.Array:
        fixed = jax.lax.stop_gradient(embedding) if is_frozen else embedding
        whole = unflatten_dict(params | {EMBEDDING: fixed})
        return compute_batch_loss(run.model, stage.objectives, whole, batch, jax.random.key(0))[0]

    compute_grads = jax.jit(jax.grad(compute_loss, (0, 1)))
    for host in iter_batches(stage.plan, stage.batch_builder, 0, STEPS):
        grads = compute_grads(params, embedding, put_batch(mesh, host.batch))
        norms.append(float(optax.global_norm(grads)))
        grads, embedding_grads = jax.tree.map(lambda x, norm=norms[-1]: x * min(1, CLIP / norm), grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if not is_frozen:
            rows = np.union1d(host.batch.texts.tokens, np.arange(run.model.transformer.position_offset))
            assert len(rows) < VOCABULARY / 2
            embedding = jnp.asarray(sparse_adam.update(np.asarray(embedding_grads), rows))
    return {path: np.asarray(x) for path, x in (params | {EMBEDDING: embedding}).items()}, norms


def check_against_reference(config: Config, is_frozen: bool) -> None:
    """Check that a finished run has changed the parameters of its base as the reference does."""
    run_dir = Path(config.run.dir)
    before, after = load_params(Path(config.model.base)), load_params(run_dir)
    expected, norms = train_reference(config, is_frozen)
    assert min(norms) > CLIP, "the test needs clipped gradients, to see which parameters count"
    np.testing.assert_allclose([row["grad_norm"] for row in read_metrics(run_dir) if "loss" in row], norms, rtol=1e-4)
    assert expected.keys() == after.keys()
    for path, x in expected.items():
        if path[-2:] == ("k", "bias"):  # softmax does not depend on it: its gradient is rounding errors
            continue
        change, difference = (np.linalg.norm(x - y) for y in (before[path], after[path]))
        assert difference <= 1e-3 * change, path
        assert (change > 0) != (is_frozen and path == EMBEDDING), path


def test_parameters_train_as_with_stop_gradient_on_the_embedding(folder: Path, trained: Path) -> None:
    check_against_reference(make_config(folder, "run", *FROZEN, *CONSTANT, "mesh.data=1"), is_frozen=True)


@pytest.mark.parametrize("family", ["qwen3", "xlm-roberta"])
def test_rows_of_the_batch_train_as_with_sparse_adam(folder: Path, lazily_trained: Path, family: str) -> None:
    """Positions of XLM-RoBERTa depend on the id of the padding token."""
    if family == "qwen3":
        config = make_config(folder, lazily_trained.name, *CONSTANT, *LAZY, "mesh.data=1")
    else:
        base = tiny.write_folder(folder / family, family)
        config = make_config(folder, f"lazy-{family}", *CONSTANT, *LAZY, f"model.base={base}", "mesh.data=1")
        train(config)
    check_against_reference(config, is_frozen=False)


@pytest.mark.parametrize("keys", [FROZEN, LAZY], ids=["frozen", "lazy"])
def test_a_run_of_eight_devices_has_the_losses_of_one(
    folder: Path, trained: Path, lazily_trained: Path, keys: list[str]
) -> None:
    reference = trained if keys is FROZEN else lazily_trained
    for name, mesh in MESHES.items():
        run_dir = folder / f"{reference.name}-{name}"
        train(make_config(folder, run_dir.name, *CONSTANT, *keys, *mesh))
        np.testing.assert_allclose(read_losses(run_dir), read_losses(reference), rtol=1e-4)


@pytest.mark.parametrize("keys", [FROZEN, LAZY], ids=["frozen", "lazy"])
def test_a_run_resumes_exactly(folder: Path, trained: Path, lazily_trained: Path, keys: list[str]) -> None:
    reference = trained if keys is FROZEN else lazily_trained
    half_dir = folder / f"half-{reference.name}"
    config = make_config(folder, half_dir.name, *CONSTANT, *keys, "mesh.data=1")
    train_until_stopped(config, 2)
    assert len(read_losses(half_dir)) == 2
    train(config)
    assert read_losses(half_dir) == read_losses(reference)
    half, whole = load_params(half_dir), load_params(reference)
    assert all(np.array_equal(half[path], whole[path]) for path in whole)


def test_stages_with_one_optimizer_switch_between_dense_and_lazy_updates(folder: Path) -> None:
    """Tokens of earlier stages that a stage does not read keep moving by their momentum, unless it is lazy."""
    stages = [
        {"train": {"steps": 2}, "optim": {"lazy_embedding": is_lazy, "restart": False}} for is_lazy in (False, True, False)
    ]
    keys = [*CONSTANT, "optim.weight_decay=0", "mesh.data=1", "eval.sets=[]", "train.batch_size=2"]
    keys += ["train.checkpoint_every=2", "train.keep_checkpoints=9"]
    config = make_staged_config(folder, "switched", stages, *keys)
    train(config)
    stopped = make_staged_config(folder, "switched-stopped", stages, *keys)
    train_until_stopped(stopped, 3)
    train(stopped)
    assert read_losses(folder / "switched-stopped") == read_losses(folder / "switched")
    embeddings = [load_embedding(folder / "base"), *(load_embedding(folder / "switched", step) for step in ("2", "4", "6"))]
    np.testing.assert_array_equal(load_embedding(folder / "switched-stopped", "last"), embeddings[-1])
    changed = [set(np.flatnonzero((x != y).any(axis=1))) for x, y in itertools.pairwise(embeddings)]
    rows = [
        set(np.unique([batch.batch.texts.tokens for batch in iter_batches(stage.plan, stage.batch_builder, 0, 2)])) - {0}
        for stage in open_run(config, make_mesh(1)).stages
    ]  # without the padding, which has no gradient
    seen = [rows[0], rows[0] | rows[1], rows[0] | rows[1] | rows[2]]
    assert seen[1] != rows[1] and seen[2] != rows[2]
    assert changed == [rows[0], rows[1], seen[2]]


def load_embedding(model: Path, checkpoint: str = "best") -> np.ndarray:
    return np.asarray(Embedder.load(model, checkpoint=checkpoint).params["decoder"]["embedding"])


def test_an_export_has_the_vectors_of_the_run_and_the_embedding_of_the_base(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    model = Embedder.load(trained, checkpoint="last")
    export(model, tmp_path / "out", "float32", Card("frozen", "base"))
    np.testing.assert_allclose(Embedder.load(tmp_path / "out").encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)
    assert np.abs(model.encode(tiny.TEXTS) - Embedder.load(folder / "base").encode(tiny.TEXTS)).max() > 1e-3
    embeddings = []
    for path in (folder / "base", tmp_path / "out"):
        with open_tensors(path) as tensors:
            embeddings.append(tensors["embed_tokens.weight"][:])
    assert np.array_equal(*embeddings)


def test_checkpoints_hold_the_embedding_but_no_moments_of_it(folder: Path, trained: Path) -> None:
    """A run can start from a checkpoint alone: the base may be gone."""
    items = trained / "checkpoints" / str(STEPS)
    shapes = {item: re.findall(r"\[300, ?32\]|\[300,32\]", read_metadata(items / item)) for item in ("params", "optimizer")}
    assert shapes["params"] and not shapes["optimizer"]
    base = folder / "base"
    base.rename(folder / "moved")
    try:
        assert EMBEDDING in load_params(trained)
    finally:
        (folder / "moved").rename(base)


def read_metadata(item: Path) -> str:
    """Return the tree metadata of an item that Orbax wrote."""
    return (item / "_METADATA").read_text() + (item / "_sharding").read_text()


@pytest.mark.parametrize(("keys", "count"), [([], None), (FROZEN[:1], 0), (LAZY[:1], 3)], ids=["dense", "frozen", "lazy"])
def test_a_step_computes_few_arrays_of_the_size_of_the_embedding(folder: Path, keys: list[str], count: int | None) -> None:
    """None with a frozen embedding. A lazy update puts rows into the embedding and its moments."""
    config, mesh = make_config(folder, "traced", *keys, "mesh.data=1", "train.batch_size=2"), make_mesh(1)
    run = open_run(config, mesh)
    [stage] = run.stages
    state = compute_state_shapes(run.model, stage.make_optimizer(run.model), mesh, frozen_names=config.model.frozen)
    batch = next(iter(iter_batches(stage.plan, stage.batch_builder, 0, 1))).batch
    program = str(stage.make_train_step(run.model, state).trace(state, batch).jaxpr)
    operations = re.findall(rf"\w+:f32\[{VOCABULARY},{WIDTH}\] = (\w+)", program)
    assert len(operations) > 10 if count is None else operations == ["scatter"] * count, operations


def test_a_plan_counts_what_is_saved(folder: Path) -> None:
    (whole, *_), (frozen, *_) = (make_plan(make_config(folder, "plan", *keys, "mesh.data=1")) for keys in ([], FROZEN[:1]))
    size = VOCABULARY * WIDTH
    assert whole["parameters"] == frozen["parameters"] == whole["trained"] == frozen["trained"] + size
    assert whole["optimizer_bytes"] - frozen["optimizer_bytes"] == 2 * 4 * size
    assert whole["memory"]["arguments"] - frozen["memory"]["arguments"] == 2 * 4 * size


def make_plan(config: Config) -> list[dict[str, Any]]:
    target = make_planning_target(config.mesh)
    run = open_run(config, target.mesh)
    stages: list[dict[str, Any]] = plan(config, target, run.model, run.stages, with_loss=False)["stages"]
    return stages


def test_objectives_with_a_tied_head_train_the_rest(folder: Path) -> None:
    """The head is the frozen embedding. Masked tokens are predicted with it. A lazy update would need all of its rows."""
    texts = [{"text": row["pos"][0]} for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    sources, objectives = [{"path": str(folder / "texts.jsonl")}], [{"name": "mntp", "mask_rate": 0.5}]
    tiny.write_folder(folder / "tied", "qwen2")
    keys = [f"data.sources={json.dumps(sources)}", f"objectives={json.dumps(objectives)}", "data.hard_negatives=0"]
    keys += [f"model.base={folder / 'tied'}", "mesh.data=1"]
    train(make_config(folder, "tied_run", *FROZEN, *keys))
    before, after = load_params(folder / "tied"), load_params(folder / "tied_run")
    assert {path for path in before if np.array_equal(before[path], after[path])} == {EMBEDDING}
    message = r"^objectives\.0: mntp trains every row of the embedding, .* but optim\.lazy_embedding is true\. Remove it\.$"
    with pytest.raises(UserError, match=message):
        train(make_config(folder, "lazy_tied", *LAZY, *keys))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.frozen=[embeding]"], r"model\.frozen\.0 is 'embeding' \(expected 'embedding'\)"),
        (["model.frozen=embedding"], r"model\.frozen is 'embedding' \(expected a list such as \[a, b\]\)"),
        (["model={base: x, frozen: [embedding], lora: {rank: 2}}"], r"model: frozen is set, but lora freezes the whole base"),
        (
            ["optim.lazy_embedding=true", "model.frozen=[embedding]"],
            r"optim\.lazy_embedding trains rows of the embedding, but model\.frozen freezes it\. Remove one of both\.",
        ),
    ],
)
def test_bad_values_are_one_line_errors(folder: Path, overrides: list[str], message: str) -> None:
    make_config(folder, "bad")
    with pytest.raises(UserError, match=message) as error:
        load_config(folder / "bad.yaml", overrides)
    assert "\n" not in str(error.value)


def test_a_preset_has_nothing_to_freeze(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.frozen: preset:tiny has no weights to keep\. Name a base that has weights"):
        train(make_config(folder, "preset", *FROZEN, "model.base=preset:tiny"))
