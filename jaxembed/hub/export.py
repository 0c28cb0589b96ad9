"""Writes a model as an ordinary Hugging Face / sentence-transformers folder, and proves that it gives the same vectors.

The folder is built beside its place and moved there only when the proof holds. torch is imported only here and in
evaluation.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import drop_eos
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.files import read_json_value, write_json
from jaxembed.formats.nv_embed import nv_embed_config, nv_embed_spec
from jaxembed.formats.peft import write_adapters
from jaxembed.formats.weights import POOLING_FOLDER, part_files, save_params
from jaxembed.hub.base import POOLING_MODES, write_spec
from jaxembed.hub.card import Card, adapters_card, model_card
from jaxembed.hub.embedder import Embedder, from_run
from jaxembed.hub.restore import RunParts, open_trained
from jaxembed.model.decoder import Compute
from jaxembed.model.families import FAMILIES

log = logging.getLogger("jaxembed")

TORCH_POOLING = Path(__file__).with_name("token_pooling.py")  # travels with models whose pooling has weights
INSTRUCTION = "Given a question, find the passage that answers it"
PROBES = [
    "What is a contrastive loss?",
    "A short text.",
    "naïve café, 数学 and an emoji 🙂",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "Embeddings of longer texts must not depend on the padding of shorter ones in the same batch. " * 8,
    "This text is longer than the model reads, so its end is cut and only its special tokens stay. " * 400,
]
TOLERANCE = 1e-4  # largest difference of a number of a unit vector, in float32
LEAST_COSINE = 0.9999
BFLOAT16_TOLERANCE = 0.05  # where there is no PyTorch model to judge by
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BFLOAT16_SLACK = 1.5  # times transformers' own bfloat16 error


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far the exported folder's unit vectors are from JAX's in float32.

    `error` is the largest difference of a number, `allowed` what it may be, `cosine` the least cosine of two vectors.
    """

    error: float
    allowed: float
    cosine: float

    @property
    def told(self) -> str:
        return (
            f"the exported vectors differ from the model's by {self.error:.2e} "
            f"(allowed {self.allowed:.2e}, cosine {self.cosine:.6f})"
        )

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray, allowed: float) -> Parity:
        return cls(float(np.abs(ours - theirs).max()), allowed, float(np.sum(ours * theirs, axis=1).min()))


def export(embedder: Embedder, out: Path, dtype: str, card: Card) -> Parity:
    """Writes `out`, with weights in float32 or bfloat16; returns the parity that was measured.

    `out` must not exist, the folder around it must. `UserError` if the folder's vectors differ from the model's.
    """
    sentence_transformers()
    _check_stock(embedder.spec)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        made = _build(embedder, Path(scratch), "float32")
        probes = {prompt: _probes(embedder, prompt) for prompt in _prompts(embedder.spec)}
        vectors = _vectors(embedder, probes)
        torch_vectors = _torch_vectors(made, embedder.spec, probes)
        parity = Parity.of(np.tile(vectors, (2, 1)), torch_vectors, TOLERANCE)
        if parity.error > parity.allowed or parity.cosine < LEAST_COSINE:
            raise UserError(_refusal(out, parity, embedder, made))
        if dtype == "bfloat16":
            own = Parity.of(torch_vectors, _torch_vectors(made, embedder.spec, probes, dtype), 0).error
            made = _build(embedder, Path(scratch), dtype)
            parity = Parity.of(np.tile(vectors, (2, 1)), _torch_vectors(made, embedder.spec, probes), BFLOAT16_SLACK * own)
            if parity.error > parity.allowed:
                raise UserError(_refusal(out, parity, embedder, made))
        write_spec(made, embedder.spec)
        _write_probe(made, probes, vectors)
        (made / "README.md").write_text(model_card(embedder.spec, card, parity.error), encoding="utf-8")
        for path in made.rglob("*.safetensors"):
            path.chmod(0o644)  # written as private files; a server must be able to read them
        shutil.move(str(made), str(out))
    return parity


