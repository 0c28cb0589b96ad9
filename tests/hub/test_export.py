"""An exported folder is stock, and gives the model's own vectors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed.hub
from helpers import tiny
from helpers.loading import load
from helpers.runs import command
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub import export as module
from jaxembed.hub.base import find_base
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import from_base
from jaxembed.hub.restore import text_tokenizer
from jaxembed.model.decoder import Compute
from jaxembed.model.pooling import TRAINED

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
QUERY = "Instruct: Find the answer\nQuery:"


def embedder(base: Path, **choices: object) -> Embedder:
    spec = EmbeddingSpec(**{"max_length": 64, **choices})  # type: ignore[arg-type]
    return from_base(find_base(str(base)), spec, Compute(), make_mesh(1))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases whose tokenizers carry a chat template, with which sentence-transformers would wrap every text."""
    root = tmp_path_factory.mktemp("bases")
    return {f: tiny.folder(root / f, f, chat_template=CHAT) for f in ("qwen2-mixed", "qwen3", "mistral", "mistral-window")}


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("qwen3", {"attention": "bidirectional", "pooling": "mean", "prompts": {"query": QUERY, "document": ""}}),
        ("qwen3", {"attention": "causal", "pooling": "last", "include_instruction": True}),
        ("mistral", {"attention": "causal", "pooling": "mean", "append_eos": False}),
        ("mistral-window", {"attention": "bidirectional", "pooling": "last"}),
        ("qwen2-mixed", {"attention": "bidirectional", "pooling": "weighted_mean"}),
        ("qwen3", {"attention": "causal", "pooling": "max"}),
        ("mistral", {"attention": "bidirectional", "pooling": "first", "include_instruction": True}),
    ],
)
def test_stock_folder_gives_the_same_vectors(bases, tmp_path, family, choices):
    model = embedder(bases[family], **choices)
    parity = module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    assert parity.error < 1e-5
    assert parity.cosine > 0.99999

    stock = module.load_sentence_transformer(tmp_path / "out")
    assert stock.tokenizer.chat_template is None
    texts = [*tiny.TEXTS, "one more " * 60, "x"]
    for prompt in ("", QUERY):
        theirs = module.encode_torch(stock, texts, prompt, batch_size=3)
        np.testing.assert_allclose(model.encode(texts, prompt=prompt), theirs, atol=1e-5)
        assert np.abs(theirs[0] - theirs[1]).max() > 1e-2, "the vectors of different texts must differ"


