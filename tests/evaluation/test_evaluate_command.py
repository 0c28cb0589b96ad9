"""The command: scores equal those of sentence-transformers and mteb, and those of several processes; kills; bad input."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.commands import Process
from helpers.held_out import write_rows
from helpers.mteb_tasks import make_tasks
from helpers.process_groups import start_all
from helpers.runs import use_one_device
from jaxembed import Embedder, evaluate
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.beir import write_beir
from jaxembed.errors import UserError
from jaxembed.evaluation import mteb_submission, mteb_tasks
from jaxembed.evaluation.encoders import load_encoder
from jaxembed.evaluation.evaluate import begin_results
from jaxembed.evaluation.task_encoder import name_model
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.spec_files import write_spec

TEMPLATE = "Instruct: {instruction}\nQuery:"
SPECS = {
    "causal": EmbeddingSpec(attention="causal", pooling="last", max_length=128),
    "bidirectional and truncated": EmbeddingSpec(attention="bidirectional", pooling="mean", max_length=12),
    "instructed": EmbeddingSpec(
        attention="bidirectional", pooling="mean", prompts={"document": ""}, instruction_template=TEMPLATE,
        instruction_table="nv_embed", max_length=128,
    ),
}  # fmt: skip
WIDTHS = ["32", "16", "8"]


@pytest.fixture(autouse=True)
def local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_tasks, "find_tasks", make_tasks)
    use_one_device(monkeypatch)


def run(*arguments: str) -> dict[str, Any]:
    return evaluate.evaluate(evaluate.make_parser().parse_args([*arguments, "--tasks", "STSBenchmark", "SciFact"]))


def write_model(folder: Path, spec: EmbeddingSpec) -> Path:
    tiny.write_folder(folder / "base", "qwen3")
    write_spec(folder / "base", spec)
    export(Embedder.load(folder / "base"), folder / "out", "float32", Card("out", "base"))
    return folder / "out"


def write_model_and_beir(folder: Path) -> list[str]:
    """Write a model with instructions and a BEIR folder. Return the arguments that score the model on it at two widths."""
    tiny.write_folder(folder / "base", "qwen3")
    write_spec(folder / "base", SPECS["instructed"])
    documents = {f"d{i}": text for i, text in enumerate(tiny.TEXTS)}
    write_beir(folder / "own", documents, documents, {name: {name: 1} for name in documents})
    return [str(folder / "base"), "--beir", str(folder / "own"), "--dim", "32", "8"]


@pytest.mark.parametrize("name", SPECS)
def test_scores_equal_those_of_sentence_transformers_and_mteb(name: str, tmp_path: Path) -> None:
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    folder = write_model(tmp_path, SPECS[name])
    scores = run(str(folder), "--dim", *WIDTHS, "--out", str(tmp_path / "scores"))["scores"]
    tasks = [task for task, _ in make_tasks()]
    encoder = load_encoder(str(folder))
    prompts = mteb_submission.list_prompts(encoder, tasks)
    assert any("support or refute" in prompt for prompt in prompts.values()) == (name == "instructed")
    for width in WIDTHS:
        model = SentenceTransformer(str(folder), device="cpu", truncate_dim=int(width))
        model.prompts = {}
        wrapper = SentenceTransformerEncoderWrapper(model, model_prompts=prompts)
        for result in mteb.evaluate(wrapper, [task for task, _ in make_tasks()], cache=None, show_progress_bar=False):
            assert scores[result.task_name]["widths"][width] == pytest.approx(result.get_score(), abs=1e-3)
    assert (tmp_path / "scores" / "scores.md").read_text().startswith("## all tasks\n\n| Model | Retrieval (1) | STS (1) |")
    assert json.loads((tmp_path / "scores" / "model.json").read_text()) == {"model": str(folder.resolve())}


def test_files_of_the_user_have_the_scores_of_sentence_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SPECS["instructed"])
    rows = [f"{text} {i}" for i in range(3) for text in tiny.TEXTS]
    documents = {f"d{i}": text for i, text in enumerate(rows)}
    queries = {name: text[: len(text) // 2] for name, text in documents.items()}
    write_beir(tmp_path / "own", documents, queries, {name: {name: 1} for name in documents})
    pairs = itertools.combinations(rows[:12], 2)
    scored = [{"sentence1": first, "sentence2": second, "score": i % 7} for i, (first, second) in enumerate(pairs)]
    write_rows(tmp_path / "scored.jsonl", scored)
    write_rows(tmp_path / "labeled.jsonl", [{"text": text, "label": str(len(text) > 40)} for text in rows])
    options = ["--beir", "own", "--sts", "scored.jsonl", "--labels", "labeled.jsonl"]
    files = [str(tmp_path / option) if not option.startswith("--") else option for option in options]
    ours, theirs = (run(str(folder), *files, "--backend", backend)["scores"] for backend in ("jax", "sentence-transformers"))
    assert list(ours) == list(theirs) and {"own", "scored", "labeled-classification", "labeled-clustering"} < ours.keys()
    for name in ours:
        assert theirs[name]["score"] == pytest.approx(ours[name]["score"], abs=1e-3), name
        for metric, score in ours[name].get("metrics", {}).items():
            assert theirs[name]["metrics"][metric] == pytest.approx(score, abs=1e-3), (name, metric)


def test_layers_scores_a_model_like_the_export_of_its_first_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SPECS["causal"])
    export(Embedder.load(folder).keep_first_layers(1), tmp_path / "first", "float32", Card("first", "base"))
    whole, layers, exported = (
        run(*arguments)["scores"] for arguments in ([str(folder)], [str(folder), "--layers", "1"], [str(tmp_path / "first")])
    )
    for name, result in exported.items():
        assert layers[name]["score"] == pytest.approx(result["score"], abs=1e-6)
    assert layers["STSBenchmark"]["score"] != pytest.approx(whole["STSBenchmark"]["score"], abs=1e-3)


SCRIPT = """
from helpers.mteb_tasks import make_tasks
from jaxembed import cli, evaluate
from jaxembed.evaluation import mteb_tasks
from jaxembed.search import nearest

