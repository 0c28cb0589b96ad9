"""Gemma 3 and EmbeddingGemma: exported with both masks, and with Dense modules after the pooling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers import tiny
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec, HiddenProjection
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.reader_rules import ServedModel
from jaxembed.hub.readers import judge_readers
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions

Folder = Callable[[str], Path]
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_exported_folder_has_mask_windows_and_rotary_bases(base_folder: Folder, tmp_path: Path, attention: str) -> None:
    """A bidirectional mask halves the windows. transformers does so when it reads the field of the mask."""
    spec = EmbeddingSpec(max_length=64, attention=attention)  # type: ignore[arg-type]
    model = load_embedder(find_base(str(base_folder("gemma3_text"))), spec, ComputeOptions(), make_mesh(1))
    assert export(model, tmp_path / "out", "float32", Card("test", "base")).parity.error < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["sliding_window"], config["use_bidirectional_attention"]) == (5, attention == "bidirectional")
    assert "is_causal" not in config
    # transformers 4 knows that field.
    tokenizer, stock = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("tokenizer_config.json", "config_sentence_transformers.json")
    )
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    version = stock.get("requirements", {}).get("transformers", {}).get("specifier")
    assert version == (">=4.57" if attention == "bidirectional" else None)
    verdicts = {verdict.reader.name: verdict for verdict in judge_readers(ServedModel(spec, model.model.transformer))}
    reasons = " ".join(verdicts["sentence-transformers 5"].reasons)
    assert ("from transformers 4.57" in reasons, "5.2" in reasons) == (attention == "bidirectional", False)
    # In the form of published models: TEI reads no rotary positions by kind of layer.
    rope = {"rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "_sliding_window_pattern": 2}
    assert {key: config[key] for key in rope} == rope
    assert "rope_parameters" not in config and "rope_scaling" not in config
    (tmp_path / "out" / "jaxembed.json").unlink()
    reloaded = Embedder.load(tmp_path / "out")
    assert reloaded.spec.attention == attention
    np.testing.assert_allclose(reloaded.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)


def test_scaled_rotary_positions_are_written_in_the_form_of_published_models(base_folder: Folder, tmp_path: Path) -> None:
    base = shutil.copytree(base_folder("gemma3_text"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    (base / "config.json").write_text(json.dumps(config))
    model = load_embedder(find_base(str(base)), EmbeddingSpec(max_length=64), ComputeOptions(), make_mesh(1))
    assert export(model, tmp_path / "out", "float32", Card("test", "base")).parity.error < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    reloaded = Embedder.load(tmp_path / "out")
    assert reloaded.model.transformer == model.model.transformer
    np.testing.assert_allclose(reloaded.encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-6)


def test_the_card_says_how_to_ask_for_a_causal_mask(base_folder: Folder, tmp_path: Path) -> None:
    """The arguments give the causal model back: transformers has halved the windows of the folder's config."""
    base = base_folder("gemma3_text")
    spec = EmbeddingSpec(max_length=64, attention="bidirectional")
    model = load_embedder(find_base(str(base)), spec, ComputeOptions(), make_mesh(1))
    export(model, tmp_path / "out", "float32", Card("test", "base", prompt="a question"))
    card = (tmp_path / "out" / "README.md").read_text()
    (arguments,) = re.findall(r"AutoModelForCausalLM\.from_pretrained\(\"PATH_OF_THIS_FOLDER\", (.*)\)", card)
    assert arguments == "use_bidirectional_attention=False, sliding_window=5"
    ids = torch.arange(5, 35)[None]
    folders = ((base, {}), (tmp_path / "out", {"use_bidirectional_attention": False, "sliding_window": 5}))
    hidden = [transformers.AutoModel.from_pretrained(path, **keys)(ids).last_hidden_state.detach() for path, keys in folders]
    torch.testing.assert_close(*hidden)


@pytest.fixture(scope="module")
def embedding_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny folder in the layout of EmbeddingGemma."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    root = tmp_path_factory.mktemp("gemma")
    tiny.build_torch_model("gemma3_text", causal=False).save_pretrained(root / "body")
    tiny.build_tokenizer(bos=True).save_pretrained(root / "body")
    torch.manual_seed(0)
    identity: Any = {"bias": False, "activation_function": torch.nn.Identity()}
    parts = [modules.Transformer(str(root / "body"), max_seq_length=64), modules.Pooling(32, pooling_mode="mean")]
    parts += [modules.Dense(32, 48, **identity), modules.Dense(48, 24, **identity), modules.Normalize()]
    model = SentenceTransformer(modules=parts, prompts=PROMPTS, device="cpu")
    model.save(str(root / "embeddinggemma-300m"), create_model_card=False)
    return root / "embeddinggemma-300m"


def test_embedding_gemma_is_read_and_exported(embedding_gemma: Path, tmp_path: Path) -> None:
    model, stock = Embedder.load(embedding_gemma), load_sentence_transformer(embedding_gemma)
    spec = model.spec
    assert (spec.attention, spec.pooling, spec.projection, spec.normalize) == ("bidirectional", "mean", 24, True)
    assert spec.hidden_projections == (HiddenProjection(width=48),)
    assert spec.build_prompt("anything", side="document") == PROMPTS["document"] == spec.prompts["document"]
    export(model, tmp_path / "out", "float32", Card("test", "base"))
    written, reloaded = load_sentence_transformer(tmp_path / "out"), Embedder.load(tmp_path / "out")
    assert [type(module).__name__ for module in written] == [type(module).__name__ for module in stock]
    for prompt in ("", *PROMPTS.values()):
        vectors = model.encode(tiny.TEXTS, prompt=prompt)
        assert vectors.shape == (len(tiny.TEXTS), 24)
        for other in (stock, written):
            np.testing.assert_allclose(encode_torch(other, tiny.TEXTS, prompt), vectors, atol=1e-5)
        np.testing.assert_allclose(reloaded.encode(tiny.TEXTS, prompt=prompt), vectors, atol=1e-6)
    assert reloaded.spec == spec


def test_dense_modules_whose_widths_do_not_chain_are_refused(embedding_gemma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in embedding_gemma.iterdir():
        (folder / path.name).symlink_to(path)
    dense = folder / "3_Dense"
    config = json.loads((dense / "config.json").read_text())
    dense.unlink()
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(config | {"in_features": 40}))
    with pytest.raises(
        UserError, match=r"3_Dense/config\.json: in_features is 40 \(expected 48, the width of the vectors before"
    ):
        find_base(str(folder))
