"""The table of readers: what export says, and what the model card shows."""

from __future__ import annotations

from typing import Any

import pytest

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.hub.reader_rules import READER_RULES, ServedModel, Status
from jaxembed.hub.readers import READERS, format_reader_table, judge_readers, list_limits
from jaxembed.model.presets import find_preset

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def make_model(preset: str = "qwen2-0.5b", fields: dict[str, Any] | None = None, **choices: Any) -> ServedModel:
    own = {key: choices.pop(key) for key in ("dtype", "has_onnx", "has_head") if key in choices}
    transformer = parse_hf_config({**find_preset(preset), "sliding_window": None, **(fields or {})}, preset)
    return ServedModel(EmbeddingSpec(**choices), transformer, **own)


def judge(model: ServedModel) -> dict[str, str]:
    return {verdict.reader.name: str(verdict.status) for verdict in judge_readers(model)}


def test_a_causal_model_with_a_graph_is_equal_everywhere() -> None:
    model = make_model(attention="causal", pooling="last", has_onnx=True)
    assert set(judge(model).values()) == {"equal"}
    assert list_limits(model) == []


def test_a_bidirectional_model_needs_a_new_transformers() -> None:
    model = make_model()
    status = judge(model)
    assert {name for name, value in status.items() if value == "refused"} == {
        "sentence-transformers 3, 4", "infinity", "ONNX Runtime", "OpenVINO",
    }  # fmt: skip
    assert (status["vLLM"], status["llama.cpp"], status["TEI"]) == ("equal", "equal", "close")
    assert list_limits(model) == [
        "sentence-transformers 3, 4, infinity: refused: a bidirectional model needs transformers 5.2 or newer"
    ]


@pytest.mark.parametrize(
    ("model", "reader", "status", "reason"),
    [
        (make_model(include_instruction=False), "vLLM", Status.DIFFERENT, "pools the instruction tokens"),
        (make_model(include_instruction=False), "llama.cpp", Status.DIFFERENT, "pools the instruction tokens"),
        (make_model(include_instruction=False), "sentence-transformers 6", Status.CONDITIONAL, "refuses older ones"),
        (make_model(include_instruction=False, pooling="last"), "vLLM", Status.CONDITIONAL, "truncate_prompt_tokens"),
        (make_model(pooling="latent_attention"), "vLLM", Status.REFUSED, "has no latent_attention pooling"),
        (make_model(pooling="latent_attention", has_onnx=True), "TEI", Status.CONDITIONAL, "on the CPU image"),
        (make_model(pooling="weighted_mean"), "TEI", Status.REFUSED, "has no weighted_mean pooling"),
        (make_model(pooling="max"), "llama.cpp", Status.REFUSED, "has no max pooling"),
        (make_model(projection=64), "llama.cpp", Status.DIFFERENT, "leaves out the projection"),
        (make_model(), "llama.cpp", Status.CONDITIONAL, "texts up to the maximum length"),
        (make_model(plain_prompt="passage: "), "Chroma, LanceDB", Status.DIFFERENT, "default prompt before queries"),
        (make_model("tiny", dtype="bfloat16"), "TEI", Status.CLOSE, "not in bfloat16"),
        (make_model("llama3-8b", {"rope_parameters": LLAMA3}), "TEI", Status.REFUSED, "no RoPE scaling for this family"),
        (make_model("llama3-8b", {"rope_parameters": LLAMA3}), "llama.cpp", Status.REFUSED, "llama3"),
        (make_model(has_head=True), "llama.cpp", Status.CONDITIONAL, "if the converter knows the head"),
        (make_model("mistral-7b", {"sliding_window": 64}), "llama.cpp", Status.DIFFERENT, "has no sliding windows"),
        (make_model("mistral-7b", {"sliding_window": 64}), "TEI", Status.DIFFERENT, "a different sliding window"),
        (make_model("mistral-7b", {"sliding_window": 4096}), "llama.cpp", Status.CONDITIONAL, "one slot"),
        (make_model("mistral-7b", {"head_dim": 64}), "TEI", Status.REFUSED, "head width of hidden_size"),
        (make_model("llama3-8b", {"attention_bias": True}), "TEI", Status.DIFFERENT, "leaves out biases"),
        (make_model("llama3-8b", {"rope_parameters": LLAMA3}, has_onnx=True), "TEI", Status.CONDITIONAL, "ONNX graph"),
        (make_model(matryoshka_dims=(64,)), "sentence-transformers 6", Status.CONDITIONAL, "normalize_embeddings=True"),
    ],
)
def test_what_a_reader_does_with_a_model(model: ServedModel, reader: str, status: Status, reason: str) -> None:
    (verdict,) = (verdict for verdict in judge_readers(model) if verdict.reader.name == reader)
    assert verdict.status == status
    assert any(reason in text for text in verdict.reasons)


def test_each_property_is_announced_in_one_line() -> None:
    model = make_model(attention="causal", include_instruction=False, projection=64, matryoshka_dims=(32,), dtype="bfloat16")
    leaves_out, projection, bfloat16, matryoshka = list_limits(model)
    assert leaves_out.startswith("vLLM, TEI, llama.cpp, Chroma, LanceDB: different: pools the instruction tokens of a prompt")
    assert projection == "llama.cpp: different: leaves out the projection"
    assert bfloat16 == "TEI: close: computes in float16 or float32, not in bfloat16"
    assert matryoshka.endswith(
        "LlamaIndex: truncate_dim needs normalize_embeddings=True, because it truncates after the normalization"
    )
    refused, leaves_out = list_limits(make_model(attention="causal", pooling="max", include_instruction=False))
    assert refused == "vLLM, TEI, llama.cpp: refused: has no max pooling"
    assert leaves_out.startswith("Chroma, LanceDB: different"), "what a reader refuses needs no further reasons"
    scaled = make_model("llama3-8b", {"rope_parameters": LLAMA3}, attention="causal", pooling="max")
    assert list_limits(scaled) == ["vLLM, TEI, llama.cpp: refused: has no max pooling"]


def test_rules_name_readers_of_the_table() -> None:
    assert {name for rule in READER_RULES for name in rule.readers} <= {reader.name for reader in READERS}


def test_table_of_the_card_has_usage_with_prompts_of_readers_that_do_not_refuse() -> None:
    table = format_reader_table(make_model(pooling="latent_attention", prompts={"query": "Find:", "document": ""}))
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in table.splitlines()[2:]}
    assert list(rows) == [reader.name for reader in READERS]
    assert rows["vLLM"] == "| vLLM | 0.32 | **refused**: has no latent_attention pooling |  |"
    assert 'model_kwargs={"trust_remote_code": True}, query_encode_kwargs={"prompt_name": "query"})' in rows["LangChain"]
    assert "trust_remote_code=True, query_instruction='Find:')" in rows["LlamaIndex"]
    assert "text_instruction" not in table
    first = format_reader_table(make_model(attention="causal", pooling="first"))
    assert "--embedding --pooling cls`" in first, "the converter of llama.cpp does not store the pooling of every family"
