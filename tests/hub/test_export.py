"""Exported folders consist of stock classes and give the vectors of the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed.hub
from helpers import tiny
from helpers.loading import load_model
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats.sentence_transformers import TOKEN_POOLING_FILE
from jaxembed.hub import stock_folder
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.readers import FOLDER_NAME
from jaxembed.hub.resolve import find_base
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.pooling import TRAINABLE_POOLINGS
from jaxembed.model.transformer import ComputeOptions

pytestmark = pytest.mark.usefixtures("one_device")

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
QUERY_PROMPT = "Instruct: Find the answer\nQuery:"
CARD = Card("test", "base")
FAMILIES = ("qwen2-mixed", "qwen3", "mistral", "mistral-window")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write bases whose tokenizers have a chat template, with which sentence-transformers would wrap every text."""
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny.write_folder(root / family, family, chat_template=CHAT_TEMPLATE) for family in FAMILIES}


def make_spec(**choices: object) -> EmbeddingSpec:
    return EmbeddingSpec(**{"max_length": 64, **choices})  # type: ignore[arg-type]


def load_tiny(base: Path, **choices: object) -> Embedder:
    return load_embedder(find_base(str(base)), make_spec(**choices), ComputeOptions(), make_mesh(1))


def load_with_random_pooling(base: Path, **choices: object) -> Embedder:
    """Load a base with a pooling that it has no weights of. All parameters of the pooling are random, none is zero."""
    spec, found = make_spec(**choices), find_base(str(base))
    model, params = load_model(base, spec)
    random = np.random.default_rng(0)
    pooling = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), params["pooling"])
    tokenizer = build_text_tokenizer(found.tokenizer(), spec, found)
    return Embedder(model, {**params, "pooling": pooling}, tokenizer, make_mesh(1), found.hf_config)


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("qwen3", {"include_instruction": False, "prompts": {"query": QUERY_PROMPT, "document": ""}}),
        ("qwen3", {"attention": "causal", "pooling": "last"}),
        ("mistral", {"attention": "causal", "pooling": "mean", "append_eos": False}),
        ("mistral-window", {"attention": "bidirectional", "pooling": "last"}),
        ("qwen2-mixed", {"attention": "bidirectional", "pooling": "weighted_mean"}),
        ("qwen3", {"attention": "causal", "pooling": "max"}),
        ("mistral", {"attention": "bidirectional", "pooling": "first"}),
    ],
)
def test_exported_folder_gives_the_vectors_of_the_model(bases, tmp_path, family, choices):
    model = load_tiny(bases[family], **choices)
    parity = export(model, tmp_path / "out", "float32", CARD).parity
    assert parity.error < 1e-5
    assert parity.cosine > 0.99999

    stock_model = load_sentence_transformer(tmp_path / "out")
    assert stock_model.tokenizer.chat_template is None
    texts = [*tiny.TEXTS, "one more " * 60, "x"]
    for prompt in ("", QUERY_PROMPT):
        stock_vectors = encode_torch(stock_model, texts, prompt, batch_size=3)
        np.testing.assert_allclose(model.encode(texts, prompt=prompt), stock_vectors, atol=1e-5)
        assert np.abs(stock_vectors[0] - stock_vectors[1]).max() > 1e-2, "the vectors of different texts must differ"


@pytest.mark.parametrize("pooling", TRAINABLE_POOLINGS)
def test_pooling_with_weights_is_exported_with_its_module(bases, tmp_path, pooling):
    model = load_with_random_pooling(bases["mistral"], pooling=pooling, latents=6, pooling_heads=4)
    parity = export(model, tmp_path / "out", "float32", CARD).parity
    assert parity.error < 1e-5
    mean_model = model.model.clone(spec=model.spec.replace(pooling="mean"))
    with_mean = dataclasses.replace(model, model=mean_model, _apply=None)
    assert np.abs(with_mean.encode(tiny.TEXTS) - model.encode(tiny.TEXTS)).max() > 1e-2, "the pooling must matter"
    # jaxembed loads the folder.
    out = tmp_path / "out"
    reloaded = Embedder.load(out)
    assert reloaded.spec == model.spec
    np.testing.assert_allclose(reloaded.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)
    # So does sentence-transformers, with jaxembed's own class. A changed file may compute something else.
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    stock_model = jaxembed.hub.load_sentence_transformer(str(out))
    np.testing.assert_allclose(encode_torch(stock_model, tiny.TEXTS, ""), model.encode(tiny.TEXTS), atol=1e-5)
    with (out / TOKEN_POOLING_FILE.name).open("a") as code:
        code.write("# changed\n")
    with pytest.raises(UserError, match=r"token_pooling\.py: missing or changed"):
        load_sentence_transformer(out)


def test_first_layers_are_a_model_that_can_be_exported(bases, tmp_path):
    base = bases["qwen2-mixed"]
    shallow = load_tiny(base).keep_first_layers(2)
    export(shallow, tmp_path / "out", "float32", CARD)
    reloaded = Embedder.load(tmp_path / "out")
    assert reloaded.model.transformer.windows == (4, None)
    np.testing.assert_allclose(reloaded.encode(tiny.TEXTS), shallow.encode(tiny.TEXTS), atol=1e-6)
    complete = load_tiny(base)
    assert np.abs(complete.encode(tiny.TEXTS) - shallow.encode(tiny.TEXTS)).max() > 1e-2
    np.testing.assert_allclose(
        Embedder.load(base, layers=2).encode(["x"]),
        load_tiny(base, max_length=128).keep_first_layers(2).encode(["x"]),
        atol=1e-6,
    )
    for count in (0, 4):
        with pytest.raises(UserError, match=rf"layers: {count} is out of range \(this model has 3\)"):
            complete.keep_first_layers(count)


