"""The command `verify`: every API, its report and exit codes, and bad input."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.commands import run_command
from helpers.embedding_server import MODEL, PROGRAMS, FakeServer, run_server
from jaxembed import verify
from jaxembed.errors import UserError
from jaxembed.verification import comparison, http_client
from jaxembed.verification.comparison import Verification

WIDTH = 8
QUERY_PROMPT = "query: "
TEXTS = [("", "one"), ("", "two\nlines"), (QUERY_PROMPT, "three")]
INPUTS = [prompt + text for prompt, text in TEXTS]
VECTORS = dict(zip(INPUTS, np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, 3)))[0].T, strict=True))


def encode(inputs: list[str]) -> np.ndarray:
    """Return the vectors of probe.json."""
    return np.stack([VECTORS.get(text, np.ones(WIDTH)) for text in inputs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]) -> Path:
    """Write a model folder with a probe.json of other vectors. Comparing them needs no weights."""
    path = tmp_path_factory.mktemp("verify") / "export"
    shutil.copytree(base_folder("qwen3"), path)
    rows = [{"prompt": p, "text": t, "vector": VECTORS[p + t].tolist()} for p, t in TEXTS]
    (path / "probe.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait between requests, but return the waits."""
    seconds: list[float] = []
    monkeypatch.setattr(http_client.time, "sleep", seconds.append)
    return seconds


