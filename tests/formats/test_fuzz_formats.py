"""Properties of foreign files: whatever an adapter config or a tokenizer config holds, it is honored or refused in one line."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from helpers import tiny
from jaxembed.config.field_lists import FieldList
from jaxembed.errors import UserError
from jaxembed.formats.peft_config import ADAPTER_FIELDS, SUPPORTED_INITIALIZATIONS, read_lora_config
from jaxembed.formats.tokenizer_config import load_folder_tokenizer, wants_eos

# The tests own the neutral values, so that a change of the lists is noticed.
NEUTRAL = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_qalora": False,
    "lora_bias": False,
}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats()
    | st.sampled_from(["", "none", "main", "pissa", "gaussian", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "q_proj"]), inner, max_size=2),
    max_leaves=4,
)
adapter_configs = st.fixed_dictionaries(
    {"peft_type": st.just("LORA") | values, "r": st.just(2) | values, "lora_alpha": st.just(4) | values},
    optional=dict.fromkeys(sorted(ADAPTER_FIELDS.known - {"peft_type", "r", "lora_alpha"}), values) | {"new": values},
)


def is_absent(value: Any) -> bool:
    return value is None or value in ([], {})


@given(adapter_configs)
def test_adapter_config_is_honored_or_refused(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_config.json"
        path.write_text(json.dumps(config))
        try:
            read_lora_config(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
            return
    assert config["peft_type"] == "LORA"
    for key in ADAPTER_FIELDS.refused:
        value = config.get(key)
        if not is_absent(value):
            assert type(value) in (bool, str) and value in (NEUTRAL.get(key), "main" if key == "revision" else False), (
                key,
                value,
            )
    initialization = config.get("init_lora_weights")
    assert any(type(initialization) is type(x) and initialization == x for x in SUPPORTED_INITIALIZATIONS)


@given(st.sampled_from(sorted(ADAPTER_FIELDS.refused)), values)
def test_each_refused_field_has_one_neutral_value(key: str, value: Any) -> None:
    """A value passes only if it is absent or the neutral one, in its own type: 0 is not false."""
    is_neutral = is_absent(value) or any(type(value) is type(x) and value == x for x in ADAPTER_FIELDS.refused[key])
    fields = FieldList(frozenset(), frozenset(), {key: ADAPTER_FIELDS.refused[key]})
    if is_neutral:
        fields.check({key: value}, "a.json")
    else:
        with pytest.raises(UserError, match=rf"^a\.json: {key} "):
            fields.check({key: value}, "a.json")


flags = st.sampled_from(["absent", None, True, False])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_folder(folder, "qwen3")
    return folder


@given(flags, flags, st.booleans(), st.booleans())
def test_flags_and_post_processor_decide_the_special_tokens(
    tokenizer_folder: Path, add_bos: Any, add_eos: Any, has_bos: bool, has_eos: bool
) -> None:
    """A token is added once if tokenizer.json or the flag says so."""
    tokenizer = tiny.build_tokenizer()
    if has_bos or has_eos:
        parts = ["<s>"] * has_bos + ["$A"] + ["</s>"] * has_eos
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer.save_pretrained(tokenizer_folder)
    path = tokenizer_folder / "tokenizer_config.json"
    written = {key: flag for key, flag in (("add_bos_token", add_bos), ("add_eos_token", add_eos)) if flag != "absent"}
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    loaded = load_folder_tokenizer(tokenizer_folder)
    ids = loaded("a text")["input_ids"]
    plain = loaded("a text", add_special_tokens=False)["input_ids"]
    assert ids == [0] * (has_bos or add_bos is True) + plain + [1] * has_eos
    assert wants_eos(tokenizer_folder, loaded) == (has_eos or add_eos is True)


tokenizer_configs = st.dictionaries(
    st.sampled_from(
        ["add_bos_token", "add_eos_token", "truncation_side", "split_special_tokens", "bos_token", "do_lower_case"]
    ),
    values | st.sampled_from(["left", "right", "<s>"]),
    max_size=3,
)


@given(tokenizer_configs)
def test_tokenizer_config_is_honored_or_refused(tokenizer_folder: Path, changes: dict[str, Any]) -> None:
    path = tokenizer_folder / "tokenizer_config.json"
    tiny.build_tokenizer().save_pretrained(tokenizer_folder)
    config = copy.deepcopy(json.loads(path.read_text())) | changes
    path.write_text(json.dumps(config))
    try:
        tokenizer = load_folder_tokenizer(tokenizer_folder)
    except UserError as error:
        assert str(error).startswith(str(tokenizer_folder)) and len(str(error).splitlines()) == 1
        return
    assert tokenizer.truncation_side == "right"
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == (config.get("add_bos_token") is True)
    assert config.get("split_special_tokens") in (None, False, [], {})
