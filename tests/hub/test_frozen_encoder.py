"""Guides and teachers: their vectors, those that are not computed again, where they lie in a batch, what a guide masks."""

from __future__ import annotations

import dataclasses
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

from helpers import tiny
from helpers.text_batches import draw_unit_vectors, make_batch
from jaxembed import Embedder
from jaxembed.config import InfoNCEConfig, SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import BatchBuilder, FrozenVectors, EncoderInput
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.pipeline import iter_batches
from jaxembed.data.sources import open_source
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.hub.base import find_base, write_spec
from jaxembed.hub.frozen_encoder import FrozenEncoder, open_frozen_encoder
from jaxembed.losses.encoded import Encoded
from jaxembed.losses.infonce import info_nce
from jaxembed.model.layers import unit_length

PROMPTS = {"query": "search: ", "document": "passage: "}
RAW = [
    *(EncoderInput(text, "query", "Find it") for text in tiny.TEXTS[:3]),
    *(EncoderInput(text, side, "") for text in tiny.TEXTS[2:5] for side in ("query", "document")),
    EncoderInput("short", "document", "Find it"),
]


@pytest.fixture(scope="module")
def ours(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our own with a template and stored prompts."""
    folder = tmp_path_factory.mktemp("others") / "ours"
    shutil.copytree(base_folder("qwen3"), folder)
    write_spec(folder, EmbeddingSpec(max_length=64, instruction_template="Do {instruction}:", prompts=PROMPTS))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert_folder(tmp_path_factory.mktemp("others") / "bert", {"query": "ask: "})


@pytest.fixture(scope="module")
def opened(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return open_frozen_encoder(str(ours), tmp_path_factory.mktemp("cache"))


def counted(model: FrozenEncoder) -> tuple[FrozenEncoder, list[tuple[list[str], str]]]:
    """The model, and the calls that it will make."""
    calls: list[tuple[list[str], str]] = []

    def run(texts: list[str], lead: str) -> np.ndarray:
        calls.append((texts, lead))
        return model.run(texts, lead)

    return dataclasses.replace(model, run=run), calls


def test_vectors_are_those_of_encode(ours: Path, opened: FrozenEncoder) -> None:
    """Under an instruction by the model's template, else under the prompt stored for the side."""
    embedder, got = Embedder.load(ours), opened.encode(RAW)
    assert got.dtype == np.float32 and got.shape == (len(RAW), opened.width) == (10, 32)
    for vector, (text, side, instruction) in zip(got, RAW, strict=True):
        given = {"instruction": instruction} if instruction else {"prompt_name": side}
        np.testing.assert_allclose(vector, embedder.encode([text], **given)[0], atol=1e-6)
    assert np.abs(got[3] - got[4]).max() > 1e-3  # one text, as query and as document


def test_a_model_of_another_kind_is_read_by_sentence_transformers(theirs: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    with pytest.raises(UserError, match="model_type bert is not supported"):
        find_base(str(theirs))
    model, calls = counted(open_frozen_encoder(str(theirs), tmp_path))
    reference = SentenceTransformer(str(theirs), device="cpu")
    got = model.encode(RAW)
    for vector, (text, side, _) in zip(got, RAW, strict=True):
        expected = reference.encode(text, prompt="ask: " if side == "query" else "", normalize_embeddings=True)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert (model.width, len(calls)) == (24, 2)
    assert np.array_equal(open_frozen_encoder(str(theirs), tmp_path).encode(RAW), got)


def test_texts_seen_before_are_not_encoded_again(ours: Path, tmp_path: Path) -> None:
    model, calls = counted(open_frozen_encoder(str(ours), tmp_path / "cache"))
    first = model.encode([*RAW, RAW[0]])
    assert [lead for _, lead in calls] == ["Do Find it:", "search: ", "passage: "]  # a call each
    assert calls[0][0] == [*tiny.TEXTS[:3], "short"]
    assert np.array_equal(first[0], first[-1])
    new = EncoderInput("something new", "query", "")
    second = model.encode([RAW[4], new, RAW[3]])
    assert calls[3:] == [(["something new"], "search: ")]
    moved = shutil.copytree(ours, tmp_path / "moved")  # the same model under another name
    again, calls = counted(open_frozen_encoder(str(moved), tmp_path / "cache"))
    assert np.array_equal(again.encode(RAW), first[:-1])
    assert np.array_equal(again.encode([new]), second[1:2])
    assert calls == []


def test_a_model_is_known_by_weights_tokenizer_and_rule(
    ours: Path, theirs: Path, opened: FrozenEncoder, base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    assert opened.identity == {"name": str(ours), "hash": opened.hash}
    changed = shutil.copytree(ours, tmp_path / "prompts")
    write_spec(changed, find_base(str(ours)).spec.replace(prompts=PROMPTS | {"query": "? "}))
    weights = tiny.folder(tmp_path / "weights", "qwen3", seed=1)
    shutil.copy(ours / "jaxembed.json", weights)
    words = shutil.copytree(ours, tmp_path / "words")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    bert = shutil.copytree(theirs, tmp_path / "bert")
    (bert / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "? "}}))
    names = [ours, changed, weights, words, base_folder("qwen3"), theirs, bert]
    hashes = [open_frozen_encoder(str(name), tmp_path / "cache").hash for name in names]
    assert hashes[0] == opened.hash and len(set(hashes)) == len(hashes)


