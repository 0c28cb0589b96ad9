"""NV-Embed's layout: a tiny folder of the same form, compared with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.loading import min_cosine
from helpers.runs import make_config, write_base_and_data
from jaxembed import Embedder
from jaxembed.data.tokenize import load_tokenizer
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats.token_pooling import TokenPooling
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.export_nv_embed import export_nv_embed
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

INSTRUCTION = "Given a question, retrieve passages that answer it"
PROMPT = f"Instruct: {INSTRUCTION}\nQuery: "
TEXTS = [*tiny.TEXTS, "a text that is truncated at its end " * 20]
MAX_POSITIONS = 128  # of the tiny models


class TinyNVEmbed:
    """A tiny NV-Embed: bidirectional Mistral, latent attention with heads as wide as the model, masked mean."""

    def __init__(self) -> None:
        self.transformer = tiny.build_torch_model("mistral", causal=False)
        torch.manual_seed(1)
        self.latent = TokenPooling(32, "latent_attention", 6, 2)
        self.tokenizer = tiny.build_tokenizer(bos=True)

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {f"embedding_model.{name}": x for name, x in self.transformer.state_dict().items()}
        tensors |= {f"latent_attention_model.{name}": x for name, x in self.latent.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        self.tokenizer.save_pretrained(folder)
        text = {**tiny.SIZES, "head_dim": 16, "model_type": "bidir_mistral", "_name_or_path": "nvidia/NV-Embed-v2"}
        latent = {"model_type": "latent_attention", "num_latents_value": 6, "num_cross_heads": 2, "hidden_dim": 32}
        config = {
            "architectures": ["NVEmbedModel"], "model_type": "nvembed", "add_eos": True, "add_pad_token": True,
            "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"}, "is_mask_instruction": True, "mask_type": "b",
            "padding_side": "right", "text_config": text,
            "latent_attention_config": latent | {"latent_dim": 32, "cross_dim_head": 32, "output_normalize": True},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def encode(self, texts: list[str], instruction: str) -> np.ndarray:
        """Encode as the release does: append EOS, truncate, and leave out as many first tokens as the instruction has."""
        skipped_tokens = len(self.tokenizer.tokenize(instruction))
        vectors = []
        for text in texts:
            ids = self.tokenizer(instruction + text + "</s>", truncation=True, max_length=MAX_POSITIONS)["input_ids"]
            with torch.no_grad():
                hidden = self.transformer(torch.tensor([ids])).last_hidden_state
                mask = torch.ones(1, len(ids), dtype=torch.long)
                tokens = self.latent({"token_embeddings": hidden, "attention_mask": mask})["token_embeddings"]
            vectors.append(torch.nn.functional.normalize(tokens[0, skipped_tokens:].mean(dim=0), dim=0).numpy())
        return np.stack(vectors)


@pytest.fixture(scope="module")
def nv_embed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyNVEmbed, Path]:
    model = TinyNVEmbed()
    return model, model.save(tmp_path_factory.mktemp("published") / "NV-Embed-v2")


def test_nv_embed_matches_its_release(nv_embed: tuple[TinyNVEmbed, Path]) -> None:
    reference, folder = nv_embed
    model = Embedder.load(folder)
    assert (model.spec.latents, model.spec.pooling_heads, model.spec.max_length) == (6, 2, MAX_POSITIONS)
    ours = model.encode(TEXTS, instruction=INSTRUCTION)
    assert min_cosine(ours, reference.encode(TEXTS, PROMPT)) > 0.99999
    assert min_cosine(model.encode(TEXTS), reference.encode(TEXTS, "")) > 0.99999
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    weights = model.latent_weights(TEXTS)
    assert weights.shape == (len(TEXTS), 2, 6)


def test_each_choice_of_nv_embed_changes_the_vectors(nv_embed: tuple[TinyNVEmbed, Path]) -> None:
    """The comparison above can fail: it would notice each of these changes."""
    reference, folder = nv_embed
    expected = reference.encode(TEXTS, PROMPT)
    base = find_base(str(folder))
    for change in (
        {"eos_as_text": False}, {"eos_as_text": False, "append_eos": True}, {"pool_last_instruction_token": False},
        {"attention": "causal"}, {"include_instruction": True},
    ):  # fmt: skip
        changed = load_embedder(base, base.spec.replace(**change), ComputeOptions(), make_mesh(1))
        assert min_cosine(changed.encode(TEXTS, instruction=INSTRUCTION), expected) < 0.9999, change


def test_loading_a_tokenizer_logs_nothing(nv_embed: tuple[TinyNVEmbed, Path], caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    try:
        load_tokenizer(nv_embed[1])
    finally:
        transformers.logging.disable_propagation()
    assert not caplog.records and transformers.logging.get_verbosity() == transformers.logging.WARNING


def test_nv_embed_can_be_fine_tuned_and_exported(
    nv_embed: tuple[TinyNVEmbed, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = nv_embed
    with pytest.raises(UserError, match="truncates EOS from long texts"):
        export(Embedder.load(folder), tmp_path / "whole", "float32", Card("nv", "base"))
    export_nv_embed(Embedder.load(folder), tmp_path / "whole", "float32")
    np.testing.assert_array_equal(Embedder.load(tmp_path / "whole").encode(TEXTS), Embedder.load(folder).encode(TEXTS))
    original, exported = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole"))
    assert original.keys() == exported.keys() and all(torch.equal(original[name], exported[name]) for name in original)
    root = write_base_and_data(tmp_path)
    overrides = f"model.base={folder}", "model.lora={rank: 2, alpha: 4}", "train.steps=3", "eval.sets=[]"
    config = make_config(root, "tuned", *overrides)
    train(config)
    assert not [record.message for record in caplog.records if record.levelname == "WARNING" and record.name == "jaxembed"]
    model = Embedder.load(root / "tuned")
    assert (model.spec.eos_as_text, model.spec.append_eos, model.spec.pool_last_instruction_token) == (False, True, True)
    export(model, tmp_path / "out", "float32", Card("nv", "base"))
    stock = load_sentence_transformer(tmp_path / "out")
    for prompt in ("", PROMPT):
        np.testing.assert_allclose(encode_torch(stock, TEXTS, prompt), model.encode(TEXTS, prompt=prompt), atol=1e-5)
    export_nv_embed(model, tmp_path / "own", "bfloat16")
    reloaded, short_texts = Embedder.load(tmp_path / "own"), [TEXTS[0], TEXTS[3]]
    assert reloaded.spec.eos_as_text
    assert 1e-4 < np.abs(reloaded.encode(short_texts) - model.encode(short_texts)).max() < 0.05
    with pytest.raises(UserError, match=r"cannot represent this model \(pooling 'mean'"):
        export_nv_embed(Embedder.load(root / "base"), tmp_path / "no", "float32")


def test_nv_embed_with_other_head_widths_is_refused(nv_embed: tuple[TinyNVEmbed, Path], tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((nv_embed[1] / "config.json").read_text())
    config["latent_attention_config"]["cross_dim_head"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cross_dim_head is 16 \(expected hidden_size, 32\)"):
        Embedder.load(tmp_path)
