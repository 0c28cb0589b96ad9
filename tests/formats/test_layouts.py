"""Published embedders as tiny folders in the layout of their repositories, compared with PyTorch under their own rules."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers

from helpers import tiny
from helpers.loading import min_cosine
from helpers.published_models import OTHER_PUBLISHED, PUBLISHED, Reference, edit_json
from helpers.runs import make_config, write_base_and_data
from jaxembed import Embedder
from jaxembed.config.spec import FewShotExample
from jaxembed.data.tokenize import TOKEN_BOUNDARY
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

INSTRUCTION = "Given a question, retrieve passages that answer it"
TEXTS = [*tiny.TEXTS, "a text that is cut at its end " * 20]
SHORT = tiny.TEXTS[:4]
ONE_STEP = (
    "train.steps=1", "train.batch_size=4", "mesh.data=1", "eval.sets=[]", "data.max_length=64", "model.unroll=false",
    "optim.learning_rate=1e-4", "optim.warmup_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def get_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    root = tmp_path_factory.mktemp("published")
    return functools.cache(lambda name: Reference(name, root))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the decoder under the adapters. LLM2Vec puts texts into a chat form for a decoder of this name."""
    return tiny.write_folder(tmp_path_factory.mktemp("decoders") / "Mistral-7B-Instruct-v0.2", "mistral")


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHER_PUBLISHED])
def test_published_model_gives_the_vectors_of_its_own_code(get_reference: Callable[[str], Reference], name: str) -> None:
    reference = get_reference(name)
    model = Embedder.load(reference.folder)
    plain, prompted = model.encode(TEXTS), model.encode(TEXTS, instruction=INSTRUCTION)
    assert min_cosine(plain, reference.encode(TEXTS)) > 0.9999
    assert min_cosine(prompted, reference.encode(TEXTS, INSTRUCTION)) > 0.9999
    assert np.abs(prompted[0] - prompted[1]).max() > 0.01, "different texts have different vectors"
    assert min_cosine(plain, prompted) < 0.999, "the instruction matters"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_trained_and_exported(get_reference: Callable[[str], Reference], name: str, tmp_path: Path) -> None:
    reference = get_reference(name)
    root = write_base_and_data(tmp_path)
    train(make_config(root, "tuned", f"model.base={reference.folder}", *ONE_STEP))
    before, model = Embedder.load(reference.folder), Embedder.load(root / "tuned")
    changed_fields = {key for key, value in vars(model.spec).items() if value != getattr(before.spec, key)}
    assert changed_fields <= {"max_length", "prompts"}
    assert model.spec.prompts["query"] == reference.published.prompt.format("Find it")
    assert 1e-5 < np.abs(model.encode(SHORT) - before.encode(SHORT)).max() < 0.02
    export(model, tmp_path / "out", "float32", Card("tuned", "base"))
    stock_model = load_sentence_transformer(tmp_path / "out")
    for prompt in (model.spec.plain_prompt, model.spec.build_prompt(INSTRUCTION)):
        np.testing.assert_allclose(encode_torch(stock_model, TEXTS, prompt), model.encode(TEXTS, prompt=prompt), atol=1e-5)
    default_vectors = stock_model.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(default_vectors, model.encode(TEXTS), atol=1e-5)


def test_repository_without_sentence_transformers_files_is_recognized_by_its_name(
    get_reference: Callable[[str], Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = get_reference("e5-mistral-7b-instruct")
    bare = tmp_path / "snapshots" / "0123"
    shutil.copytree(reference.folder, bare, ignore=shutil.ignore_patterns("*sentence*", "modules.json", "1_Pooling"))
    snapshots = {"intfloat/e5-mistral-7b-instruct": str(bare)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: snapshots[name])
    model = Embedder.load("intfloat/e5-mistral-7b-instruct")
    assert min_cosine(model.encode(SHORT, instruction=INSTRUCTION), reference.encode(SHORT, INSTRUCTION)) > 0.9999
    assert min_cosine(Embedder.load(bare).encode(SHORT), reference.encode(SHORT)) < 0.9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvidia/NV-Embed-v2", ("bidirectional", "latent_attention", "Instruct: T\nQuery: ", "")),
        ("HIT-TMG/KaLM-embedding-multilingual-mini-instruct-v1.5", ("causal", "mean", "Instruct: T \n Query: ", "")),
        ("KaLM-Embedding/KaLM-embedding-mini-v2.5", ("bidirectional", "mean", "Instruct: T \n Query: ", "")),
        ("Salesforce/SFR-Embedding-Mistral", ("causal", "last", "Instruct: T\nQuery: ", "")),
        ("Linq-AI-Research/Linq-Embed-Mistral", ("causal", "last", "Instruct: T\nQuery: ", "")),
        ("Alibaba-NLP/gte-Qwen1.5-7B-instruct", ("bidirectional", "last", "Instruct: T\nQuery: ", "")),
        ("NovaSearch/stella_en_1.5B_v5", ("bidirectional", "mean", "Instruct: T\nQuery: ", "")),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", ("bidirectional", "last", "Instruct: T\nQuery: ", "")),
        ("Qwen/Qwen3-Embedding-4B", ("causal", "last", "Instruct: T\nQuery:", "")),
        ("GritLM/GritLM-7B", ("bidirectional", "mean", "<|user|>\nT\n<|embed|>\n", "")),
        ("BAAI/bge-en-icl", ("causal", "last", "<instruct>T\n<query>", "\n<response>")),
        ("jspringer/echo-mistral-7b-instruct-meantoken", ("causal", "mean", "Instruct:\x1fT,\x1f", "")),
        ("McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp", ("bidirectional", "mean", "T ", "")),
    ],
)
def test_hub_id_selects_the_published_layout(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str, str, str]
) -> None:
    config = json.loads((mistral / "config.json").read_text())
    if "NV-Embed" in name:
        latent = {"cross_dim_head": config["hidden_size"]}
        config = {"model_type": "nvembed", "text_config": config, "latent_attention_config": latent}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **options: {name: str(tmp_path)}[hub_id])
    spec = find_base(name).spec
    assert (spec.attention, spec.pooling, spec.build_prompt("T"), spec.query_suffix) == expected