@pytest.mark.parametrize("pooling", TRAINED)
def test_a_pooling_with_weights_brings_its_own_module(bases, tmp_path, pooling):
    model = with_random_pooling(embedder_of_run(bases["mistral"], pooling=pooling, latents=6, pooling_heads=4))
    parity = module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    assert parity.error < 1e-5
    out = tmp_path / "out"
    mean = dataclasses.replace(
        model, model=model.model.clone(spec=model.spec.replace(pooling="mean")), _apply=None
    )
    assert np.abs(mean.encode(tiny.TEXTS) - model.encode(tiny.TEXTS)).max() > 1e-2
    again = Embedder.load(out)
    assert again.spec == model.spec
    np.testing.assert_allclose(again.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    stock = jaxembed.hub.load_sentence_transformer(str(out))
    np.testing.assert_allclose(module.encode_torch(stock, tiny.TEXTS, ""), model.encode(tiny.TEXTS), atol=1e-5)
    with (out / module.TORCH_POOLING.name).open("a") as code:
        code.write("# changed\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        module.load_sentence_transformer(out)


def test_first_layers_are_a_model_of_their_own(bases, tmp_path):
    cut = embedder(bases["qwen2-mixed"]).first_layers(2)
    module.export(cut, tmp_path / "out", "float32", Card("test", "base"))
    again = Embedder.load(tmp_path / "out")
    assert again.model.decoder.windows == (4, None)
    np.testing.assert_allclose(again.encode(tiny.TEXTS), cut.encode(tiny.TEXTS), atol=1e-6)
    whole = embedder(bases["qwen2-mixed"])
    assert np.abs(whole.encode(tiny.TEXTS) - cut.encode(tiny.TEXTS)).max() > 1e-2
    np.testing.assert_allclose(
        Embedder.load(bases["qwen2-mixed"], layers=2).encode(["x"]),
        embedder(bases["qwen2-mixed"], max_length=128).first_layers(2).encode(["x"]),
        atol=1e-6,
    )
    for count in (0, 4):
        with pytest.raises(UserError, match=f"layers is {count}; expected 1 to 3"):
            whole.first_layers(count)


def test_latent_weights_are_a_texts_own(bases):
    model = with_random_pooling(embedder_of_run(bases["mistral"], pooling="latent_attention", latents=6, pooling_heads=3))
    weights = model.latent_weights(tiny.TEXTS)
    assert weights.shape == (len(tiny.TEXTS), 3, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    np.testing.assert_allclose(model.latent_weights(tiny.TEXTS[3:4])[0], weights[3], atol=1e-5)
    with pytest.raises(UserError, match="mean pooling, which has no latents"):
        embedder(bases["mistral"]).latent_weights(["x"])


def embedder_of_run(base: Path, **choices: object) -> Embedder:
    """As a run starts: poolings that the base has no weights of are random."""
    spec = EmbeddingSpec(**{"max_length": 64, **choices})  # type: ignore[arg-type]
    model, params = load(base, spec)
    found = find_base(str(base))
    return Embedder(model, params, text_tokenizer(found.tokenizer(), spec, found), make_mesh(1), found)


def with_random_pooling(model: Embedder) -> Embedder:
    """Random numbers in place of the pooling's parameters, some of which are zero until trained."""
    random = np.random.default_rng(0)
    pooling = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), model.params["pooling"])
    return model.with_params({**model.params, "pooling": pooling})


def test_without_weights_of_its_pooling_a_base_is_not_a_model(bases):
    with pytest.raises(UserError, match="has no weights of its latent_attention pooling; train it"):
        embedder(bases["qwen3"], pooling="latent_attention")


def test_masks_that_stock_classes_do_not_know_are_refused(bases, tmp_path):
    with pytest.raises(UserError, match="attention prefix cannot be exported"):
        module.export(embedder(bases["qwen3"], attention="prefix"), tmp_path / "out", "float32", Card("test", "base"))


def test_round_trip_reads_the_same_model(bases, tmp_path):
    model = embedder(bases["qwen3"], attention="causal", pooling="last", prompts={"query": QUERY})
    module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    again = Embedder.load(tmp_path / "out")
    assert again.spec == model.spec
    np.testing.assert_allclose(again.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)
    probe = json.loads((tmp_path / "out" / "probe.json").read_text())
    np.testing.assert_allclose(
        again.encode([row["text"] for row in probe[:3]], prompt=probe[0]["prompt"]),
        [row["vector"] for row in probe[:3]],
        atol=1e-6,
    )


def test_folder_without_our_spec_is_read_from_sentence_transformers_files(bases, tmp_path):
    model = embedder(bases["mistral"], attention="causal", pooling="last", include_instruction=True, prompts={"query": "q:"})
    module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    (tmp_path / "out" / "jaxembed.json").unlink()
    assert Embedder.load(tmp_path / "out").spec == model.spec.__class__(
        **{**vars(model.spec), "prompts": {"query": "q:", "document": ""}}
    )


def test_bfloat16_is_judged_by_transformers_own_error(bases, tmp_path):
    done = command("jaxembed.export", str(bases["qwen3"]), str(tmp_path / "out"), "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert 1e-5 < told["largest_difference"] <= told["allowed"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_card_tells_recipe_scores_and_prompts(bases, tmp_path):
    model = embedder(bases["qwen3"], prompts={"query": QUERY, "document": ""})
    card = Card("my-model", "some/base", "step 7", "train: {steps: 7}", {"functions/ndcg_at_10": 0.5})
    module.export(model, tmp_path / "out", "float32", card)
    text = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "# my-model",
        "some/base",
        "step 7",
        "train: {steps: 7}",
        "| functions/ndcg_at_10 | 0.5000 |",
        'prompt_name="query"',
    ):
        assert told in text


def test_a_tokenizer_that_stock_code_reads_otherwise_is_refused(tmp_path):
    """transformers puts Qwen2's own splitting on a qwen2 folder, whatever its tokenizer.json says."""
    base = tiny.folder(tmp_path / "qwen2", "qwen2")
    model = embedder(base)
    odd = tiny.tokenizer()
    odd.backend_tokenizer.pre_tokenizer = tiny.pre_tokenizers.Sequence(
        [tiny.pre_tokenizers.CharDelimiterSplit("e"), tiny.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.tokenizer.hf_tokenizer._tokenizer = odd.backend_tokenizer
    with pytest.raises(UserError, match="tokenises otherwise"):
        module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    assert not (tmp_path / "out").exists()


def test_wrong_weights_are_refused(bases, tmp_path, monkeypatch):
    model = embedder(bases["qwen3"])
    save = module.save_params
    monkeypatch.setattr(module, "save_params", lambda *args: save(*args[:-1], lambda x: args[-1](x) * 1.05))
    with pytest.raises(UserError, match="not written"):
        module.export(model, tmp_path / "out", "float32", Card("test", "base"))
    assert list(tmp_path.iterdir()) == []
