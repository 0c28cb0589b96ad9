"""Flags of tokenizer_config.json and settings of sentence-transformers' files decide the vectors, as in their own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import processors

from helpers import tiny
from helpers.loading import min_cosine
from helpers.runs import make_config, write_base_and_data
from jaxembed import Embedder
from jaxembed.data.tokenize import load_tokenizer
from jaxembed.errors import UserError
from jaxembed.formats.sentence_transformers import (
    DENSE_FIELDS,
    MODEL_FIELDS,
    NORMALIZE_FIELDS,
    POOLING_FIELDS,
    TRANSFORMER_FIELDS,
)
from jaxembed.formats.tokenizer_config import TOKENIZER_FIELDS, load_folder_tokenizer, read_tokenizer_flags
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

TEXTS = [*tiny.TEXTS, "a text that is cut at its end " * 30]


def write_sentence_transformer(folder: Path, bos: bool, eos: bool, pooling: str = "lasttoken") -> Path:
    """Write a folder with sentence-transformers, whose tokenizer.json adds BOS and EOS."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    tiny.write_folder(folder / "base", "qwen3")
    tokenizer = tiny.build_tokenizer()
    parts = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=parts, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "base")
    chain = [modules.Transformer(str(folder / "base"), max_seq_length=64), modules.Pooling(32, pooling), modules.Normalize()]
    model = SentenceTransformer(modules=chain, device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def move_tokens_to_flags(folder: Path, bos: bool, eos: bool) -> None:
    """Write the tokenizer as transformers 4 did: tokenizer.json adds nothing, the flags do."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", add_bos_token=bos, add_eos_token=eos)


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, False), (True, True), (False, False)])
def test_flags_give_the_vectors_of_a_tokenizer_that_adds_the_tokens(tmp_path: Path, bos: bool, eos: bool) -> None:
    folder = write_sentence_transformer(tmp_path, bos, eos)
    expected = encode_torch(load_sentence_transformer(folder), TEXTS, "")
    assert min_cosine(Embedder.load(folder).encode(TEXTS), expected) > 0.9999
    move_tokens_to_flags(folder, bos, eos)
    model = Embedder.load(folder)
    assert min_cosine(model.encode(TEXTS), expected) > 0.9999
    if bos or eos:
        edit_json(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
        assert min_cosine(Embedder.load(folder).encode(TEXTS), expected) < 0.99, "the flags matter"
        # The exported tokenizer adds the tokens by itself.
        export(model, tmp_path / "out", "float32", Card("flags", "base"))
        flags = read_tokenizer_flags(tmp_path / "out")
        assert (flags.add_bos, flags.add_eos) == (bos, eos), "llama.cpp reads them first"
        assert min_cosine(encode_torch(load_sentence_transformer(tmp_path / "out"), TEXTS, ""), expected) > 0.9999


def test_flag_without_its_token_is_refused(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, "qwen3")
    tokenizer = tiny.build_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token=None)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: add_bos_token is true, but the tokenizer has no BOS token"):
        load_folder_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token="yes")
    with pytest.raises(UserError, match=r"add_bos_token is 'yes' \(expected true or false"):
        load_folder_tokenizer(tmp_path)


def test_a_false_flag_does_not_remove_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_folder(tmp_path, "mistral")  # its tokenizer.json adds BOS
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=False)
    for _ in range(2):
        ids = load_folder_tokenizer(tmp_path)("a")["input_ids"]
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] and ids[0] == 0
    assert [record.message for record in caplog.records if "add_bos_token is false" in record.message].__len__() == 1


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_texts_that_lose_their_start_are_refused(tmp_path: Path, place: str) -> None:
    folder = write_sentence_transformer(tmp_path, False, True)

    def cut_left(folder: Path) -> None:
        if place == "tokenizer_config.json":
            edit_json(folder / place, truncation_side="left")
        else:
            truncation = {"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
            edit_json(folder / place, truncation=truncation)

    cut_left(folder)
    with pytest.raises(UserError, match="truncation_side is left"):
        find_base(str(folder))
    # A base without an embedding model's files is trained and exported with texts that lose their end.
    root = write_base_and_data(tmp_path / "run")
    cut_left(root / "base")
    train(make_config(root, "tuned", "train.steps=1", "eval.sets=[]"))
    model = Embedder.load(root / "tuned")
    export(model, tmp_path / "out", "float32", Card("cut", "base"))
    assert load_tokenizer(tmp_path / "out").truncation_side == "right"
    np.testing.assert_allclose(
        encode_torch(load_sentence_transformer(tmp_path / "out"), TEXTS, ""), model.encode(TEXTS), atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case true is not supported"),
        ("sentence_bert_config.json", {"tokenizer_args": {"add_eos_token": True}}, "tokenizer_args .* is not supported"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task 'fill-mask' is not supported"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method_output_name": "x"}}}, "another text method"),
        ("sentence_bert_config.json", {"modality_config": {"text": {}, "message": {}}}, "found message; expected text alone"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim 8 is not supported"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name is 'x'"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens true is not supported"),
    ],
)
def test_fields_that_change_vectors_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    edit_json(folder / name, **changes)
    with pytest.raises(UserError, match=message):
        find_base(str(folder))


def test_modules_of_other_packages_are_refused(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "my_package.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"module type 'my_package\.Pooling' is the folder's own Python code"):
        find_base(str(folder))


@pytest.mark.parametrize("path", ["../other/1_Pooling", "/etc"])
def test_modules_outside_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=rf"modules.json: module path '.*{path}' is outside the folder"):
        find_base(str(folder))


def test_older_names_of_the_transformer_file_are_read(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    (folder / "sentence_bert_config.json").rename(folder / "sentence_xlm-roberta_config.json")
    edit_json(folder / "sentence_xlm-roberta_config.json", max_seq_length=7)
    model = Embedder.load(folder)
    stock = load_sentence_transformer(folder)
    np.testing.assert_allclose(model.encode(TEXTS), stock.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    assert model.spec.max_length == 7


def test_the_default_prompt_precedes_texts(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path, False, False, "mean")
    prompts = {"query": "ask this: ", "document": "read this: "}
    edit_json(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
    stock, model = load_sentence_transformer(folder), Embedder.load(folder)
    np.testing.assert_allclose(model.encode(TEXTS), stock.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    assert min_cosine(model.encode(TEXTS), model.encode(TEXTS, prompt="")) < 0.99
    export(model, tmp_path / "out", "float32", Card("prompts", "base"))
    written = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert (written["prompts"], written["default_prompt_name"]) == (prompts, "query")


def test_unknown_fields_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    edit_json(folder / "1_Pooling" / "config.json", brand_new=1)
    for _ in range(2):
        find_base(str(folder))
    messages = [record.message for record in caplog.records if "brand_new" in record.message]
    assert messages == [f"{folder}/1_Pooling/config.json: unknown fields are not read (brand_new)"]


def test_a_limit_beyond_the_positions_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_sentence_transformer(tmp_path, False, False)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=500)
    assert find_base(str(folder)).spec.max_length == 128
    assert "max_seq_length 500 is more than max_position_embeddings, so texts are truncated to 128 tokens" in caplog.text


def test_code_that_is_not_run_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A decoder of a known type is read as the stock one, as sentence-transformers does without trust_remote_code."""
    folder = write_sentence_transformer(tmp_path, False, False)
    expected = Embedder.load(folder).encode(TEXTS)
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.Model"})
    for _ in range(2):
        np.testing.assert_array_equal(Embedder.load(folder).encode(TEXTS), expected)
    messages = [record.message for record in caplog.records if "auto_map" in record.message]
    assert messages == [f"{folder}: config.json names Python code (auto_map), which is not run: it is read as a stock qwen3"]


def test_every_field_of_the_installed_sentence_transformers_is_on_a_list() -> None:
    from sentence_transformers.sentence_transformer import modules

    lists = {
        modules.Transformer: TRANSFORMER_FIELDS, modules.Pooling: POOLING_FIELDS, modules.Dense: DENSE_FIELDS,
        modules.Normalize: NORMALIZE_FIELDS,
    }  # fmt: skip
    for module, fields in lists.items():
        assert set(module.config_keys) <= fields.known, module
    from sentence_transformers import SentenceTransformer

    config = SentenceTransformer(modules=[modules.Pooling(4)], truncate_dim=2, device="cpu")._get_model_config()
    assert config.keys() <= MODEL_FIELDS.known


def test_every_field_of_a_saved_tokenizer_is_on_the_list(tmp_path: Path) -> None:
    tokenizers = [tiny.build_tokenizer(chat_template="{{ messages }}"), tiny.build_qwen_tokenizer()]
    tokenizers += [transformers.LlamaTokenizer(), transformers.Qwen2Tokenizer()]
    for tokenizer in tokenizers:
        tokenizer.save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert fields.keys() <= TOKENIZER_FIELDS.known, type(tokenizer)
