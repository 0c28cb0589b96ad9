"""Guides and teachers: their vectors, the store, their place in a batch, and what a guide masks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxembed.hub.frozen_encoder
from helpers import tiny
from helpers.text_batches import draw_unit_vectors, make_batch
from jaxembed import Embedder
from jaxembed.config import InfoNCEConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import BatchBuilder, EncoderInput, FrozenVectors
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.pipeline import iter_batches
from jaxembed.data.sources import open_source
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import make_all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import FrozenEncoder, hash_folder, open_frozen_encoder
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import write_spec
from jaxembed.losses.encoded import EncodedBatch
from jaxembed.losses.infonce import info_nce
from jaxembed.model.layers import l2_normalize

PROMPTS = {"query": "search: ", "document": "passage: "}
INPUTS = [
    *(EncoderInput(text, "query", "Find it") for text in tiny.TEXTS[:3]),
    *(EncoderInput(text, side, "") for text in tiny.TEXTS[2:5] for side in ("query", "document")),
    EncoderInput("short", "document", "Find it"),
]


@pytest.fixture(scope="module")
def own_folder(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a jaxembed.json: an instruction template and stored prompts."""
    folder = tmp_path_factory.mktemp("encoders") / "ours"
    shutil.copytree(base_folder("qwen3"), folder)
    write_spec(folder, EmbeddingSpec(max_length=64, instruction_template="Do {instruction}:", prompts=PROMPTS))
    return folder


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_foreign_folder(tmp_path_factory.mktemp("encoders") / "foreign", {"query": "ask: "})


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bert_folder(tmp_path_factory.mktemp("encoders") / "bert", {"query": "ask: "})