def _check_stock(spec: EmbeddingSpec) -> None:
    """`UserError` where stock classes do not treat texts as this spec does."""
    if spec.attention not in ("causal", "bidirectional"):
        raise UserError(f"model.attention {spec.attention} cannot be exported: stock classes know causal and bidirectional")
    if spec.pool_last_instruction_token and spec.pooling in POOLING_MODES:
        raise UserError(f"{spec.pooling} pooling with an instruction's last token cannot be exported by stock classes")
    if spec.echo:
        raise UserError("model.echo presents a text twice, which stock classes do not: such a model cannot be exported")
    if spec.pool_text_tokens:
        raise UserError(
            "this model pools as many tokens as a text has by itself, which stock classes do not; write its adapters alone"
        )
    if spec.eos_as_text:
        raise UserError(
            "this model cuts EOS off long texts, which stock classes do not; export with --layout nv-embed, or train it further"
        )


def export_nv_embed(embedder: Embedder, out: Path, dtype: str) -> Parity:
    """Writes `out` in NV-Embed's own layout, weights in float32 or bfloat16; returns the parity of what is read back.

    There EOS is part of a text when it is cut, so that texts beyond the limit lose it; they are left out of the check.
    `UserError` for a model that this layout cannot hold.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        made = Path(scratch) / "nv-embed"
        made.mkdir()
        decoder, spec = embedder.model.decoder, embedder.spec
        config = nv_embed_config(exported_config(embedder, dtype), spec, decoder.width)
        read_back = nv_embed_spec(config, decoder, str(out))
        settled = ("max_length", "prompts", "append_eos", "eos_as_text")
        differing = [key for key, value in vars(read_back).items() if key not in settled and value != getattr(spec, key)]
        if differing or decoder.family != "mistral":
            told = ", ".join(f"{key} {getattr(spec, key)!r}" for key in differing) or f"a {decoder.family} decoder"
            raise UserError(f"{out}: not written: NV-Embed's layout cannot hold this model ({told})")
        write_json(made / "config.json", config)
        prefixes = {"decoder": "embedding_model.", "pooling": "latent_attention_model."}
        save_params(made / "model.safetensors", embedder.params, prefixes, lambda x: x.astype(DTYPES[dtype]))
        tokenizer = copy.deepcopy(embedder.tokenizer.hf)
        drop_eos(tokenizer)
        tokenizer.save_pretrained(made)
        probes = {prompt: _whole(embedder, prompt) for prompt in _prompts(spec)}
        allowed = TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
        parity = Parity.of(_vectors(embedder, probes), _vectors(Embedder.load(made), probes), allowed)
        if parity.error > parity.allowed:
            raise UserError(f"{out}: not written: {parity.told}")
        shutil.move(str(made), str(out))
    return parity


def export_adapters(run_dir: Path, out: Path, checkpoint: str) -> Parity:
    """Writes a run's adapters as the PEFT folder `out`, or named ones as a folder each below it, with spec and tokenizer.

    Whoever reads such a folder adds the adapters to the base's own weights, so its vectors are checked against those of the
    adapters on these. Where the run held its base in fewer bits, its own vectors differ from both: the parity's `cosine` is
    that to the run's own. `UserError` on a run without adapters, and on one that trained its pooling or projection too,
    which such a folder cannot hold.
    """
    mesh = make_mesh()
    run = open_trained(run_dir, Compute(), mesh, checkpoint)
    if run.model.lora is None:
        raise UserError(f"{run_dir}: trained without model.lora; export it whole, without --adapters")
    if whole := run.trained.keys() - {"decoder"}:
        raise UserError(f"{run_dir}: its {' and '.join(sorted(whole))} was trained too; export it whole, without --adapters")
    rounded = run.model.lora.base_dtype != "float32"
    exact = open_trained(run_dir, Compute(), mesh, checkpoint, "float32") if rounded else run
    parities = []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        for name in run.model.adapters or (None,):
            parts, made = exact.of(name), Path(scratch) / "adapters" / (name or "")
            made.mkdir(parents=True)
            _write_adapter(made, parts)
            embedder, vectors = from_run(parts, mesh), Embedder.load(made).encode(PROBES)
            parity = Parity.of(embedder.encode(PROBES), vectors, TOLERANCE)
            if parity.error > parity.allowed:
                raise UserError(_refusal(out, parity, embedder, made))
            if rounded:
                own = embedder.with_params(run.of(name).merged[1]).encode(PROBES)
                parity = dataclasses.replace(parity, cosine=Parity.of(own, vectors, TOLERANCE).cosine)
            parities.append(parity)
        shutil.move(str(Path(scratch) / "adapters"), str(out))
    worst = Parity(max(p.error for p in parities), TOLERANCE, min(p.cosine for p in parities))
    if rounded:
        log.warning(
            "the adapters were trained on a base in %s and will be added to it as its files are: a cosine of at least %.6f "
            "to the run's own vectors",
            run.model.lora.base_dtype, worst.cosine,
        )  # fmt: skip
    return worst


def _write_adapter(folder: Path, parts: RunParts) -> None:
    assert parts.model.lora is not None
    write_adapters(folder, parts.trained, parts.model.lora, parts.base.name)
    parts.tokenizer.hf.save_pretrained(folder)
    write_spec(folder, parts.base.spec)
    (folder / "README.md").write_text(adapters_card(parts.base.spec, parts.base.name), encoding="utf-8")


def _build(embedder: Embedder, scratch: Path, dtype: str) -> Path:
    """A folder saved by sentence-transformers' own classes, out of our config, weights and tokenizer."""
    st = sentence_transformers()
    from sentence_transformers.sentence_transformer import modules
    from torch import nn

    raw, made, spec = scratch / f"raw-{dtype}", scratch / dtype, embedder.spec
    raw.mkdir()
    config = exported_config(embedder, dtype)
    (raw / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    target = DTYPES[dtype]
    save_params(raw / "model.safetensors", embedder.params, {"decoder": ""}, lambda x: x.astype(target))
    tokenizer = copy.deepcopy(embedder.tokenizer.hf)
    tokenizer.chat_template = None  # with one, sentence-transformers wraps every text in a chat
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.model_max_length = "right", spec.max_length
    tokenizer.save_pretrained(raw)
    transformer = modules.Transformer(str(raw), max_seq_length=spec.max_length)
    mode = POOLING_MODES.get(spec.pooling, "mean")
    pooling = modules.Pooling(embedder.model.decoder.width, mode, include_prompt=spec.include_instruction)
    chain = [transformer, pooling]
    if spec.projection:
        activation = {"identity": nn.Identity(), "tanh": nn.Tanh()}[spec.projection_activation]
        chain.append(modules.Dense(embedder.model.decoder.width, spec.projection, spec.projection_bias, activation))
    if spec.normalize:
        chain.append(modules.Normalize())
    prompts = {**spec.prompts, **({"document": spec.plain_prompt} if spec.plain_prompt else {})}
    model = st.SentenceTransformer(modules=chain, prompts=prompts, similarity_fn_name="cosine", device="cpu")
    model.default_prompt_name = "document" if spec.plain_prompt else None
    model.save(str(made), create_model_card=False)
    shutil.rmtree(raw)
    if spec.projection:
        save_params(part_files(made)["projection"], embedder.params, {"projection": ""}, lambda x: x.astype(target))
    if spec.pooling not in POOLING_MODES:
        _add_token_pooling(made, embedder, lambda x: x.astype(target))
    return made


def _add_token_pooling(made: Path, embedder: Embedder, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """Puts the pooling's weights and PyTorch module between the transformer and the stock mean of a saved folder."""
    spec, folder = embedder.spec, made / POOLING_FOLDER
    pooled_prompt_tokens = int(spec.pool_last_instruction_token)
    folder.mkdir()
    sizes = {"latent_count": spec.latents, "heads": spec.pooling_heads, "pooled_prompt_tokens": pooled_prompt_tokens}
    write_json(folder / "config.json", {"width": embedder.model.decoder.width, "kind": spec.pooling, **sizes})
    save_params(folder / "model.safetensors", embedder.params, {"pooling": ""}, convert)
    shutil.copy(TORCH_POOLING, made)
    transformer, *rest = read_json_value(made / "modules.json")
    ours = {"path": POOLING_FOLDER, "type": f"{TORCH_POOLING.stem}.TokenPooling"}
    chain = [transformer, ours, *rest]
    write_json(made / "modules.json", [module | {"idx": i, "name": str(i)} for i, module in enumerate(chain)])


def exported_config(embedder: Embedder, dtype: str) -> dict[str, Any]:
    """The base's config as the exported model needs it: its mask, its type, no head, the tokenizer's special tokens."""
    tokenizer = embedder.tokenizer.hf
    config = dict(embedder.base.hf_config) | {
        "architectures": [FAMILIES[embedder.model.decoder.family].architecture],
        "is_causal": embedder.spec.attention == "causal",
        "dtype": dtype,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    config.pop("torch_dtype", None)
    config.pop("auto_map", None)
    return config


def _prompts(spec: EmbeddingSpec) -> list[str]:
    """The prompts of texts without an instruction and with one, and those stored with the model."""
    return list(dict.fromkeys([spec.plain_prompt, spec.prompt(INSTRUCTION), *spec.prompts.values()]))


def _whole(embedder: Embedder, prompt: str) -> list[str]:
    """The probes that the model reads to their end."""
    lengths = embedder.tokenizer.untruncated_lengths(PROBES, [prompt] * len(PROBES))
    return [text for text, length in zip(PROBES, lengths, strict=True) if length <= embedder.spec.max_length]


def _probes(embedder: Embedder, prompt: str) -> list[str]:
    """The probes to compare under a prompt: where stock classes would cut a suffix, those that are not cut."""
    return _whole(embedder, prompt) if prompt and embedder.spec.query_suffix else PROBES


def _vectors(embedder: Embedder, probes: Mapping[str, list[str]]) -> np.ndarray:
    """The probes of every prompt by the JAX model."""
    return np.concatenate([embedder.encode(texts, prompt=prompt) for prompt, texts in probes.items()])


def _torch_vectors(folder: Path, spec: EmbeddingSpec, probes: Mapping[str, list[str]], dtype: str | None = None) -> np.ndarray:
    """The probes by plain sentence-transformers, padded on the right and then on the left, loaded anew without remote code.

    Texts under a prompt come with the model's suffix, as its users have to give them. `dtype` overrides the folder's.
    """
    import torch

    model = load_sentence_transformer(folder)
    if dtype:
        model = model.to(getattr(torch, dtype))
    vectors = []
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        for prompt, texts in probes.items():
            vectors.append(encode_torch(model, [text + spec.query_suffix * bool(prompt) for text in texts], prompt))
    return np.concatenate(vectors)


def _refusal(out: Path, parity: Parity, embedder: Embedder, made: Path) -> str:
    """Why nothing was written; a tokenizer that stock transformers reads otherwise is named as such."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(made))(PROBES, truncation=True)["input_ids"]
    ours = embedder.tokenizer(PROBES, [""] * len(PROBES)).ids
    reason = ""
    if [list(ids) for ids in ours] != [list(ids) for ids in theirs]:
        reason = "; stock transformers tokenises otherwise than this tokenizer, so the base's model_type does not fit it"
    return f"{out}: not written: {parity.told}{reason}"


def _write_probe(folder: Path, probes: Mapping[str, list[str]], vectors: np.ndarray) -> None:
    """A few texts, their prompts and their vectors, so that whoever loads the folder can check it."""
    texts = [(prompt, text) for prompt, of_prompt in probes.items() for text in of_prompt]
    rows = [
        {"prompt": prompt, "text": text, "vector": [round(float(x), 7) for x in vector]}
        for (prompt, text), vector in zip(texts, vectors, strict=True)
    ]
    (folder / "probe.json").write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


def sentence_transformers() -> Any:
    """The package, or `UserError` naming the extra that brings it."""
    try:
        import sentence_transformers
    except ModuleNotFoundError:
        raise UserError('sentence-transformers is not installed; pip install "jaxembed[eval]"') from None
    return sentence_transformers


def load_sentence_transformer(folder: Path | str) -> Any:
    """The folder by sentence-transformers on the CPU, without remote code but our own module where it has that one."""
    if not (Path(folder) / "modules.json").is_file():
        raise UserError(f"{folder}: no sentence-transformers folder (no modules.json); export the model first")
    code = Path(folder) / TORCH_POOLING.name
    ours = code.is_file() and code.read_bytes() == TORCH_POOLING.read_bytes()
    return sentence_transformers().SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=ours)


def encode_torch(model: Any, texts: Sequence[str], prompt: str, batch_size: int = 32) -> np.ndarray:
    """Unit float32 vectors [N, D] under a whole prompt ('' for none)."""
    vectors = model.encode(
        list(texts), prompt=prompt, batch_size=batch_size, normalize_embeddings=True, convert_to_tensor=True,
        show_progress_bar=False,
    )  # fmt: skip
    return np.asarray(vectors.float().cpu().numpy())
