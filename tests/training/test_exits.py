"""Early exits: their vectors, their losses, and the models that are cut there."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.loading import draw_texts, load_model, pack_texts
from helpers.runs import make_config, make_staged_config, use_one_device, write_base_and_data
from helpers.text_batches import draw_unit_vectors, make_batch
from jaxembed import Embedder, export
from jaxembed import encode as encode_command
from jaxembed.config import ExitsConfig, InfoNCEConfig, MatryoshkaConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import PackedTexts
from jaxembed.errors import UserError
from jaxembed.hub.card import Card, format_model_card
from jaxembed.hub.reader_rules import ServedModel
from jaxembed.losses.exits import align_exits, draw_exit_layers
from jaxembed.losses.objectives import Objectives
from jaxembed.model.parameters import replace_layers
from jaxembed.runs.train import train
from jaxembed.training.gradcache import encode
from jaxembed.training.metrics import read_metrics

Folder = Callable[[str], Path]
KEY = jax.random.key(3)
SPEC = EmbeddingSpec(pooling="mean")


@pytest.mark.parametrize(
    ("family", "compute"), [("qwen2", {}), ("modernbert", {"unroll": False}), ("bert", {"unroll": False, "remat": True})]
)
def test_the_vectors_of_an_exit_are_those_of_the_cut_model(base_folder: Folder, family: str, compute: dict[str, Any]) -> None:
    """A final norm, layers that differ, and norms after the layers; in a loop and unrolled."""
    model, params = load_model(base_folder(family), SPEC, **compute)
    packed, _ = pack_texts(draw_texts([5, 9, 3]), 16)
    exits = jax.jit(lambda p, layers: model.apply({"params": p}, packed, exit_layers=layers))(params, jnp.array([2, 1]))
    for x, count in enumerate([3, 2, 1]):
        transformer = dataclasses.replace(model.transformer, layers=count, windows=model.transformer.windows[:count])
        layers = jax.tree.map(lambda leaf, count=count: leaf[:count], params["decoder"]["layers"])
        cut = jax.jit(model.clone(transformer=transformer).apply)({"params": replace_layers(params, layers)}, packed)
        np.testing.assert_allclose(exits[:, :, x], cut, atol=2e-6)


def test_random_exits_differ_and_cover_all_layers_but_the_last() -> None:
    config = ExitsConfig(layers=(4,), weights=(0.5,), random=2, random_weight=0.25)
    drawn = np.array([draw_exit_layers(config, 5, jax.random.key(i)) for i in range(40)])
    assert config.all_weights == (0.5, 0.25, 0.25)
    assert set(drawn[:, 0].tolist()) == {4}
    assert set(drawn[:, 1:].ravel().tolist()) == {1, 2, 3, 4}
    assert (drawn[:, 1] != drawn[:, 2]).all()
    assert draw_exit_layers(ExitsConfig(), 5, KEY) is None
    assert (config.list_trained(5), ExitsConfig(layers=(3, 1)).list_trained(5)) == ((1, 2, 3, 4), (1, 3))


def test_alignment_is_the_divergence_from_the_whole_model() -> None:
    """Two texts; softmaxes (1/2, 1/2) and (3/4, 1/4): KL = log 2 - (log 3) / 2 = 0.1438; an absent text does not count."""
    logs = np.log([[0.5, 0.5], [0.75, 0.25]])
    vectors = jax.device_put(np.stack([[logs[[0, 1]], logs[[0, 0]], logs[[0, 1]]]]).astype(np.float32) * 0.3)
    present = jnp.array([[True, True, False]])
    assert align_exits(vectors, present, 0.3) == pytest.approx(np.array([0.5 * (np.log(2) - np.log(3) / 2)]), rel=1e-5)
    gradient = jax.grad(lambda v: align_exits(v, present, 0.3)[0])(vectors)
    assert not gradient[:, :, 0].any(), "the whole model is a target"
    assert gradient[:, 0, 1].any()


def test_the_sum_over_exits_is_a_constant() -> None:
    """Cosines with the own and the other document: 1 and 0 of the whole model, 0.8 and 0.6 of the exit."""
    whole, cut = np.eye(2)[[0, 0, 1, 1]].reshape(2, 2, 2), np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]]).reshape(2, 2, 2)
    objectives = Objectives([InfoNCEConfig(temperature=0.5)], exits=ExitsConfig(layers=(2,), weights=(0.25,), align=3.0))
    vectors = jnp.array(np.stack([whole, cut], axis=2), jnp.float32)
    batch = make_batch(["a", "b"], [["x"], ["y"]])
    total, metrics = jax.jit(lambda v: objectives.sum_over_exits(v, batch, KEY, {}, 1))(vectors)
    infonce, at_exit = np.log1p(np.exp(-1 / 0.5)), np.log1p(np.exp(-0.2 / 0.5))
    # The queries have the same vectors at both; a document has (1, 0) and (0.8, 0.6).
    p, q = (1 / (1 + np.exp(-difference / 0.3)) for difference in (1, 0.2))
    divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) / 2
    parts = [float(metrics[name]) for name in ("infonce", "exit_2", "exit_align")]
    assert [float(total), *parts] == pytest.approx(
        [infonce + 0.25 * at_exit + 3 * divergence, infonce, at_exit, divergence], rel=1e-5
    )


@pytest.mark.parametrize("exits", [ExitsConfig(layers=(2,), weights=(0.5,)), ExitsConfig(random=2, align=0.5)])
def test_gradients_agree_with_finite_differences(exits: ExitsConfig) -> None:
    """At two widths. Only the vectors of exits change: those of the whole model are a target without gradient."""
    generator, step = np.random.default_rng(0), 1e-6
    objectives = Objectives([InfoNCEConfig(temperature=0.2)], MatryoshkaConfig(dims=(4,)), exits=exits)
    batch = make_batch(["a", "b", "c"], [["x", "u"], ["y", "v"], ["z", None]])
    with jax.enable_x64(True):
        vectors = draw_unit_vectors(generator, 3, 3, 1 + len(exits.all_weights), 6)
        vectors[2, 2] = 0  # absent
        direction = generator.normal(size=vectors.shape) * (vectors != 0)
        direction[:, :, 0] = 0
        loss = jax.jit(lambda v: objectives.sum_over_exits(v, batch, KEY, {}, 1)[0])
        slope = float(jnp.sum(jax.jit(jax.grad(loss))(jnp.array(vectors)) * direction))
        ahead, behind = (loss(jnp.array(vectors + s * direction)) for s in (step, -step))
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-3


def test_the_loss_agrees_with_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2DMSE on a BERT: InfoNCE at both layers and two widths, and the alignment. Value and gradient by the embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules

    folder = tiny.write_bert_folder(tmp_path)
    theirs = SentenceTransformer(str(folder), device="cpu").eval()
    theirs.append(modules.Normalize())
    queries, documents = ["a b c", "d e", "f g h i"], ["a b", "d", "g h"]
    features = [theirs.tokenize(texts) for texts in (queries, documents)]
    inner = losses.MatryoshkaLoss(theirs, losses.MultipleNegativesRankingLoss(theirs, scale=20.0), [24, 8], [1.0, 0.5])
    weighting = {"prior_layers_weight": 0.7, "kl_div_weight": 0.4, "kl_temperature": 0.3}
    reference = losses.AdaptiveLayerLoss(theirs, inner, n_layers_per_step=1, layer_weighting=lambda _: 1.0, **weighting)
    monkeypatch.setattr(random, "sample", lambda layers, count: [1])  # of the embeddings, 0, and layer 1
    value = reference(features, torch.zeros(3))
    value.backward()

    embedder = Embedder.load(folder)
    model, tokens = embedder.model, embedder.tokenizer([*queries, *documents], [""] * 6).ids
    packed, index = pack_texts([np.asarray(ids) for ids in tokens], 16)
    slots = jnp.asarray(index).reshape(2, 3).T
    objectives = Objectives(
        [InfoNCEConfig()], MatryoshkaConfig(dims=(8,), weights=(0.5,)),
        exits=ExitsConfig(layers=(1,), weights=(0.7,), align=0.4 * 0.3, align_temperature=0.3),
    )  # fmt: skip
    batch = make_batch(queries, [[text] for text in documents])

    def loss(params: Any) -> jax.Array:
        vectors = encode(model, params, packed, slots, KEY, None, jnp.array([1]))
        return objectives.sum_over_exits(vectors, batch, KEY, {}, 1)[0]

    ours, grads = jax.jit(jax.value_and_grad(loss))(embedder.params)
    assert float(ours) == pytest.approx(float(value.detach()), rel=1e-5)
    expected = theirs[0].auto_model.embeddings.word_embeddings.weight.grad.numpy()
    assert np.linalg.norm(expected) > 1e-2
    assert np.linalg.norm(grads["decoder"]["embedding"] - expected) < 2e-5 * np.linalg.norm(expected)


def test_only_the_hidden_states_of_the_exits_are_kept(base_folder: Folder) -> None:
    """Per exit, training needs a few arrays of hidden states more; without exits, none. The loop over layers stays."""
    model, params = load_model(base_folder("qwen2"), SPEC, unroll=False, remat=True)
    model = model.clone(transformer=dataclasses.replace(model.transformer, layers=24, windows=(None,) * 24))
    layers = jax.tree.map(lambda x: jnp.concatenate([x[:1]] * 24), params["decoder"]["layers"])
    params = replace_layers(params, layers)
    rows, length = 16, 256
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    texts = PackedTexts(**shapes, pool_mask=jax.ShapeDtypeStruct((rows, length), bool), segments=4, shards=1)

    def count_bytes(exits: tuple[int, ...] | None) -> int:
        slots, layers = 4 * jnp.arange(rows)[:, None], None if exits is None else jnp.array(exits)
        grad = jax.jit(jax.grad(lambda p, t: encode(model, p, t, slots, KEY, None, layers).sum()))
        return int(grad.lower(params, texts).compile().memory_analysis().temp_size_in_bytes)

    state = rows * length * model.transformer.width * 4
    without, one, two = count_bytes(None), count_bytes((6,)), count_bytes((6, 12))
    assert without >= 24 * state
    assert one - without < 12 * state
    assert two - one < 8 * state


def test_a_stage_trains_exits_and_its_model_is_cut_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_one_device(monkeypatch)
    root = write_base_and_data(tmp_path)
    exits = {"exits": {"layers": [2], "random": 1, "align": 0.3}, "matryoshka": {"dims": [8]}, "gradcache": {"rows": 4}}
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, **exits}]
    config = make_staged_config(root, "run", stages, "train.checkpoint_every=2", "eval.sets=[]", "mesh.data=1")
    train(config)
    before, row = [row for row in read_metrics(Path(config.run.dir)) if "loss" in row]
    assert "exit_2" not in before
    parts = row["infonce"] + row["infonce_8"] + row["exit_2"] + row["exit_random"] + 0.3 * row["exit_align"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert min(row["exit_2"], row["exit_align"]) > 0
    embedder = Embedder.load(config.run.dir)
    assert embedder.spec.exit_layers == (1, 2)
    cut = embedder.keep_first_layers(2)
    assert (cut.spec.exit_layers, cut.model.transformer.layers, caplog.text.count("not trained to end")) == ((1,), 2, 0)
    card = format_model_card(ServedModel(embedder.spec, embedder.model.transformer, "float32"), Card("m"), 0.0, "")
    assert "The model was also trained with only its first 1, 2 layers" in card
    plain = embedder.with_spec(embedder.spec.replace(exit_layers=())).keep_first_layers(2)
    assert "layers: the model was not trained to end after 2 layers (trained exits: [])" in caplog.text
    vectors = cut.encode(["aaa bbb"])
    np.testing.assert_array_equal(plain.encode(["aaa bbb"]), vectors)
    # The commands.
    (root / "text.txt").write_text("aaa bbb\n")
    arguments = [config.run.dir, str(root / "text.txt"), str(root / "out.npy"), "--layers", "2"]
    encode_command.main(encode_command.make_parser().parse_args(arguments))
    np.testing.assert_allclose(np.load(root / "out.npy"), vectors, atol=1e-6)
    export.main(export.make_parser().parse_args([config.run.dir, str(root / "export"), "--layers", "2"]))
    assert json.loads((root / "export" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("exits", "problem"),
    [
        ("{layers: [1, 3]}", r"exits\.layers contains 3 \(expected less than 3, the layers of this model\)"),
        ("{random: 3}", r"exits\.random is 3 \(expected less than 3, the layers of this model\)"),
        ("{layers: [1], weights: [1, 2]}", r"exits: 2 weights for 1 layers"),
        ("{layers: [1], weights: [0]}", r"exits: weights must be above 0"),
        ("{align: 1}", r"exits: align compares exits with the whole model, but there are none\. Set layers or random\."),
    ],
)
def test_exits_that_the_model_does_not_have_are_refused(tmp_path: Path, exits: str, problem: str) -> None:
    root = write_base_and_data(tmp_path)
    with pytest.raises(UserError, match=problem):
        train(make_config(root, "run", "mesh.data=1", f"exits={exits}"))
    assert not (root / "run" / "base.json").exists()


def test_the_message_names_the_stage(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "exits": {"layers": [3]}}]
    root = write_base_and_data(tmp_path)
    with pytest.raises(UserError, match=r"^stages\.1\.exits\.layers contains 3"):
        train(make_staged_config(root, "run", stages, "mesh.data=1"))