@pytest.fixture(scope="module")
def encoder(own_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return open_frozen_encoder(str(own_folder), tmp_path_factory.mktemp("cache"))


def count_calls(model: FrozenEncoder) -> tuple[FrozenEncoder, list[tuple[list[str], str]]]:
    """Return the model and the list of its future calls: texts and prompt of each."""
    calls: list[tuple[list[str], str]] = []

    def encode_group(texts: list[str], prompt: str) -> np.ndarray:
        calls.append((texts, prompt))
        return model.encode_group(texts, prompt)

    return dataclasses.replace(model, encode_group=encode_group), calls


def test_vectors_are_those_of_encode(own_folder: Path, encoder: FrozenEncoder) -> None:
    """The model's template makes the prompt of an instruction. Texts without one have the prompt stored for their side."""
    embedder, vectors = Embedder.load(own_folder), encoder.encode(INPUTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(INPUTS), encoder.width) == (10, 32)
    for vector, (text, side, instruction) in zip(vectors, INPUTS, strict=True):
        options = {"instruction": instruction} if instruction else {"prompt_name": side}
        np.testing.assert_allclose(vector, embedder.encode([text], **options)[0], atol=1e-6)
    assert np.abs(vectors[3] - vectors[4]).max() > 1e-3, "a text has different vectors as query and as document"


def assert_stock_vectors(model: FrozenEncoder, folder: Path) -> None:
    """Check that a model gives the vectors of sentence-transformers, under the prompt of each side."""
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(folder), device="cpu")
    for vector, (text, side, _) in zip(model.encode(INPUTS), INPUTS, strict=True):
        expected = reference.encode(text, prompt="ask: " if side == "query" else "", normalize_embeddings=True)
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_other_models_are_loaded_by_sentence_transformers(foreign_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type distilbert is not supported"):
        find_base(str(foreign_folder))
    model, calls = count_calls(open_frozen_encoder(str(foreign_folder), tmp_path))
    assert_stock_vectors(model, foreign_folder)
    assert (model.width, len(calls)) == (24, 2)
    again = open_frozen_encoder(str(foreign_folder), tmp_path).encode(INPUTS)
    assert np.array_equal(again, model.encode(INPUTS))


def test_encoders_run_in_jax_with_the_prompts_of_their_sides(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a mesh too. A run that recorded the hash of the folder, as once, resumes with sentence-transformers."""
    monkeypatch.setattr(jaxembed.hub.frozen_encoder, "load_sentence_transformer", None)
    model = open_frozen_encoder(str(bert_folder), tmp_path)
    assert_stock_vectors(model, bert_folder)
    split = open_frozen_encoder(str(bert_folder), tmp_path / "other", make_mesh(fsdp=2))
    np.testing.assert_allclose(split.encode(INPUTS), model.encode(INPUTS), atol=1e-6)
    monkeypatch.undo()
    old_hash = hash_folder(bert_folder)
    earlier = open_frozen_encoder(str(bert_folder), tmp_path, recorded_hash=old_hash)
    assert earlier.hash == old_hash != model.hash
    assert_stock_vectors(earlier, bert_folder)


def test_stored_vectors_are_not_computed_again(own_folder: Path, tmp_path: Path) -> None:
    model, calls = count_calls(open_frozen_encoder(str(own_folder), tmp_path / "cache"))
    first = model.encode([*INPUTS, INPUTS[0]])
    assert [prompt for _, prompt in calls] == ["Do Find it:", "search: ", "passage: "], "one call per prompt"
    assert calls[0][0] == [*tiny.TEXTS[:3], "short"]
    assert np.array_equal(first[0], first[-1])
    new = EncoderInput("something new", "query", "")
    second = model.encode([INPUTS[4], new, INPUTS[3]])
    assert calls[3:] == [(["something new"], "search: ")]
    # The same model under another name.
    moved = shutil.copytree(own_folder, tmp_path / "moved")
    moved_model, calls = count_calls(open_frozen_encoder(str(moved), tmp_path / "cache"))
    assert np.array_equal(moved_model.encode(INPUTS), first[:-1])
    assert np.array_equal(moved_model.encode([new]), second[1:2])
    assert calls == []


def test_hashes_of_earlier_versions_stay_valid(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A stock folder was once read without pooling its instructions. A run that recorded this resumes with those vectors."""
    folder, recorded_spec = base_folder("qwen3"), {
        "attention": "bidirectional", "pooling": "mean", "latents": 512, "pooling_heads": 8, "include_instruction": False,
        "projection": 0, "projection_bias": False, "projection_activation": "identity", "normalize": True, "append_eos": True,
        "eos_as_text": False, "pool_last_instruction_token": False, "pool_text_tokens": False, "echo": "", "plain_echo": "",
        "text_length": 0, "max_length": 128, "instruction_template": "Instruct: {instruction}\nQuery:", "plain_prompt": "",
        "query_suffix": "", "example_template": "", "prompts": {},
    }  # fmt: skip
    base, embedder = find_base(str(folder)), Embedder.load(folder)
    tokenizer_state = embedder.tokenizer.hf_tokenizer.backend_tokenizer.to_str()
    recorded = hashlib.sha256(json.dumps([base.hash(), recorded_spec, tokenizer_state], sort_keys=True).encode()).hexdigest()
    new, old = (open_frozen_encoder(str(folder), tmp_path, recorded_hash=known) for known in ("", recorded))
    assert new.hash != recorded == old.hash
    query = INPUTS[:1]
    assert not np.allclose(new.encode(query), old.encode(query), atol=1e-3)
    assert open_frozen_encoder(str(folder), tmp_path, recorded_hash="of another model").hash == new.hash


def test_hash_depends_on_weights_tokenizer_and_spec(
    own_folder: Path, bert_folder: Path, encoder: FrozenEncoder, base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    assert encoder.identity == {"name": str(own_folder), "hash": encoder.hash}
    prompts = shutil.copytree(own_folder, tmp_path / "prompts")
    write_spec(prompts, find_base(str(own_folder)).spec.replace(prompts=PROMPTS | {"query": "? "}))
    weights = tiny.write_folder(tmp_path / "weights", "qwen3", seed=1)
    shutil.copy(own_folder / "jaxembed.json", weights)
    tokenizer = shutil.copytree(own_folder, tmp_path / "tokenizer")
    state = json.loads((tokenizer / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (tokenizer / "tokenizer.json").write_text(json.dumps(state))
    bert = shutil.copytree(bert_folder, tmp_path / "bert")
    (bert / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "? "}}))
    folders = [own_folder, prompts, weights, tokenizer, base_folder("qwen3"), bert_folder, bert]
    hashes = [open_frozen_encoder(str(folder), tmp_path / "cache").hash for folder in folders]
    assert hashes[0] == encoder.hash
    assert len(set(hashes)) == len(hashes)


def test_models_that_cannot_be_opened_are_refused(
    own_folder: Path, foreign_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_error(name: object) -> str:
        with pytest.raises(UserError) as error:
            open_frozen_encoder(str(name), tmp_path / "cache")
        return str(error.value)

    assert "neither a folder with a config.json" in read_error(tmp_path / "nothing")
    assert "a preset has no weights" in read_error("preset:tiny")
    damaged = shutil.copytree(own_folder, tmp_path / "damaged")
    (damaged / "jaxembed.json").write_text("{")
    (damaged / "modules.json").write_text("[]")
    assert "jaxembed.json: not valid JSON" in read_error(damaged)
    bare = shutil.copytree(foreign_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert read_error(bare) == f"{bare}: has no weights in safetensors files. Save it again with sentence-transformers."
    (bare / "model.safetensors").write_bytes(b"?")
    assert read_error(bare).startswith(f"{bare}: sentence-transformers cannot load it (")
    with pytest.raises(UserError, match=r"loaded by sentence-transformers, which cannot split a model .*\. Omit --fsdp"):
        open_frozen_encoder(str(foreign_folder), tmp_path / "cache", make_mesh(fsdp=2))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert read_error(foreign_folder) == "sentence-transformers is not installed. Run pip install '.[eval]'."


def test_vectors_that_are_not_finite_are_refused_and_not_stored(own_folder: Path, tmp_path: Path) -> None:
    model = open_frozen_encoder(str(own_folder), tmp_path)
    broken = dataclasses.replace(model, encode_group=lambda texts, prompt: np.full((len(texts), 32), np.nan, np.float32))
    with pytest.raises(UserError, match="ours: returns vectors that are not finite"):
        broken.encode(INPUTS)
    assert np.isfinite(model.encode(INPUTS)).all()


def make_builder(folder: Path, **encoders: Any) -> BatchBuilder:
    """Build batches of queries with one or two negatives (of two slots), and of labels whose documents have an instruction."""
    pairs = [
        {"query": f"query {i}", "pos": [f"positive {i}"], "neg": [f"negative {i} {j}" for j in range(1 + i % 2)]}
        for i in range(12)
    ]
    labels = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    sources = []
    for name, rows, options in (
        ("pairs", pairs, {"instructions": ["Find it", "Seek it"], "few_shot": {"most": 1}}),
        ("labels", labels, {"instructions": ["Sort it"], "document_instruction": "Name it"}),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(open_source(SourceConfig(path=str(path), **options), folder))
    tokenizer = TextTokenizer(tiny.build_tokenizer(), EmbeddingSpec(max_length=256))
    sampler = BatchSampler(sources=sources, tokenizer=tokenizer, hard_negatives=2, seed=0)
    return BatchBuilder(sampler=sampler, row_length=256, shards=make_all_shards(2), **encoders)


def test_batch_has_the_vector_of_each_text(encoder: FrozenEncoder, tmp_path: Path) -> None:
    build = make_builder(tmp_path, guide=encoder.encode)
    ids = np.arange(20)
    batch, examples = build(3, ids).batch, build.sampler.sample(3, ids)
    assert batch.teacher is None
    guide = batch.guide
    assert (guide.queries.shape, guide.documents.shape, guide.documents.dtype) == ((20, 32), (20, 3, 32), np.float32)
    assert any(example.few_shot for example in examples), "a guide does not see in-context examples"
    embedder = Embedder.load(encoder.name)
    absent_documents = 0
    for i, example in enumerate(examples):
        query_vector = embedder.encode([example.query], instruction=example.instruction)[0]
        np.testing.assert_allclose(guide.queries[i], query_vector, atol=1e-6)
        texts = [example.positive, *example.negatives]
        options = {"instruction": "Name it"} if example.document_instruction else {"prompt_name": "document"}
        np.testing.assert_allclose(guide.documents[i, : len(texts)], embedder.encode(texts, **options), atol=1e-6)
        assert not guide.documents[i, len(texts) :].any()
        assert ((batch.doc_slot[i] < 0) == (np.arange(3) >= len(texts))).all()
        absent_documents += 3 - len(texts)
    assert absent_documents > 4


def test_batches_of_a_run_have_vectors_of_guide_and_teacher(encoder: FrozenEncoder, tmp_path: Path) -> None:
    """Another thread builds the batches, for a mesh of more devices than the encoders use."""

    def encode_lengths(texts: Sequence[EncoderInput]) -> np.ndarray:
        return np.array([[len(text.text), 1.0] for text in texts], np.float32)

    build = make_builder(tmp_path, guide=encoder.encode, teacher=encode_lengths)
    plan = BatchPlan(build.sampler.sources, 8, seed=0)
    mesh = make_mesh(2)
    with jax.set_mesh(mesh):
        for step, host in enumerate(iter_batches(plan, build, 0, 3)):
            expected = build(step, plan[step]).batch
            placed = put_batch(mesh, host.batch)
            for a, b in ((placed.guide, expected.guide), (placed.teacher, expected.teacher)):
                assert np.array_equal(a.queries, b.queries) and np.array_equal(a.documents, b.documents)
            assert placed.guide.queries.shape == (8, 32) and placed.teacher.documents.shape == (8, 3, 2)


class StubModel(torch.nn.Module):
    """What sentence-transformers' loss reads from a model, besides its vectors."""

    tokenizer, max_seq_length = tiny.build_tokenizer(), 64

    def __init__(self, name: str):
        super().__init__()
        self.name = name


GUIDED = InfoNCEConfig(temperature=0.1, guide="a model")
DIRECTIONS = ("query_document", "query_query", "document_document")


@pytest.mark.parametrize(
    ("choices", "options", "negatives"),
    [
        ({"directions": DIRECTIONS}, {}, 0),
        ({"directions": DIRECTIONS[:2], "guide_margin": 0.1}, {"contrast_positives": False, "margin": 0.1}, 1),
        (
            {"guide_margin": 0.2, "guide_margin_kind": "relative"},
            {"contrast_positives": False, "contrast_anchors": False, "margin": 0.2, "margin_strategy": "relative"},
            1,
        ),
    ],
    ids=["all", "absolute margin", "relative margin"],
)
def test_guide_masks_as_in_sentence_transformers(
    encoder: FrozenEncoder, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any], options: dict[str, Any], negatives: int
) -> None:
    """Compare loss and gradients under the vectors of a real guide, which recognizes the related texts."""
    from sentence_transformers.sentence_transformer.losses import gist_embed

    random, width = np.random.default_rng(3), 6
    words = ["guitar", "dog", "values", "stage", "night", "home"]
    queries = [f"{word} {i % 3}" for i, word in enumerate(words)]
    documents = [[f"a {word} {i}", f"the {word} of {i}"][: 1 + negatives] for i, word in enumerate(words)]
    inputs = [EncoderInput(query, "query", "") for query in queries]
    inputs += [EncoderInput(text, "document", "") for row in documents for text in row]
    guide_queries, guide_documents = np.split(encoder.encode(inputs), [len(queries)])
    guide_queries[0] *= -1  # a positive with a score below zero
    guide = [guide_queries, guide_documents.reshape(len(queries), 1 + negatives, -1)]
    q, d = (jnp.array(draw_unit_vectors(random, *shape), jnp.float32) for shape in ((6, width), (6, 1 + negatives, width)))
    batch = make_batch(queries, documents).replace(guide=FrozenVectors(*map(jax.device_put, guide)))
    config = GUIDED.model_copy(update=choices)

    def loss(q: jax.Array, d: jax.Array, config: InfoNCEConfig) -> tuple[jax.Array, Any]:
        return info_nce(config, EncodedBatch(l2_normalize(q), l2_normalize(d), batch, jnp.full(6, 1 / 6), jax.random.key(0)))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (value, metrics), gradients = gradient(q, d, config)
    plain = config.model_copy(update={"guide": None, "guide_margin": 0.0})
    unmasked, unmasked_metrics = jax.jit(loss, static_argnums=2)(q, d, plain)
    assert 1 < float(metrics["negatives"]) < float(unmasked_metrics["negatives"]) - 0.5
    assert abs(float(value) - float(unmasked)) > 1e-2

    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, d)]
    columns = [[x[0], *x[1].swapaxes(0, 1)] for x in (leaves, [torch.tensor(x) for x in guide])]
    features = [{"model": vectors, "guide": guide_vectors} for vectors, guide_vectors in zip(*columns, strict=True)]
    monkeypatch.setattr(gist_embed, "embed_columns", lambda model, features: [column[model.name] for column in features])
    reference = gist_embed.GISTEmbedLoss(StubModel("model"), StubModel("guide"), temperature=0.1, **options)(features, None)
    reference.backward()
    assert float(value) == pytest.approx(float(reference.detach()), rel=1e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        expected = leaf.grad.numpy()
        assert np.linalg.norm(expected) > 1e-3
        assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected)
