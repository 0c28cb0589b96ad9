"""Encoders (BERT, XLM-R, ModernBERT): exported, adapted, and read with the prompts of their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.loading import load_model
from jaxembed import Embedder
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions

Folder = Callable[[str], Path]


def load_tiny(base: Path, **choices: Any) -> Embedder:
    return load_embedder(find_base(str(base)), EmbeddingSpec(**{"max_length": 64, **choices}), ComputeOptions(), make_mesh(1))


@pytest.mark.parametrize(
    ("family", "choices", "tokens"),
    [
        ("bert", {"pooling": "mean", "prompts": {"query": "ask: ", "document": ""}, "fixed_prompts": True}, (2, 3)),
        ("bert", {"pooling": "first", "include_instruction": False, "projection": 0}, (2, 3)),
        ("xlm-roberta", {"pooling": "max"}, (0, 1)),
        ("modernbert", {"pooling": "first"}, (0, 1)),
    ],
)
def test_exported_encoder_gives_the_vectors_of_the_model(
    base_folder: Folder, tmp_path: Path, family: str, choices: dict[str, Any], tokens: tuple[int, int]
) -> None:
    """Texts are cut at 64 tokens, with [CLS] and [SEP] around them. The folder is a stock one: its class has the mask."""
    model, out = load_tiny(base_folder(family), **choices), tmp_path / "out"
    parity = export(model, out, "float32", Card("test", "base")).parity
    assert parity.error < 1e-5 and parity.cosine > 0.99999
    stock = load_sentence_transformer(out)
    for prompt in ("", "ask: "):
        np.testing.assert_allclose(model.encode(tiny.TEXTS, prompt=prompt), encode_torch(stock, tiny.TEXTS, prompt), atol=1e-5)
    ids = model.tokenizer(["a " * 100], [""]).ids[0]
    assert (len(ids), ids[0], ids[-1]) == (64, *tokens)
    config, base_config = (json.loads((folder / "config.json").read_text()) for folder in (out, base_folder(family)))
    assert not {"is_causal", "use_bidirectional_attention", "head_dim", "rope_theta"} & config.keys()
    assert config["pad_token_id"] == base_config["pad_token_id"], "the positions of XLM-R follow that row"
    assert config.get("position_embedding_type") == (None if family == "modernbert" else "absolute"), "vLLM reads it"
    (out / "jaxembed.json").unlink()
    spec = Embedder.load(out).spec
    prompts = {"query": "", "document": "", **model.spec.prompts}
    assert spec == model.spec.replace(prompts=prompts, fixed_prompts=True)


@pytest.mark.parametrize(("family", "layers"), [("bert", 2), ("modernbert", 1)])
def test_first_layers_of_an_encoder_can_be_exported(base_folder: Folder, tmp_path: Path, family: str, layers: int) -> None:
    """The first layer of ModernBERT has a norm less, and a window of its own."""
    shallow = load_tiny(base_folder(family)).keep_first_layers(layers)
    export(shallow, tmp_path / "out", "float32", Card("test", "base"))
    np.testing.assert_allclose(Embedder.load(tmp_path / "out").encode(tiny.TEXTS), shallow.encode(tiny.TEXTS), atol=1e-6)


def test_adapters_of_an_encoder_are_read_by_peft(base_folder: Folder, tmp_path: Path) -> None:
    """The targets that BERT has not are left out. PEFT finds the modules, whose names end alike."""
    import peft
    import torch
    import transformers

    lora, base = LoraConfig(rank=2, alpha=4.0), base_folder("bert")
    _, params = load_model(base, EmbeddingSpec(), lora=lora)
    random = np.random.default_rng(0)
    attention, mlp = (params["decoder"]["layers"][name] for name in ("attention", "mlp"))
    assert set(mlp) == {"up", "down"}
    for linear in (*attention.values(), *mlp.values()):
        linear["lora_b"] = random.normal(0, 0.3, linear["lora_b"].shape).astype(np.float32)
    write_adapters(tmp_path, params, lora, str(base), "bert")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"].startswith(r".*\.\d+\.(attention\.self\.query|")
    ids = [2, 10, 50, 3]
    stock = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), tmp_path).eval()
    with torch.no_grad():
        hidden = stock(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    adapted = Embedder.load(tmp_path)
    text = adapted.tokenizer.hf_tokenizer.decode(ids[1:3])
    assert adapted.tokenizer([text], [""]).ids[0].tolist() == ids
    vector = adapted.encode([text])[0]
    np.testing.assert_allclose(vector, torch.nn.functional.normalize(hidden, dim=0).numpy(), atol=1e-5)
    assert np.abs(vector - Embedder.load(base).encode([text])[0]).max() > 1e-2


def test_adapters_of_shared_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PEFT folders of modernbert are not supported, because its projections share modules"):
        write_adapters(tmp_path, {}, LoraConfig(), "base", "modernbert")


@pytest.mark.parametrize(
    ("name", "pooling", "query", "document", "is_fixed"),
    [
        ("e5-small-v2", "mean", "query: ", "passage: ", True),
        ("multilingual-e5-base", "mean", "query: ", "passage: ", True),
        ("multilingual-e5-large-instruct", "mean", "Instruct: T\nQuery: ", "", False),
        ("bge-base-en-v1.5", "first", "Represent this sentence for searching relevant passages: ", "", True),
        ("mxbai-embed-large-v1", "first", "Represent this sentence for searching relevant passages: ", "", True),
        ("UAE-Large-V1", "first", "Represent this sentence for searching relevant passages: ", "", True),
        ("bge-small-zh-v1.5", "first", "\u4e3a\u8fd9\u4e2a\u53e5\u5b50", "", True),
        ("all-MiniLM-L6-v2", "mean", "", "", True),
        ("GIST-small-Embedding-v0", "mean", "", "", True),
    ],
)
def test_layouts_of_published_encoders(
    base_folder: Folder, tmp_path: Path, name: str, pooling: str, query: str, document: str, is_fixed: bool
) -> None:
    """The files say the pooling, if the layout does not. Each side has its prompt, whatever the instruction."""
    folder = tmp_path / name
    folder.mkdir()
    for path in base_folder("bert").iterdir():
        (folder / path.name).symlink_to(path)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    spec = find_base(str(folder)).spec
    assert (spec.attention, spec.pooling, spec.append_eos, spec.fixed_prompts) == ("bidirectional", pooling, True, is_fixed)
    assert spec.build_prompt("T", side="query").startswith(query) and bool(spec.build_prompt("T", side="query")) == bool(query)
    assert spec.build_prompt("", side="document") == document


def test_a_position_table_shorter_than_the_texts_is_refused(base_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: 126 is too long \(.* has 125 positions\)"):
        load_tiny(base_folder("xlm-roberta"), max_length=126)


def test_a_mask_that_the_class_lacks_is_refused(base_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"model\.attention: bert is an encoder \(found causal; expected bidirectional\)"):
        load_tiny(base_folder("bert"), attention="causal")


def test_weights_of_another_layout_are_refused(base_folder: Folder, tmp_path: Path) -> None:
    for path in base_folder("qwen3").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(base_folder("bert") / "config.json")
    with pytest.raises(
        UserError, match=r"the weights do not match config\.json \(missing: embeddings\.word_embeddings\.weight"
    ):
        Embedder.load(tmp_path)
