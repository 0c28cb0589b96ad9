"""Exported folders are pushed to the hub, and whatever the hub refuses is one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from helpers.fake_hub import TOKEN, FakeHub, serve_fake_hub
from jaxembed import export as command
from jaxembed.errors import UserError
from jaxembed.hub.push import PushTarget, push_folder

Folder = Callable[[str], Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve a hub, and send huggingface_hub there, with a token."""
    with serve_fake_hub() as server:
        use_hub(monkeypatch, server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set what huggingface_hub reads from the environment when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # so that files are sent as LFS objects
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")


def write_export(folder: Path) -> Path:
    """Write files as an export has them."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: sentence-transformers\n---\n# test\n")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_pushed_to_a_new_private_repository(hub: FakeHub, tmp_path: Path) -> None:
    folder, target = write_export(tmp_path / "out"), PushTarget("me/model")
    target.check()
    assert push_folder(folder, target, "Export") == f"{hub.url}/me/model"
    assert hub.visibility == {"me/model": "private"}
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == read_files(folder)
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_existing_repository_needs_update_which_replaces_its_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.visibility["me/model"], hub.files = "public", {"old.txt": b"old", "README.md": b"old"}
    with pytest.raises(UserError, match=r"^--push: me/model already exists\. Name another repository, or add --update\.$"):
        PushTarget("me/model").check()
    folder, target = write_export(tmp_path / "out"), PushTarget("me/model", may_exist=True)
    target.check()
    push_folder(folder, target, "Export")
    assert hub.files == read_files(folder)


def test_public_repositories_are_public(hub: FakeHub, tmp_path: Path) -> None:
    push_folder(write_export(tmp_path / "out"), PushTarget("me/model", is_public=True), "Export")
    assert hub.visibility == {"me/model": "public"}


def test_refused_tokens_are_one_line(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.role = "read"
    with pytest.raises(UserError, match=r"^--push: the token is read-only\. Create one with write access at https://"):
        PushTarget("me/model").check()
    with pytest.raises(UserError, match=r"out: written, but not pushed to them/model \(the hub refused the token: .*rights"):
        push_folder(write_export(tmp_path / "out"), PushTarget("them/model"), "Export")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"^--push: me/model cannot be pushed to \(the hub refused the token: .*\)\. Use a tok"):
        PushTarget("me/model").check()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"me/model cannot be pushed to \(no token\)\. Set HF_TOKEN, or run `hf auth login`\.$"):
        PushTarget("me/model").check()


def test_an_unreachable_hub_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")  # the port of the discard protocol: nobody listens
    with pytest.raises(UserError, match=r"me/model cannot be pushed to \(the hub cannot be reached: .*\)\. Check the conn"):
        PushTarget("me/model").check()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\(HF_HUB_OFFLINE is set\)"):
        PushTarget("me/model").check()


@pytest.mark.parametrize("name", ["model", "me/model/x", "me/..", "me/a--b", "https://hf.co/me/model", "me/" + "x" * 99])
def test_bad_names_are_refused_before_anything_is_exported(tmp_path: Path, name: str) -> None:
    args = command.make_parser().parse_args(["no-such-model", str(tmp_path / "out"), "--push", name])
    with pytest.raises(UserError, match=r"^--push: '.*' is not the name of a repository \("):
        command.main(args)


def test_options_of_push_need_push(tmp_path: Path) -> None:
    args = command.make_parser().parse_args(["no-such-model", str(tmp_path / "out"), "--public"])
    with pytest.raises(UserError, match="--public: says how to push, so it needs --push OWNER/NAME"):
        command.main(args)


def test_the_command_exports_and_pushes(hub: FakeHub, base_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command.main(command.make_parser().parse_args([str(base_folder("qwen3")), str(out), "--push", "me/model"]))
    assert result["pushed"] == f"{hub.url}/me/model"
    assert "float16" in result["safe_dtypes"]
    assert hub.files.keys() >= {"README.md", "model.safetensors", "1_Pooling/config.json", "probe.json"}
    assert json.loads(hub.files["config.json"])["model_type"] == "qwen3"