def test_latent_weights_are_those_of_each_text(bases):
    model = load_with_random_pooling(bases["mistral"], pooling="latent_attention", latents=6, pooling_heads=3)
    weights = model.latent_weights(tiny.TEXTS)
    assert weights.shape == (len(tiny.TEXTS), 3, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    np.testing.assert_allclose(model.latent_weights(tiny.TEXTS[3:4])[0], weights[3], atol=1e-5)
    with pytest.raises(UserError, match=r"this model has mean pooling \(expected latent attention\)"):
        load_tiny(bases["mistral"]).latent_weights(["x"])


def test_base_without_weights_of_its_pooling_is_refused(bases):
    with pytest.raises(UserError, match=r"has no weights for its latent_attention pooling\. Train it"):
        load_tiny(bases["qwen3"], pooling="latent_attention")


def test_mask_that_stock_classes_lack_is_refused(bases, tmp_path):
    with pytest.raises(UserError, match=r"model\.attention: prefix cannot be exported"):
        export(load_tiny(bases["qwen3"], attention="prefix"), tmp_path / "out", "float32", CARD)


def test_round_trip_gives_the_same_model(bases, tmp_path):
    model = load_tiny(bases["qwen3"], attention="causal", pooling="last", prompts={"query": QUERY_PROMPT})
    export(model, tmp_path / "out", "float32", CARD)
    reloaded = Embedder.load(tmp_path / "out")
    assert reloaded.spec == model.spec
    np.testing.assert_allclose(reloaded.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)
    probes = json.loads((tmp_path / "out" / "probe.json").read_text())[:3]
    vectors = reloaded.encode([row["text"] for row in probes], prompt=probes[0]["prompt"])
    np.testing.assert_allclose(vectors, [row["vector"] for row in probes], atol=1e-6)


def test_spec_is_read_from_sentence_transformers_files(bases, tmp_path):
    choices = {"attention": "causal", "pooling": "last", "prompts": {"query": "q:"}, "matryoshka_dims": (8, 16)}
    model = load_tiny(bases["mistral"], **choices)
    export(model, tmp_path / "out", "float32", CARD)
    (tmp_path / "out" / "jaxembed.json").unlink()
    assert Embedder.load(tmp_path / "out").spec == model.spec.replace(prompts={"query": "q:", "document": ""})


def test_bfloat16_may_differ_as_much_as_transformers_own_cast(bases, tmp_path, caplog):
    out = tmp_path / "out"
    parity = export(load_tiny(bases["qwen3"]), out, "bfloat16", CARD).parity
    assert 1e-5 < parity.error <= parity.allowed
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    # What readers cannot do with the folder is said.
    for limit in (
        "sentence-transformers 3, 4, infinity: refused: a bidirectional model needs transformers 5.2 or newer",
        "TEI: close: computes in float16 or float32, not in bfloat16",
    ):
        assert f"{out}: {limit}" in caplog.messages


def test_card_contains_recipe_scores_and_prompts(bases, tmp_path, capsys):
    """Its check against probe.json prints a cosine of 1."""
    choices = {
        "prompts": {"query": QUERY_PROMPT, "document": ""},
        "query_suffix": "?",
        "matryoshka_dims": (16, 8),
        "max_length": 128,
    }
    model = load_tiny(bases["qwen3"], **choices)
    card = Card("my-model", "some/base", "step 7", "train: {steps: 7}", {"functions/ndcg_at_10": 0.5})
    export(model, tmp_path / "out", "float32", card)
    text = (tmp_path / "out" / "README.md").read_text()
    scores, cut = "| functions/ndcg_at_10 | 0.5000 |", "truncate_dim=8, normalize_embeddings=True"
    for expected in ("# my-model", "some/base", "step 7", "train: {steps: 7}", scores, 'prompt_name="query"', cut):
        assert expected in text
    code = text.split("## Check")[1].split("```python\n")[1].split("```")[0].replace(FOLDER_NAME, str(tmp_path / "out"))
    exec(code, {"model": load_sentence_transformer(tmp_path / "out")})
    assert float(capsys.readouterr().out) == pytest.approx(1)


def test_tokenizer_that_transformers_reads_differently_is_refused(tmp_path):
    """transformers gives every qwen2 folder Qwen2's own pre-tokenizer, whatever its tokenizer.json says."""
    base = tiny.write_folder(tmp_path / "qwen2", "qwen2")
    model = load_tiny(base)
    other = tiny.build_tokenizer()
    other.backend_tokenizer.pre_tokenizer = tiny.pre_tokenizers.Sequence(
        [tiny.pre_tokenizers.CharDelimiterSplit("e"), tiny.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.tokenizer.hf_tokenizer._tokenizer = other.backend_tokenizer
    with pytest.raises(UserError, match="Stock transformers tokenizes texts differently"):
        export(model, tmp_path / "out", "float32", CARD)
    assert not (tmp_path / "out").exists()


def test_wrong_weights_are_refused(bases, tmp_path, monkeypatch):
    model = load_tiny(bases["qwen3"])
    save = stock_folder.save_params

    def save_larger(path: Path, params: Any, prefixes: Any, convert: Any, *family: str) -> None:
        save(path, params, prefixes, lambda x: convert(x) * 1.05, *family)

    monkeypatch.setattr(stock_folder, "save_params", save_larger)
    with pytest.raises(UserError, match="not written, because the exported vectors differ"):
        export(model, tmp_path / "out", "float32", CARD)
    assert list(tmp_path.iterdir()) == []