mteb_tasks.find_tasks = make_tasks
nearest._can_use_faiss = lambda: False  # search on the mesh, as on accelerators
cli.run_command(evaluate.main, evaluate.make_parser())
"""


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    arguments = [*write_model_and_beir(tmp_path), "--tasks", "STSBenchmark", "SciFact"]
    expected = run(*arguments)
    first, second = start_all(SCRIPT, [*arguments, "--out", str(tmp_path / "out")], tmp_path, count=2, devices=1)
    (output, errors), (other_output, other_errors) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), errors + other_errors
    scores = json.loads(output.splitlines()[-1])["scores"]
    assert list(scores) == ["STSBenchmark", "SciFact", "own"] and scores["own"]["score"] == 1
    for name, result in expected["scores"].items():
        assert scores[name]["widths"] == pytest.approx(result["widths"], abs=1e-6)
    assert "scores" not in other_output  # process 0 alone prints the result


def test_results_of_another_model_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {"model.json", "scores.json", "scores.md", "tables.json", "comparison.json", "leaks.json", "notes.txt"}
    (tmp_path / "model").mkdir()
    begin_results(tmp_path, "~/model")
    assert json.loads((tmp_path / "model.json").read_text()) == {"model": str(tmp_path / "model")}
    for name in names - {"model.json"}:
        (tmp_path / name).write_text("")
    begin_results(tmp_path, str(tmp_path / "model"))
    assert {path.name for path in tmp_path.iterdir()} == names | {"model"}
    begin_results(tmp_path, "organization/other")
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "notes.txt", "model"}


def test_a_folder_is_named_by_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_model(Path(".")) == tmp_path.name and name_model(Path("organization/model")) == "model"


def test_options_that_do_not_fit_the_model_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All errors come before the weights are loaded."""
    folder = tiny.write_folder(tmp_path / "base", "qwen3")
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "own.yaml").write_text("Tatoeba: x")
    submission = ["--submission", "x", "--submission-name", "a/b", "--out", "y"]
    for options, line in (
        (["--dim", "64"], r"--dim: 64 is above the width of .+ \(32\)"),
        (["--max-length", "200"], r"--max-length: 200 is above the model's limit \(128 tokens\)"),
        (["--instructions", str(tmp_path / "own.yaml")], "names no task of this run"),
        (["--instructions", "nvembed"], "Did you mean 'nv_embed'"),
        (["--submission", "x", "--out", "y"], "Add --submission-name"),
        (["--submission", "x", "--submission-name", "a/b"], "--submission: needs the results of MTEB tasks"),
        (["--submission-name", "a/b"], r"--submission-name: names the model of a submission\. Add --submission DIR"),
        ([*submission, "--layers", "1"], "--submission: describes the whole model, not its first layers"),
        ([*submission, "--precision", "binary", "float32"], r"has scores at float32 \(found binary first\)"),
        (["--backend", "sentence-transformers", "--fsdp", "4"], "--fsdp applies to the JAX model only"),
    ):
        with pytest.raises(UserError, match=line):
            run(str(folder), *options)
    for number in ("inf", "nan", "-1"):
        with pytest.raises(SystemExit):
            evaluate.make_parser().parse_args([str(folder), "--vector-memory", number])
        assert f"{number} is out of range (finite, at least 0)" in capsys.readouterr().err
    with pytest.raises(UserError, match="--languages: applies to tasks of MTEB"):
        evaluate.evaluate(evaluate.make_parser().parse_args([str(folder), "--languages", "eng"]))


