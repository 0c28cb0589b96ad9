"""The diagnosis of `verify` names what a server does differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from helpers.embedding_server import Encode, TorchEncoder, run_server
from jaxembed import verify
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub import embedder as embedder_module
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import Embedder, load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.parity import MIN_COSINE
from jaxembed.hub.resolve import find_base
from jaxembed.model.transformer import ComputeOptions
from jaxembed.verification import comparison
from jaxembed.verification.comparison import VerifiedFolder, open_folder
from jaxembed.verification.diagnosis import (
    Diagnosis,
    VariantEncoder,
    VariantMatch,
    diagnose,
    measure_half_precision,
    to_unit_vectors,
)
from jaxembed.verification.report import CHANGE_ADVICE
from jaxembed.verification.variants import list_pool_variants, list_transformer_variants

QUERY_PROMPT = "Find the answer:"
KINDS: dict[str, dict[str, Any]] = {
    "bidirectional": {"attention": "bidirectional", "pooling": "mean", "include_instruction": False},
    "causal": {"attention": "causal", "pooling": "last", "include_instruction": True},
}
FAMILIES = {"bidirectional": "qwen3", "causal": "mistral"}  # mistral's tokenizer adds BOS
MAX_LENGTH, NARROW_WIDTH = 96, 16


@dataclasses.dataclass(frozen=True)
class Served:
    """An exported folder, its vectors under sentence-transformers, and its variants in JAX."""

    folder: VerifiedFolder
    torch_encoder: TorchEncoder
    variants: VariantEncoder

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt in {probe.prompt: "" for probe in self.folder.probes} if prompt]

    def diagnose(self, vectors: np.ndarray, **options: Any) -> Diagnosis:
        with jax.default_matmul_precision("highest"):
            return diagnose(self.variants, to_unit_vectors(vectors), range(len(vectors)), MIN_COSINE, **options)


def load_tiny(base: Path, **choices: Any) -> Embedder:
    spec = EmbeddingSpec(max_length=MAX_LENGTH, instruction_template="{instruction}:", **choices)
    return load_embedder(find_base(str(base)), spec, ComputeOptions(unroll=False), make_mesh(1))


@pytest.fixture(scope="module", autouse=True)
def short_rows() -> Iterator[None]:
    """Use rows of 256 tokens, which all inputs fit. Programs that are compiled without optimization take long for more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder_module, "LONG_ROW_LENGTH", 256)
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]) -> dict[str, Served]:
    """Export a bidirectional and a causal model."""
    root, found = tmp_path_factory.mktemp("verify"), {}
    for kind, choices in KINDS.items():
        embedder = load_tiny(base_folder(FAMILIES[kind]), prompts={"query": QUERY_PROMPT, "document": ""}, **choices)
        export(embedder, root / kind, "float32", Card("test", "base"))
        folder = open_folder(root / kind)
        variants = VariantEncoder(embedder, folder.probes, embedder.model.width)
        found[kind] = Served(folder, TorchEncoder(root / kind), variants)
    return found


@pytest.fixture(scope="module")
def narrow_variants(served: dict[str, Served]) -> VariantEncoder:
    """Return the variants of the causal model, for vectors that are cut."""
    one = served["causal"]
    return VariantEncoder(one.variants.embedder, one.folder.probes, NARROW_WIDTH)


def name_changes(diagnosis: Diagnosis) -> list[list[str]]:
    """Return the differences of each match, as they are printed."""
    return [sorted(map(str, match.changes)) for match in diagnosis.matches]