@pytest.mark.parametrize("offline", [True, False])
def test_hub_that_cannot_be_reached_is_explained_in_one_line(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("word " * 99) from OSError("no route to the hub, " * 20)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    reason = r"HF_HUB_OFFLINE is set" if offline else r"(no route to the hub, )+no route( to)?( the)? \.\.\."
    with pytest.raises(UserError, match=rf"not in the hub's cache, .* \({reason}\)\. Connect, or give a local folder\.$"):
        Embedder.load("nobody/nothing")


def test_folder_that_needs_its_own_code_is_refused(get_reference: Callable[[str], Reference], tmp_path: Path) -> None:
    shutil.copytree(get_reference("KaLM-embedding-multilingual-mini-v1").folder, tmp_path / "own")
    edit_json(tmp_path / "own" / "config.json", {"auto_map": {"AutoModel": "modeling_own.Own"}})
    assert find_base(str(tmp_path / "own")).spec.pooling == "mean"
    (tmp_path / "own" / "modules.json").unlink()
    with pytest.raises(UserError, match=r"\(expected jaxembed.json, .* modules.json, or .* NV-Embed, LLM2Vec, KaLM"):
        find_base(str(tmp_path / "own"))
    edit_json(tmp_path / "own" / "config.json", {"model_type": "qwen2_moe", "num_experts": 8})
    with pytest.raises(UserError, match=r"qwen2_moe is a mixture of experts \(num_experts\), .* Use a dense base"):
        find_base(str(tmp_path / "own"))
    edit_json(tmp_path / "own" / "config.json", {"model_type": "mixtral", "num_local_experts": 8}, drop=("num_experts",))
    with pytest.raises(UserError, match="mixtral is a mixture of experts"):
        find_base(str(tmp_path / "own"))


def load_bidirectional(folder: Path) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(str(folder), is_causal=False, attn_implementation="eager").eval()


def add_random_adapters(model: torch.nn.Module, base: Path, out: Path, seed: int) -> torch.nn.Module:
    """Save random adapters of `base` in `out`, and return the model with them merged."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(out))
    edit_json(out / "adapter_config.json", {"base_model_name_or_path": str(base)})
    return wrapped.merge_and_unload().eval()


def encode_llm2vec(model: torch.nn.Module, tokenizer: Any, texts: list[str], instruction: str = "") -> np.ndarray:
    """Encode texts as LLM2Vec's code does.

    The chat form encloses instruction and text. Of the last tokens, as many are pooled as the text with the end of the form
    has on its own.
    """
    prefix = f"{instruction} " if instruction else ""
    vectors = []
    for text in texts:
        ids = tokenizer(f"[INST] {prefix}{text} [/INST]")["input_ids"]
        pooled_tokens = len(tokenizer(f"{text} [/INST]", add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            pooled = model(torch.tensor([ids])).last_hidden_state[0, -pooled_tokens:].mean(dim=0)
        vectors.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(vectors)


def test_llm2vec_is_loaded_with_both_stages_of_adapters(mistral: Path, tmp_path: Path) -> None:
    first = tmp_path / "LLM2Vec-Mistral-7B-Instruct-v2-mntp"
    second = tmp_path / f"{first.name}-supervised"
    reference = add_random_adapters(load_bidirectional(mistral), mistral, first, 1)
    code = {"architectures": ["MistralEncoderModel"], "auto_map": {"AutoModel": "modeling_mistral_encoder.MistralEncoderModel"}}
    (first / "config.json").write_text(json.dumps({"model_type": "mistral", **code}))
    reference = add_random_adapters(reference, mistral, second, 2)  # its files name the decoder, not the first stage
    (second / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "mean", "max_length": 128, "doc_max_length": 90}))
    tokenizer = tiny.build_tokenizer(bos=True)
    model = Embedder.load(second)
    for instruction in ("", INSTRUCTION):
        ours = model.encode(SHORT, instruction=instruction)
        assert min_cosine(ours, encode_llm2vec(reference, tokenizer, SHORT, instruction)) > 0.9999
    assert len(model.tokenizer(["word " * 200], ["[INST] "]).ids[0]) < 128  # cut at doc_max_length, [/INST] kept
    assert min_cosine(Embedder.load(first).encode(SHORT), model.encode(SHORT)) < 0.99
    with pytest.raises(UserError, match="pools as many tokens as a text has by itself"):
        export(model, tmp_path / "whole", "float32", Card("l2v", "base"))

    root = write_base_and_data(tmp_path)
    train(make_config(root, "tuned", f"model.base={second}", "model.lora={rank: 2, alpha: 4}", *ONE_STEP))
    export_adapters(root / "tuned", tmp_path / "third", "last")
    tuned = Embedder.load(root / "tuned")
    np.testing.assert_allclose(Embedder.load(tmp_path / "third").encode(SHORT), tuned.encode(SHORT), atol=1e-5)
    assert min_cosine(tuned.encode(SHORT), model.encode(SHORT)) > 0.99


def encode_echo(model: torch.nn.Module, tokenizer: Any, texts: list[str], instruction: str, pooling: str) -> np.ndarray:
    """Encode texts as Echo's parser does: each piece is tokenized and cut to 40 tokens on its own.

    The second copy and EOS are pooled.
    """

    def tokens(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False)["input_ids"][:40]

    vectors = []
    for text in texts:
        before = ["<s>Instruct:", f"{instruction},", "\nQuery:"] if instruction else ["<s>Document:"]
        again = "\nQuery again:" if instruction else "\nDocument again:"
        first_tokens = [token for piece in (*before, text, again) for token in tokens(piece)]
        ids = [*first_tokens, *tokens(text), tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0, len(first_tokens) :]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        vectors.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_echo_gives_the_vectors_of_its_own_code(pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"echo-mistral-7b-instruct-{pooling}token"
    tiny.write_folder(folder, "mistral", prefix_space=True)
    edit_json(folder / "config.json", {"max_position_embeddings": 256})
    base = find_base(str(folder))
    assert (base.spec.text_length, base.spec.max_length) == (300, 256)
    spec = base.spec.replace(text_length=40)
    model = load_embedder(base, spec, ComputeOptions(), make_mesh(1))
    reference, tokenizer = transformers.AutoModel.from_pretrained(str(folder)).eval(), tiny.build_tokenizer(prefix_space=True)
    for instruction in ("", "Find it"):
        theirs = encode_echo(reference, tokenizer, TEXTS, instruction, pooling)
        assert min_cosine(model.encode(TEXTS, instruction=instruction), theirs) > 0.9999
    with pytest.raises(UserError, match="presents a text twice"):
        export(model, tmp_path / "out", "float32", Card("echo", "base"))
    joined = spec.replace(**{key: getattr(spec, key).replace(TOKEN_BOUNDARY, "") for key in ("echo", "plain_echo")})
    wrong = load_embedder(base, joined, ComputeOptions(), make_mesh(1))
    assert min_cosine(wrong.encode(TEXTS), encode_echo(reference, tokenizer, TEXTS, "", pooling)) < 0.9999
    if pooling == "mean":
        root = write_base_and_data(tmp_path)
        train(make_config(root, "tuned", f"model.base={folder}", *ONE_STEP))
        tuned = Embedder.load(root / "tuned")
        assert tuned.spec == base.spec.replace(max_length=64, prompts=tuned.spec.prompts)
        assert 0.9 < min_cosine(tuned.encode(SHORT), model.encode(SHORT)) < 1 - 1e-6


def test_bge_en_icl_is_recognized_by_its_tokens(mistral: Path, tmp_path: Path) -> None:
    shutil.copytree(mistral, tmp_path / "some-name")
    plain = find_base(str(tmp_path / "some-name")).spec
    tokens = {str(300 + i): {"content": token} for i, token in enumerate(("<instruct>", "<query>", "<response>"))}
    edit_json(tmp_path / "some-name" / "tokenizer_config.json", {"added_tokens_decoder": tokens})
    spec = find_base(str(tmp_path / "some-name")).spec
    assert spec != plain
    assert (spec.attention, spec.pooling, spec.append_eos) == ("causal", "last", True)
    shots = [FewShotExample("T", "q", "r")]
    assert spec.build_prompt("T", shots) == "<instruct>T\n<query>q\n<response>r\n\n<instruct>T\n<query>"
    assert spec.query_suffix == "\n<response>"