def run_verify(folder: Path | str, url: str, *options: str) -> dict[str, Any]:
    return verify.main(verify.make_parser().parse_args([str(folder), url, *options]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_server_is_recognized_and_asked(folder: Path, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(encode, program) as server:
        result = run_verify(folder, server.url)
    assert result["equal"] and result["least_cosine"] > 0.999999
    assert result["cosines"] == pytest.approx([1, 1, 1])
    assert result["api"] == {"tei": "tei", "ollama": "ollama"}.get(program, "openai")
    assert result["model"] == MODEL
    versions = {"vllm": "vLLM 0.32.0", "llama.cpp": "llama.cpp b1", "tei": "TEI 1.8.0", "ollama": "Ollama 0.12.0"}
    assert result["server"] == versions.get(program, {"openai": "a server of unknown kind"}.get(program, program))
    sent = [request for path, request, _ in server.requests if request is not None]
    texts = [request.get("input") or request["inputs"] for request in sent]
    assert texts[-4:] == [*([text] for text in INPUTS), INPUTS], "each text by itself, with its prompt, then all together"
    assert all(request.get("truncate_prompt_tokens") == (-1 if program == "vllm" else None) for request in sent)
    assert "equal: least cosine 1.000000, expected at least 0.9999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "api"), [("vllm", "vllm"), ("llama.cpp", "llama.cpp"), ("tei", "openai"), ("ollama", "openai")]
)
def test_api_can_be_chosen(folder: Path, program: str, api: str) -> None:
    with run_server(encode, program) as server:
        result = run_verify(folder, f"{server.url}/", "--api", api)
        assert result["equal"] and result["api"] == api
        assert run_verify(folder, f"{server.url}/v1/embeddings", "--api", api)["url"] == server.url


def test_width_is_requested(folder: Path) -> None:
    with run_server(lambda inputs: encode(inputs)[:, :4]) as server:
        result = run_verify(folder, server.url, "--dim", "4", "--no-diagnosis")
        assert result["cosines"] == pytest.approx([1, 1, 1])
        assert [finding.partition(":")[0] for finding in result["findings"]] == ["normalization"]
        assert all(request["dimensions"] == 4 for _, request, _ in server.requests if request)
        assert run_verify(folder, server.url, "--no-diagnosis")["findings"][-1] == "width: 4 dimensions instead of 8."


def test_texts_are_listed_with_their_cosines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(lambda inputs: encode(inputs)[:, ::-1]) as server:
        result = run_verify(folder, server.url, "--no-diagnosis")
    assert not result["equal"] and result["diagnosis"] is None
    expected = [float(VECTORS[text] @ VECTORS[text][::-1]) for text in INPUTS]
    assert result["cosines"] == pytest.approx(expected)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"  {expected[0]:9.6f}  {'-':24}  one"
    assert lines[3].endswith("two lines")
    assert lines[4] == f"  {expected[2]:9.6f}  {QUERY_PROMPT:24}  three"
    assert lines[5].startswith("different: least cosine ")


def test_tolerance_decides(folder: Path) -> None:
    def encode_with_noise(inputs: list[str]) -> np.ndarray:
        vectors = encode(inputs) + 0.01 * np.random.default_rng(1).normal(size=WIDTH)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    with run_server(encode_with_noise) as server:
        least = run_verify(folder, server.url, "--no-diagnosis")["least_cosine"]
        assert 0.99 < least < 0.9999
        assert run_verify(folder, server.url, "--tolerance", str(least - 1e-6))["equal"]
        assert not run_verify(folder, server.url, "--no-diagnosis", "--tolerance", str(least + 1e-6))["equal"]


def test_exit_codes(folder: Path) -> None:
    with run_server(lambda inputs: 2 * encode(inputs)) as server:
        done = run_command("jaxembed.verify", str(folder), server.url)
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    assert lines[-1] == "- normalization: vectors of length 2 to 2 instead of 1. Normalize in the server or in the client."
    assert json.loads(last)["findings"] == [lines[-1].removeprefix("- ")]
    done = run_command("jaxembed.verify", str(folder), server.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be reached" in done.stderr.splitlines()[-1]


def test_key_comes_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-1")
    monkeypatch.setenv("MY_KEY", "secret-2\n")  # as many programs write a file
    with run_server(encode) as server:
        run_verify(folder, server.url)
        run_verify(folder, server.url, "--key-env", "MY_KEY")
    assert {key for _, _, key in server.requests} == {"Bearer secret-1", "Bearer secret-2"}
    with run_server(encode) as server:
        server.overrides["/info"] = (401, {"error": "no secret-2"}, {})
        with pytest.raises(
            UserError, match=r"does not accept the key in the environment variable MY_KEY \(status 401: no \*\*\*\)"
        ) as caught:
            run_verify(folder, server.url, "--key-env", "MY_KEY")
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("MY_KEY", "secret\nsecret")
        with pytest.raises(UserError, match=r"^MY_KEY: the key has other characters than printable ASCII") as caught:
            run_verify(folder, server.url, "--key-env", "MY_KEY")
        assert "secret" not in str(caught.value)
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(UserError, match="needs a key, which is read from the environment variable OPENAI_API_KEY"):
            run_verify(folder, server.url)


def test_busy_server_is_asked_again(folder: Path, waits: list[float]) -> None:
    with run_server(encode) as server:
        answer, busy = (
            server.answer,
            iter([(429, {}, {"Retry-After": "7"}), (503, {"error": {"message": "Loading model"}}, {})]),
        )
        server.answer = lambda path, request: next(busy, None) or answer(path, request)  # type: ignore[method-assign]
        assert run_verify(folder, server.url)["equal"]
        assert waits == [7.0, 2.0]
        server.overrides["/v1/embeddings"] = (429, {"error": {"message": "slow down"}}, {})
        with pytest.raises(UserError, match=r"still busy after 5 requests \(status 429: slow down\)"):
            run_verify(folder, server.url)
    assert waits[2:] == [1.0, 2.0, 4.0, 8.0]


OPENAI_NAN = {"data": [{"index": 0, "embedding": [float("nan")] * WIDTH}]}
OPENAI_NULL = {"data": [{"index": 0, "embedding": [None] * WIDTH}]}
OPENAI_TOKENS = {"data": [{"index": 0, "embedding": [[0.5] * WIDTH] * 3}]}
BAD_ANSWERS = [
    ((404, {"detail": "Not Found"}), "no embeddings at /v1/embeddings or /embeddings (a server of unknown kind; status 404)"),
    ((200, "<!doctype html><html></html>"), "the answer is an HTML page (it starts with '<!doctype html>"),
    ((200, "pong"), "the answer is not JSON (it starts with 'pong')"),
    ((200, {"result": 1}), "the answer has no vectors where the API openai has them"),
    ((200, {"data": []}), "0 vectors for 1 texts"),
    ((200, OPENAI_NAN), "the vector of text 0 of the request has numbers that are not finite (NaN or infinity)"),
    ((200, OPENAI_NULL), "has numbers that are not finite"),
    ((200, OPENAI_TOKENS), "is 3 vectors, one per token. Start the server with pooling"),
    ((200, {"data": [{"index": 0, "embedding": "AAAA"}]}), "is 'AAAA' (expected a list of numbers). Choose another --api"),
    ((200, {"data": [{"index": 0, "embedding": ["a"]}]}), "has entries that are not numbers"),
    ((200, {"data": [{"index": 0, "embedding": [10**400] * WIDTH}]}), "has numbers that are not finite"),
    ((200, {"data": [{"index": 0, "embedding": [True] * WIDTH}]}), "has entries that are not numbers"),
    ((200, {"data": [{"index": 1, "embedding": [0.5] * WIDTH}]}), "the answer has no vectors where the API openai has them"),
    ((500, {"error": {"message": "out of memory"}}), "the server failed (status 500: out of memory). Check its log"),
    ((413, {"error": "too long"}), "the server refuses every text (status 413: too long)"),
    ((422, {"detail": "at most 9 tokens"}), "the server refuses every text (status 422: at most 9 tokens)"),
    ((404, {"error": "model 'x' not found"}), "no model 'served-model' (it lists served-model; status 404: model 'x'"),
    ((308, ""), "redirects to an unknown place (status 308). Give the URL of the server itself"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "message"), BAD_ANSWERS)
def test_bad_answer_is_one_line(folder: Path, answer: tuple[int, Any], message: str) -> None:
    with run_server(encode) as server:
        server.overrides |= dict.fromkeys(("/v1/embeddings", "/embeddings"), (*answer, {}))
        with pytest.raises(UserError) as caught:
            run_verify(folder, server.url)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{server.url}/v1/embeddings: ") or answer[0] == 404


def test_long_texts_that_are_refused_are_a_difference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(encode) as server:
        answer = server.answer

        def refuse_long(path: str, request: Any) -> tuple[int, Any, dict[str, str]]:
            is_long = request is not None and any("lines" in text for text in request["input"])
            return (500, {"error": {"message": "input is too large to process"}}, {}) if is_long else answer(path, request)

        server.answer = refuse_long  # type: ignore[method-assign]
        result = run_verify(folder, server.url, "--no-diagnosis")
    assert not result["equal"] and result["cosines"] == [pytest.approx(1), None, pytest.approx(1)]
    assert result["findings"] == [
        "long texts: the server refuses 1 of 3 texts, which the folder truncates (status 500: input is too large to process). "
        "Truncate in the client, or let the server do it."
    ]
    assert Verification([1.0, None], 0.9999, []).are_vectors_equal  # nothing to diagnose
    assert not Verification([None], 0.9999, []).are_vectors_equal


def test_findings_have_the_tolerance_of_half_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SimpleNamespace(pools=["mean"], select_short=list)
    for name, value in (("load_embedder", None), ("VariantEncoder", encoder), ("_check_probe_file", None)):
        monkeypatch.setattr(comparison, name, lambda *_, value=value: value)
    monkeypatch.setattr(comparison, "measure_half_precision", lambda *_: 0.99)
    server: Any = SimpleNamespace(dim=None, info=SimpleNamespace(dtype="bfloat16"))
    opened, vectors, noise = comparison.open_folder(folder), encode(INPUTS), np.eye(len(INPUTS), WIDTH) / 40
    served = comparison.ServedVectors(vectors + noise, vectors - noise, {})
    first = comparison.compare_with_probes(opened, server, served)
    assert not first.are_vectors_equal and "several texts in one request" in first.findings[-1]
    result = comparison.diagnose_server(opened, server, served, first, None, is_tolerance_set=False)
    assert result.min_cosine == 0.99 and result.are_vectors_equal
    assert not any("several texts in one request" in finding for finding in result.findings)


def test_server_whose_vectors_depend_on_other_texts(folder: Path) -> None:
    with run_server(lambda inputs: encode(inputs) + 0.5 * (len(inputs) > 1)) as server:
        result = run_verify(folder, server.url)
    assert not result["equal"] and result["least_cosine"] > 0.999999
    assert result["findings"][-1].startswith(
        "several texts in one request: the vectors differ from those of single requests (least cosine 0."
    )


def test_wrong_url_is_one_line(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for wrong, message in [
        (url, "cannot be reached"),
        ("http://no-such-host.invalid", "cannot be reached"),
        ("localhost:8000", "not the URL of a server"),
        ("ftp://localhost", "not the URL of a server"),
        ("http://", "not the URL of a server"),
        ("http://localhost:99999", "not the URL of a server"),
        ("http://user:secret@localhost", "contains a user name or a password"),
        ("http://localhost/?x=1", "has a query or a fragment"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            run_verify(folder, wrong)
        assert "secret" not in str(caught.value)


def test_slow_server_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"/info: no answer within 0\.1 s\. Check the server, or raise --timeout"):
            run_verify(folder, url, "--timeout", "0.1")


class DrippingBody:
    """The body of an answer that never ends."""

    def read1(self, size: int) -> bytes:
        return b" "


def test_an_answer_that_does_not_end_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError):
        http_client._read_body(DrippingBody(), "url", 0.0)
    monkeypatch.setattr(http_client, "MAX_ANSWER_BYTES", 9)
    with pytest.raises(UserError, match="url: the answer is longer than 9 bytes"):
        http_client._read_body(DrippingBody(), "url", 1e9)


@pytest.mark.parametrize("listed", [5, "x", [3], {"a": 1}, [{"id": MODEL, "owned_by": ["vllm"]}]])
def test_a_server_may_list_its_models_in_any_form(folder: Path, listed: Any) -> None:
    with run_server(encode) as server:
        server.overrides["/v1/models"] = (200, {"data": listed}, {})
        assert run_verify(folder, server.url)["equal"]


def test_model_is_one_of_those_listed(folder: Path) -> None:
    with run_server(encode) as server:
        assert run_verify(folder, server.url, "--model", MODEL)["equal"]
        with pytest.raises(UserError, match=r"--model: the server has no model 'other' \(it lists served-model\)"):
            run_verify(folder, server.url, "--model", "other")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with run_server(encode) as running:
        yield running


def test_wrong_folder_is_one_line(folder: Path, tmp_path: Path, server: FakeServer) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run_verify(tmp_path / "none", server.url)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a folder with a config\.json"):
        run_verify(tmp_path / "empty", server.url)
    copied = shutil.copytree(folder, tmp_path / "copy")
    for content, message in [
        ("{", "not valid JSON"),
        ("[]", "damaged"),
        ('[{"prompt": "", "text": "a"}]', "not a list of prompts, texts and vectors"),
        ('[{"prompt": "", "text": "a", "vector": ["x"]}]', "not a list of prompts, texts and vectors"),
        ('[{"prompt": 1, "text": "a", "vector": [1]}]', "damaged"),
        ('[{"prompt": "", "text": "a", "vector": 1}]', "damaged"),
    ]:
        (copied / "probe.json").write_text(content)
        with pytest.raises(UserError, match=message):
            run_verify(copied, server.url)
    (copied / "probe.json").unlink()
    with pytest.raises(UserError, match=r"has no probe\.json"):
        run_verify(copied, server.url)
    assert server.requests == [], "the folder is checked before the server is asked"


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["--tolerance", "1.1"], "1.1 is out of range (above 0, at most 1)"),
        (["--tolerance", "x"], "'x' is not a number"),
        (["--timeout", "0"], "0 is out of range"),
        (["--timeout", "nan"], "nan is out of range"),
        (["--dim", "0"], "0 is less than 1"),
        (["--api", "grpc"], "invalid choice: 'grpc'"),
    ]:
        with pytest.raises(SystemExit) as caught:
            verify.make_parser().parse_args(["folder", "http://localhost", *options])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