KILLED_SCRIPT = """
import os, signal, sys
from pathlib import Path
from helpers.mteb_tasks import make_tasks
from jaxembed import cli, evaluate
from jaxembed.evaluation import mteb_tasks
from jaxembed.evaluation.task_encoder import TaskEncoder

record, last_task, last_call = Path(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
encode, calls = TaskEncoder.encode, []

def encode_until_the_kill(self, texts, prompt):
    calls.append(self.progress.task)
    if calls.count(last_task) == last_call:
        os.kill(os.getpid(), signal.SIGKILL)
    with record.open("a") as file:
        print(self.progress.task, file=file)
    return encode(self, texts, prompt)

TaskEncoder.encode = encode_until_the_kill
mteb_tasks.find_tasks = make_tasks
cli.run_command(evaluate.main, evaluate.make_parser())
"""


def test_a_command_that_is_killed_continues_without_repeating_tasks(tmp_path: Path) -> None:
    """SIGKILL inside the first task, before anything of the last one is encoded, and inside that one."""
    options = write_model_and_beir(tmp_path)
    undisturbed = run(*options)["scores"]
    assert list(undisturbed) == ["STSBenchmark", "SciFact", "own"]

    def start(name: str, last_task: str, last_call: int) -> tuple[int | None, str, list[str]]:
        """Run the command until it encodes for a task for the n-th time. Return its end, and the tasks that it encoded for."""
        record = tmp_path / name
        arguments = [*options, "--tasks", "STSBenchmark", "SciFact", "--out", str(tmp_path / "out")]
        process = Process(KILLED_SCRIPT, [str(record), last_task, str(last_call), *arguments])
        output, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        return process.returncode, output, sorted({*record.read_text().split()})

    assert start("inside the first", "STSBenchmark", 2)[::2] == (-signal.SIGKILL, ["STSBenchmark"])
    assert not (tmp_path / "out" / "scores.json").exists()
    assert start("before the last", "own", 1)[::2] == (-signal.SIGKILL, ["STSBenchmark", "SciFact"])
    assert [*json.loads((tmp_path / "out" / "scores.json").read_text())] == ["STSBenchmark", "SciFact"]
    assert start("inside the last", "own", 2)[::2] == (-signal.SIGKILL, ["own"])
    code, output, encoded = start("to the end", "", 1)
    assert (code, encoded) == (0, ["own"])
    scores = json.loads(output.splitlines()[-1])["scores"]
    assert list(scores) == list(undisturbed)
    for name, result in undisturbed.items():  # mteb rounds the scores that it stores
        assert scores[name]["widths"] == pytest.approx(result["widths"], abs=1e-6)