def test_what_cannot_be_opened_is_told(ours: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(name: object) -> str:
        with pytest.raises(UserError) as error:
            open_frozen_encoder(str(name), tmp_path / "cache")
        return str(error.value)

    assert "neither a folder with a config.json" in error_of(tmp_path / "nothing")
    assert "a preset has no weights" in error_of("preset:tiny")
    damaged = shutil.copytree(ours, tmp_path / "damaged")
    (damaged / "jaxembed.json").write_text("{")
    (damaged / "modules.json").write_text("[]")
    assert "jaxembed.json: not valid JSON" in error_of(damaged)
    bare = shutil.copytree(theirs, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert error_of(bare) == f"{bare}: has no weights in safetensors files; save it anew with sentence-transformers"
    (bare / "model.safetensors").write_bytes(b"?")
    assert error_of(bare).startswith(f"{bare}: sentence-transformers cannot load it (")
    with pytest.raises(UserError, match="loaded by sentence-transformers, which does not split a model; leave --fsdp out"):
        open_frozen_encoder(str(theirs), tmp_path / "cache", make_mesh(fsdp=2))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert error_of(theirs) == 'sentence-transformers is not installed; pip install "jaxembed[eval]"'


def test_vectors_that_are_not_finite_are_refused_and_not_kept(ours: Path, tmp_path: Path) -> None:
    model = open_frozen_encoder(str(ours), tmp_path)
    broken = dataclasses.replace(model, run=lambda texts, lead: np.full((len(texts), 32), np.nan, np.float32))
    with pytest.raises(UserError, match="ours: gives vectors that are not finite"):
        broken.encode(RAW)
    assert np.isfinite(model.encode(RAW)).all()


def builder(folder: Path, **others: Any) -> BatchBuilder:
    """Queries with one or two negatives where a batch has room for two, and labels whose documents have an instruction."""
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
    tokenizer = TextTokenizer(tiny.tokenizer(), EmbeddingSpec(max_length=256))
    sampler = BatchSampler(sources=sources, tokenizer=tokenizer, hard_negatives=2, seed=0)
    return BatchBuilder(sampler=sampler, row_length=256, shards=all_shards(2), **others)


def test_the_vectors_of_a_batch_lie_at_its_texts(opened: FrozenEncoder, tmp_path: Path) -> None:
    build = builder(tmp_path, guide=opened.encode)
    ids = np.arange(20)
    batch, examples = build(3, ids).batch, build.sampler.sample(3, ids)
    assert batch.teacher is None
    found = batch.guide
    assert (found.queries.shape, found.documents.shape, found.documents.dtype) == ((20, 32), (20, 3, 32), np.float32)
    assert any(example.few_shot for example in examples)  # which are not shown to a guide
    embedder = Embedder.load(opened.name)
    absent = 0
    for i, example in enumerate(examples):
        asked = embedder.encode([example.query], instruction=example.instruction)[0]
        np.testing.assert_allclose(found.queries[i], asked, atol=1e-6)
        texts = [example.positive, *example.negatives]
        given = {"instruction": "Name it"} if example.document_instruction else {"prompt_name": "document"}
        np.testing.assert_allclose(found.documents[i, : len(texts)], embedder.encode(texts, **given), atol=1e-6)
        assert not found.documents[i, len(texts) :].any()
        assert ((batch.doc_slot[i] < 0) == (np.arange(3) >= len(texts))).all()
        absent += 3 - len(texts)
    assert absent > 4


def test_they_come_with_the_batches_of_a_run(opened: FrozenEncoder, tmp_path: Path) -> None:
    """Built in another thread, beside steps on a mesh of more devices; a guide and a teacher are apart."""

    def other(texts: Sequence[EncoderInput]) -> np.ndarray:
        return np.array([[len(text.text), 1.0] for text in texts], np.float32)

    build = builder(tmp_path, guide=opened.encode, teacher=other)
    plan = BatchPlan(build.sampler.sources, 8, seed=0)
    mesh = make_mesh(2)
    with jax.set_mesh(mesh):
        for step, host in enumerate(iter_batches(plan, build, 0, 3)):
            expected = build(step, plan[step]).batch
            placed = put_batch(mesh, host.batch)
            for a, b in ((placed.guide, expected.guide), (placed.teacher, expected.teacher)):
                assert np.array_equal(a.queries, b.queries) and np.array_equal(a.documents, b.documents)
            assert placed.guide.queries.shape == (8, 32) and placed.teacher.documents.shape == (8, 3, 2)


class ForTorch(torch.nn.Module):
    """What sentence-transformers' loss asks of a model beside its vectors."""

    tokenizer, max_seq_length = tiny.tokenizer(), 64

    def __init__(self, name: str):
        super().__init__()
        self.name = name


GUIDED = InfoNCEConfig(temperature=0.1, guide="a model")
WITHIN = ("query_document", "query_query", "document_document")


@pytest.mark.parametrize(
    ("choices", "options", "negatives"),
    [
        ({"directions": WITHIN}, {}, 0),
        ({"directions": WITHIN[:2], "guide_margin": 0.1}, {"contrast_positives": False, "margin": 0.1}, 1),
        (
            {"guide_margin": 0.2, "guide_margin_kind": "relative"},
            {"contrast_positives": False, "contrast_anchors": False, "margin": 0.2, "margin_strategy": "relative"},
            1,
        ),
    ],
    ids=["all", "absolute margin", "relative margin"],
)
def test_a_guide_masks_as_in_sentence_transformers(
    opened: FrozenEncoder, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any], options: dict[str, Any], negatives: int
) -> None:
    """Loss and gradients on a real guide's vectors of texts, of which the related ones are told."""
    from sentence_transformers.sentence_transformer.losses import gist_embed

    random, width = np.random.default_rng(3), 6
    words = ["guitar", "dog", "values", "stage", "night", "home"]
    queries = [f"{word} {i % 3}" for i, word in enumerate(words)]
    documents = [[f"a {word} {i}", f"the {word} of {i}"][: 1 + negatives] for i, word in enumerate(words)]
    raw = [EncoderInput(query, "query", "") for query in queries]
    raw += [EncoderInput(text, "document", "") for row in documents for text in row]
    guided = np.split(opened.encode(raw), [len(queries)])
    guided[0][0] *= -1  # a positive with a score below zero
    guide = [guided[0], guided[1].reshape(len(queries), 1 + negatives, -1)]
    q, d = (jnp.array(draw_unit_vectors(random, *shape), jnp.float32) for shape in ((6, width), (6, 1 + negatives, width)))
    batch = make_batch(queries, documents).replace(guide=FrozenVectors(*map(jnp.asarray, guide)))
    config = GUIDED.model_copy(update=choices)

    def loss(q: jax.Array, d: jax.Array, config: InfoNCEConfig) -> tuple[jax.Array, Any]:
        return info_nce(config, Encoded(unit_length(q), unit_length(d), batch, jnp.full(6, 1 / 6), jax.random.key(0)))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (value, told), of_vectors = gradient(q, d, config)
    unmasked, all_told = loss(q, d, config.model_copy(update={"guide": None, "guide_margin": 0.0}))
    assert 1 < float(told["negatives"]) < float(all_told["negatives"]) - 0.5
    assert abs(float(value) - float(unmasked)) > 1e-2

    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, d)]
    columns = [[x[0], *x[1].swapaxes(0, 1)] for x in (leaves, [torch.tensor(x) for x in guide])]
    features = [{"ours": mine, "guide": other} for mine, other in zip(*columns, strict=True)]
    monkeypatch.setattr(gist_embed, "embed_columns", lambda model, features: [column[model.name] for column in features])
    reference = gist_embed.GISTEmbedLoss(ForTorch("ours"), ForTorch("guide"), temperature=0.1, **options)(features, None)
    reference.backward()
    assert float(value) == pytest.approx(float(reference.detach()), rel=1e-5)
    for mine, leaf in zip(of_vectors, leaves, strict=True):
        other = leaf.grad.numpy()
        assert np.linalg.norm(other) > 1e-3
        assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other)
