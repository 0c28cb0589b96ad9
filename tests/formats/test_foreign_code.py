"""Folders that name Python code of their own are refused before anything is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from jaxembed.errors import UserError
from jaxembed.evaluation.encoders import load_encoder
from jaxembed.formats.foreign_code import check_names_no_code
from jaxembed.formats.sentence_transformers import TOKEN_POOLING_FILE
from jaxembed.hub.cross_encoder import open_cross_encoder
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.hub.torch_model import load_sentence_transformer

EVIL_CODE = """
from pathlib import Path
import torch
Path("MARKER").touch()

class Evil(torch.nn.Module):
    @staticmethod
    def load(path, **_):
        return Evil()

    def forward(self, features):
        return features
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_foreign_folder(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def folder(foreign: Path, tmp_path: Path) -> Path:
    """Write a folder with our pooling file, which used to make the whole folder trusted, and with evil code."""
    shutil.copytree(foreign, tmp_path / "model")
    shutil.copy(TOKEN_POOLING_FILE, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(EVIL_CODE.replace("MARKER", str(tmp_path / "imported")))
    return tmp_path / "model"


def add_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "", "type": "evil.Evil"})
    (folder / "modules.json").write_text(json.dumps(modules))


def add_router(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "9_Router", "type": "sentence_transformers.models.Router"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "9_Router").mkdir()
    router = {"types": {"query_0_Evil": "evil.Evil"}, "structure": {"query": ["query_0_Evil"]}, "parameters": {}}
    (folder / "9_Router" / "router_config.json").write_text(json.dumps(router))


def set_key(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(tree | {key: value}))

    change.__name__ = f"{name}-{key}"
    return change


CHANGES = [
    add_module,
    add_router,
    set_key("config.json", "auto_map", {"AutoModel": "evil.Evil"}),
    set_key("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    set_key("preprocessor_config.json", "auto_map", {"AutoProcessor": "evil.Evil"}),
    set_key("1_Pooling/config.json", "auto_map", {"AutoModel": "evil.Evil"}),
    set_key("config.json", "text_config", {"auto_map": {"AutoModel": "evil.Evil"}}),
    set_key("sentence_bert_config.json", "model_args", {"attn_implementation": "someone/kernels"}),
    set_key("2_Dense/config.json", "activation_function", "evil.Evil"),
    set_key("config.json", "sentence_transformers", {"activation_fn": "evil.Evil"}),
    set_key("adapter_config.json", "auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_code_of_a_folder_is_never_imported(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    message = r"Python code of its own|own Python code|adapter_config"
    with pytest.raises(UserError, match=message):
        load_sentence_transformer(folder)
    with pytest.raises(UserError, match=rf"{message}|model_type distilbert is not supported"):
        load_encoder(str(folder), backend="sentence-transformers")
    with pytest.raises(UserError, match=message):
        open_frozen_encoder(str(folder), tmp_path)
    with pytest.raises(UserError, match=message):
        open_cross_encoder(str(folder), tmp_path)
    assert not (tmp_path / "imported").exists()


def test_a_stock_folder_is_loaded(folder: Path) -> None:
    """The pooling file alone changes nothing: modules.json does not name it."""
    check_names_no_code(folder)
    assert load_sentence_transformer(folder).encode(["a"]).shape == (1, 24)


def test_a_token_pooling_without_our_file_is_refused(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(1, {"idx": 1, "name": "1b", "path": "1_TokenPooling", "type": "token_pooling.TokenPooling"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / TOKEN_POOLING_FILE.name).unlink()
    with pytest.raises(UserError, match=r"token_pooling\.py: missing or changed"):
        load_sentence_transformer(folder)