# Kind, settings of the server, whether it leaves prompts out of the pooling, and the differences that must be named.
BOS, EOS = "<s>", "</s>"
FAULTS = [
    ("bidirectional", {}, False, ["instruction: pooled instead of not pooled"]),
    ("bidirectional", {"is_causal": True}, True, ["attention: causal instead of bidirectional"]),
    ("bidirectional", {"pooling_mode": "lasttoken"}, True, ["pooling: last instead of mean"]),
    ("bidirectional", {"pooling_mode": "cls"}, True, ["pooling: first instead of mean"]),
    ("bidirectional", {"pooling_mode": "max"}, True, ["pooling: max instead of mean"]),
    ("bidirectional", {"pooling_mode": "weightedmean"}, True, ["pooling: weighted_mean instead of mean"]),
    ("bidirectional", {"special_tokens": ([], [])}, True, ["EOS: none instead of one"]),
    ("bidirectional", {"special_tokens": ([], [EOS, EOS])}, True, ["EOS: two instead of one"]),
    ("bidirectional", {"special_tokens": ([BOS], [EOS])}, True, ["BOS: one instead of none"]),
    (
        "bidirectional", {"is_causal": True, "special_tokens": ([], [])}, False,
        ["EOS: none instead of one", "attention: causal instead of bidirectional", "instruction: pooled instead of not pooled"],
    ),
    (
        "bidirectional", {"max_length": 64}, True,
        ["truncation: to the first 64 tokens instead of to the first 96 tokens, EOS included"],
    ),
    (
        "bidirectional", {"max_length": 128, "pooling_mode": "max"}, True,
        ["pooling: max instead of mean", "truncation: to the first 128 tokens instead of to the first 96 tokens, EOS included"],
    ),
    ("causal", {"is_causal": False}, False, ["attention: bidirectional instead of causal"]),
    ("causal", {"pooling_mode": "mean"}, False, ["pooling: mean instead of last"]),
    ("causal", {"special_tokens": ([BOS], [])}, False, ["EOS: none instead of one"]),
    ("causal", {"special_tokens": ([], [EOS])}, False, ["BOS: none instead of one"]),
    ("causal", {"special_tokens": ([BOS, BOS], [EOS])}, False, ["BOS: two instead of one"]),
    (
        "causal", {"pooling_mode": "mean", "include_prompt": False}, True,
        ["instruction: not pooled instead of pooled", "pooling: mean instead of last"],
    ),
    (
        "causal", {"truncation_side": "left"}, False,
        ["truncation: to BOS and the last 95 tokens instead of to the first 96 tokens, EOS included"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "leaves_prompts_out", "expected"), FAULTS)
def test_fault_of_a_server_is_named(
    served: dict[str, Served], kind: str, settings: dict[str, Any], leaves_prompts_out: bool, expected: list[str]
) -> None:
    one = served[kind]
    with one.torch_encoder.change(**settings) as server:
        vectors = server.encode(one.folder.inputs, one.prompts if leaves_prompts_out else ())
    diagnosis = one.diagnose(vectors)
    assert expected in name_changes(diagnosis)
    assert diagnosis.matches[0].cosine > MIN_COSINE


def test_every_single_difference_is_named_or_listed_as_indistinguishable(served: dict[str, Served]) -> None:
    for one in served.values():
        everything, variants = range(len(one.folder.probes)), one.variants
        unchanged = variants.encode_unchanged(everything)
        passes = [(transformer, variants.tokenizations[0]) for transformer in variants.transformers]
        passes += [(variants.transformers[0], tokens) for tokens in variants.tokenizations if len(tokens.changes) == 1]
        truncations = variants.list_truncations(variants.tokenizations[0], everything, [50])
        passes += [(variants.transformers[0], tokens) for tokens in truncations[:4]]
        for transformer, tokens in passes:
            vectors = variants.encode(transformer, tokens, everything)
            for p, pool in enumerate(variants.pools):
                changes = (*transformer.changes, *tokens.changes, *pool.changes)
                if len(changes) != 1:
                    continue
                matches = one.diagnose(vectors[:, p], server_lengths=[50]).matches
                is_visible = np.sum(vectors[:, p] * unchanged, axis=1).min() < MIN_COSINE
                assert changes in [match.changes for match in matches] if is_visible else not matches[0].changes, changes


@pytest.mark.parametrize(
    ("family", "expected"), [("bert", {"GELU"}), ("gemma3_text", {"attention", "sliding window", "RoPE base"})]
)
def test_transformers_of_a_family_differ_in_what_it_has(
    base_folder: Callable[[str], Path], family: str, expected: set[str]
) -> None:
    variants = list_transformer_variants(load_tiny(base_folder(family)))
    layer_kinds = {tuple(window is None for window in variant.transformer.windows) for variant in variants}
    assert len(layer_kinds) == 1, "layers with a window keep their rotary base without it"
    settings = {change.setting for variant in variants for change in variant.changes}
    assert expected <= settings <= CHANGE_ADVICE.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_half_precision_is_named(served: dict[str, Served], dtype: str) -> None:
    one = served["causal"]
    with one.torch_encoder.change(dtype=getattr(torch, dtype)) as server:
        vectors = to_unit_vectors(server.encode(one.folder.inputs))
    exact = np.stack([probe.vector for probe in one.folder.probes])
    least = np.sum(vectors * exact, axis=1).min()
    bound = measure_half_precision(one.variants, dtype, one.variants.select_short(range(len(vectors))))
    assert bound <= least, "our own error bounds that of PyTorch"
    expected = [[f"dtype: {dtype} or a similar rounding instead of float32"]] if least < MIN_COSINE else [[]]
    assert name_changes(one.diagnose(vectors)) == expected


def test_other_model_has_no_explanation(served: dict[str, Served]) -> None:
    one = served["bidirectional"]
    shape = (len(one.folder.probes), one.variants.width)
    diagnosis = one.diagnose(np.random.default_rng(0).normal(size=shape))
    assert diagnosis.matches == []
    assert diagnosis.closest.cosine < 0.9


def test_fewer_dimensions_are_named(served: dict[str, Served], narrow_variants: VariantEncoder) -> None:
    one = dataclasses.replace(served["causal"], variants=narrow_variants)
    vectors = np.stack([probe.vector for probe in one.folder.probes])[:, :NARROW_WIDTH]
    assert name_changes(one.diagnose(vectors)) == [["width: the first 16 dimensions instead of 32"]]
    assert list_pool_variants(narrow_variants.embedder, NARROW_WIDTH, dim=NARROW_WIDTH)[0].changes == ()
    assert list_pool_variants(narrow_variants.embedder, 48) == []


def verify_with(one: Served, encode: Encode, *options: str) -> dict[str, Any]:
    """Run the command against a server with these vectors."""
    with run_server(encode) as server:
        return verify.main(verify.make_parser().parse_args([str(one.folder.path), server.url, *options]))


@pytest.fixture
def reuse_variants(served: dict[str, Served], narrow_variants: VariantEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command use variants that are compiled already."""
    compiled = {(one.variants.embedder.spec, one.variants.width): one.variants for one in served.values()}
    compiled[narrow_variants.embedder.spec, NARROW_WIDTH] = narrow_variants

    def find(embedder: Embedder, probes: Any, width: int, dim: int | None) -> VariantEncoder:
        return compiled.get((embedder.spec, width)) or VariantEncoder(embedder, probes, width, dim)

    monkeypatch.setattr(comparison, "VariantEncoder", find)


@pytest.mark.usefixtures("reuse_variants")
def test_the_command_prints_the_differences(served: dict[str, Served], capsys: pytest.CaptureFixture[str]) -> None:
    one = served["bidirectional"]
    result = verify_with(one, one.torch_encoder.encode)
    assert result["diagnosis"] == [["instruction: pooled instead of not pooled"]]
    assert not result["equal"] and result["findings"] == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(
        "- instruction: pooled instead of not pooled. vLLM, TEI and llama.cpp pool every token. Train with "
    )
    assert lines[-1] == "  With this difference, the folder gives the server's vectors (cosine 1.000000)."


@pytest.mark.usefixtures("reuse_variants")
def test_precision_of_the_server_may_be_half(served: dict[str, Served]) -> None:
    one = served["causal"]
    with one.torch_encoder.change(dtype=torch.bfloat16) as server:
        assert not verify_with(one, server.encode, "--no-diagnosis")["equal"]
        result = verify_with(one, server.encode, "--dtype", "bfloat16")
        assert result["equal"] and result["tolerance"] < result["least_cosine"] < MIN_COSINE
        assert verify_with(one, server.encode)["diagnosis"] == [["dtype: bfloat16 or a similar rounding instead of float32"]]


@pytest.mark.usefixtures("reuse_variants")
def test_folder_or_model_that_does_not_fit_is_one_line(
    served: dict[str, Served], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = served["causal"]
    random = np.random.default_rng(0).normal(size=(100, 48))
    verify_with(one, lambda inputs: random[: len(inputs), :32])
    assert "no variant of the folder's model gives these vectors (closest: " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "diagnose", lambda *_: Diagnosis([], VariantMatch((), 0.5)))
        for width in (48, NARROW_WIDTH):
            with pytest.raises(
                UserError, match=rf"vectors of {width} dimensions \(those of .* have 32\), so the server has another model, "
            ):
                verify_with(one, lambda inputs, width=width: random[: len(inputs), :width])
    others = [dataclasses.replace(probe, vector=-probe.vector) for probe in one.folder.probes]
    monkeypatch.setattr(comparison, "read_probe_file", lambda _: others)
    with pytest.raises(UserError, match=r"probe\.json: does not belong to the weights of its folder \(least cosine -1"):
        verify_with(one, one.torch_encoder.encode)
