"""Fields of a decoder's config.json: read as transformers does, refused, or known to be harmless."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers import tiny
from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.hf_config import get_config_fields, parse_hf_config
from jaxembed.model.families import FAMILIES

CONFIG_CLASSES = {
    "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config, "mistral": transformers.MistralConfig,
    "llama": transformers.LlamaConfig, "bert": transformers.BertConfig, "roberta": transformers.RobertaConfig,
    "xlm-roberta": transformers.XLMRobertaConfig, "gemma3_text": transformers.Gemma3TextConfig,
    "modernbert": transformers.ModernBertConfig,
}  # fmt: skip
SIZES = {"vocab_size": 300, "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 48}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_every_field_of_the_installed_transformers_is_on_the_list(family: str) -> None:
    """A new field of transformers must be read, be refused, or be known to be harmless."""
    config = CONFIG_CLASSES[family]()
    setters = inspect.getmembers(type(config), lambda member: isinstance(member, property) and member.fset is not None)
    public = {name for name, _ in setters if not name.startswith("_")}  # a field of such a name is set too
    assert set(config.to_dict()) | public <= get_config_fields(FAMILIES[family]).known
    assert set(FAMILIES) == set(CONFIG_CLASSES)


@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_absent_fields_have_the_defaults_of_transformers(family: str) -> None:
    """A config.json may leave out any field with a default."""
    minimal = {"model_type": family, **SIZES}
    complete = json.loads(CONFIG_CLASSES[family](**SIZES).to_json_string(use_diff=False))
    assert parse_hf_config(minimal, "minimal") == parse_hf_config(complete, "complete")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"full_attention": PLAIN}}, r"by kind of layer are not supported \(full_attention\)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention true is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention true is not supported"),
        ({"is_causal": None}, "is_causal is null, which transformers takes for false"),
        ({"model_type": "gemma3_text", "is_causal": None}, "is_causal is null, which transformers takes for false"),
        ({"model_type": "modernbert", "sliding_window": 3}, "sliding_window 3 is not supported"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            "sliding_attention: rope_type is 'linear'",
        ),
        ({"model_type": "modernbert", "rope_scaling": LINEAR}, "rope_scaling .* is not supported"),
        ({"model_type": "modernbert", "local_attention": 1}, "local_attention is 1 .expected an integer from 2"),
        ({"per_layer_config": {"0": {"num_attention_heads": 1}}}, "per_layer_config .* is not supported"),
    ],
)
def test_fields_that_change_the_decoder_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        parse_hf_config({"model_type": "llama", **SIZES, **changes}, "config.json")


@pytest.mark.parametrize(
    ("parameters", "scaling", "kind"),
    [
        (LINEAR, LINEAR, "linear"),
        (PLAIN, None, "default"),
        (None, LINEAR, "linear"),
        (LINEAR, {}, "linear"),
        (LINEAR, {"type": "linear", "factor": 4.0}, "linear"),
        ({"rope_type": None, "type": "yarn", "factor": 4.0}, None, "yarn"),  # without the length before scaling
        (PLAIN, LINEAR, None),
        (LINEAR, PLAIN, None),
        (LINEAR, {**LINEAR, "factor": 8.0}, None),
        (PLAIN, {**PLAIN, "rope_theta": 5.0}, None),
        (PLAIN, DYNAMIC, None),
    ],
)
def test_contradicting_rope_is_refused(parameters: Any, scaling: Any, kind: str | None) -> None:
    config = {"model_type": "llama", **SIZES, "rope_parameters": parameters, "rope_scaling": scaling}
    if kind is None:
        with pytest.raises(UserError, match=r"contradict each other|rope_type 'dynamic' is not supported"):
            parse_hf_config(config, "config.json")
    else:
        assert dict(parse_hf_config(config, "config.json").rope_scaling)["rope_type"] == kind


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}], ids=["llama3", "yarn"])
def test_the_original_length_may_stand_beside_the_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES, "rope_parameters": rope, "original_max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = reference.config.rope_parameters["original_max_position_embeddings"]
    assert dict(parse_hf_config(config, "config.json").rope_scaling)["original_max_position_embeddings"] == expected == 16
    line = r"^config.json: original_max_position_embeddings is 16, and in rope_parameters 32 \(expected the same in both"
    with pytest.raises(UserError, match=line):
        parse_hf_config(config | {"rope_parameters": {**rope, "original_max_position_embeddings": 32}}, "config.json")


def test_duplicated_rope_keys_give_the_vectors_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = transformers.AutoModel.from_config(transformers.LlamaConfig(**tiny.SIZES, rope_parameters=LINEAR)).eval()
    body.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": LINEAR}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    (ids,) = draw_texts([40])
    with torch.no_grad():
        hidden = reference(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0].mean(dim=0)
    expected = torch.nn.functional.normalize(hidden, dim=0).numpy()
    model, params = load_model(tmp_path, EmbeddingSpec(attention="causal"))
    np.testing.assert_allclose(encode_packed(model, params, *pack_texts([ids], 64))[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "is_decoder true is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2 leaves no position after that of pad_token_id, 1"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1"),
    ],
)
def test_fields_that_change_an_encoder_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        parse_hf_config({"model_type": "xlm-roberta", **SIZES, **changes}, "config.json")


def test_older_configs_name_two_rotary_bases_and_the_size_of_a_group() -> None:
    """transformers 4 wrote them, for layers with and without a window."""
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3}
    gemma = parse_hf_config(
        {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 4, "sliding_window": 8, **old}, "a.json"
    )
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.windows) == (5e5, 2e4, (8, 8, None, 8))
    old = {"global_rope_theta": 5e5, "local_rope_theta": 2e4, "global_attn_every_n_layers": 2}
    bert = parse_hf_config({"model_type": "modernbert", **SIZES, "num_hidden_layers": 3, "local_attention": 8, **old}, "a.json")
    assert (bert.rope_theta, bert.local_rope_theta, bert.windows) == (5e5, 2e4, (None, 8, None))
    with pytest.raises(UserError, match=r"rope_parameters has rope_theta \(expected full_attention and sliding_attention\)"):
        parse_hf_config({"model_type": "gemma3_text", **SIZES, "rope_parameters": PLAIN}, "a.json")


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        parse_hf_config({"model_type": "llama", **SIZES, "brand_new": 1, "rope_parameters": {**PLAIN, "new": 2}}, "a.json")
    messages = sorted(record.message for record in caplog.records)
    assert messages == [
        "a.json: rope_parameters: new of rope_type default is not read", "a.json: unknown fields are not read (brand_new)",
    ]  # fmt: skip
