"""The documentation is true: its commands work as typed, its configs load, its keys, links and paths exist.

Commands are those of all ```bash blocks. Those of the README and the guides run in a sandbox: a folder of small stand-ins for
the files they name, with settings that keep training short. A block that says `# Needs: ...` is only parsed if the sandbox does
not have what it needs, and so is every command of the other pages.
"""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from helpers import tiny
from helpers.commands import ENV
from helpers.runs import use_one_device
from jaxembed import config
from jaxembed.config.curation import CurateConfig
from jaxembed.config.instructions import InstructionTable
from jaxembed.config.sections import make_key_table, parse_section
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_jsonl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN_PAGES = [ROOT / "README.md", DOCS / "getting-started.md", *sorted((DOCS / "guides").glob("*.md"))]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.M | re.S)
NEEDS = re.compile(r"^# Needs: (.+)$", re.M)
# What the sandbox has of the things that blocks need.
PROVIDED = {
    "the base model from the hub; a GPU or TPU is recommended",
    "the run of the fine-tune",
    "two trained runs",
    "the rows of the LLM server, and the base model from the hub",
}
SECTIONS = "run|model|data|matryoshka|gradcache|mine|optim|mesh|train|eval"
FILE_ENDINGS = ("jsonl", "json", "yaml", "parquet", "txt", "npy", "arrow", "py")
SHORT_RUN = [
    "train.steps=1", "train.batch_size=4", "train.log_every=1", "data.max_length=128", "optim.warmup_steps=1",
    "model.dtype=float32", "model.remat=false", "model.unroll=false",
]  # fmt: skip


class Block(NamedTuple):
    page: Path
    language: str
    title: str
    text: str


class Command(NamedTuple):
    """A command line of a page, as words."""

    page: Path
    block: int
    words: list[str]
    is_runnable: bool

    def __str__(self) -> str:
        return " ".join(self.words)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[Block]:
    found = (Block(page, *match.groups(default="")) for match in FENCE.finditer(page.read_text()))
    return [block for block in found if block.language == language]


def commands(page: Path) -> Iterator[Command]:
    for number, block in enumerate(blocks(page, "bash")):
        needs = NEEDS.findall(block.text)
        lines = block.text.replace("\\\n", " ").splitlines()
        for words in (shlex.split(line, comments=True) for line in lines):
            if words:
                yield Command(page, number, words, page in RUN_PAGES and set(needs) <= PROVIDED)


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


# Keys, links, paths, examples


# The recipes have tests of their own (tests/config/test_recipes.py); some configs are links to them.
OWN_CONFIGS = [path for path in (ROOT / "configs").glob("*.yaml") if not path.is_symlink() and path.name != "catalog.yaml"]


@pytest.mark.parametrize("path", sorted(OWN_CONFIGS), ids=lambda path: path.stem)
def test_config_loads_and_opens_with_its_command(path: Path) -> None:
    settings = config.load_config(path)
    assert settings.run.dir == f"runs/{path.stem}"
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# python -m jaxembed.train configs/", "# make "))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text())):
        if not target.startswith("http"):
            page = path.parent / target if target else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that mkdocs gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_key_exists(path: Path) -> None:
    known = {key.replace("[]", "") for key in re.findall(r"^\| `([^`]+)`", make_key_table(config.Config), re.M)}
    parents = {key.rpartition(".")[0] for key in known}
    text = re.sub(r"python -m [\w.]+|jaxembed/[\w/]+\.py", "", path.read_text())
    keys = re.findall(rf"\b((?:{SECTIONS})\.[\w.]+)=", text) + re.findall(rf"`((?:{SECTIONS})\.[\w.\[\]]+)[`=]", text)
    for key in keys:
        name = re.sub(r"\[\]|\.\d+", "", key)
        assert name in known | parents or name.endswith(FILE_ENDINGS) or name == "run.dir", key


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_paths_of_the_checkout_exist(path: Path) -> None:
    pattern = r"(?<![\w/.])((?:jaxembed|benchmarks|configs|launch|notebooks|tests)/[\w/]+\.(?:py|yaml|sh|ipynb))\b"
    for name in re.findall(pattern, path.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_config_reference_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runpy.run_module("jaxembed.train", run_name="command")["make_parser"]().parse_args(["--keys"])
    assert capsys.readouterr().out.strip() == make_key_table(config.Config)
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    page = hooks["on_page_markdown"]((DOCS / "reference" / "config.md").read_text())
    assert set(make_key_table(config.Config).splitlines()) <= set(page.splitlines())


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(str(page.relative_to(DOCS)) in navigation for page in PAGES[1:])


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_json_examples_are_json(path: Path) -> None:
    for block in blocks(path, "json"):
        for line in block.text.splitlines():
            json.loads(line.replace('": ...', '": "..."'))


@pytest.mark.parametrize("path", RUN_PAGES, ids=page_id)
def test_yaml_examples_load(path: Path) -> None:
    """Fragments load within a whole config."""
    for block in blocks(path, "yaml"):
        tree = yaml.safe_load(block.text)
        if "steps" in tree:
            assert parse_section(CurateConfig, tree, str(path)).steps
            continue
        if "by_task" in tree:
            assert parse_section(InstructionTable, tree, str(path)).by_task
            continue
        fragment = {"data": {"sources": tree}} if isinstance(tree, list) else tree
        data = {"sources": [{"path": "pairs.jsonl"}], "hard_negatives": 7} | fragment.get("data", {})
        whole = {"model": {"base": "base"}, **fragment, "data": data}
        assert config.parse_config(whole, str(path)).data.sources


# Commands


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small stand-ins for all files that the runnable commands name."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("configs", "launch"):
        (root / name).symlink_to(ROOT / name)
    (root / "Qwen").mkdir()
    tiny.write_folder(root / "Qwen" / "Qwen2-0.5B", "qwen3")
    (root / "runs" / "quickstart").mkdir(parents=True)
    tiny.write_folder(root / "sentence-transformers" / "all-MiniLM-L6-v2", "qwen3")
    for seed, name in enumerate(["quickstart/export", "retrieval", "sts"]):
        tiny.write_folder(root / "runs" / name, "qwen3", seed)
    words = ["card", "PIN", "delivery", "account", "transfer", "limit", "fee", "refund", "app", "code", "phone", "address"]
    questions = [f"how do I change my {a} and {b}" for a, b in itertools.combinations(words, 2)]
    answers = [f"To change your {a} and {b}, open the app." for a, b in itertools.combinations(words, 2)]
    both = list(zip(questions, answers, strict=True))
    write_jsonl(root / "pairs.jsonl", [{"query": q, "pos": [a], "neg": [answers[-1 - i]]} for i, (q, a) in enumerate(both)])
    write_jsonl(root / "scored.jsonl", [{"sentence1": q, "sentence2": a, "score": 5 - i % 2} for i, (q, a) in enumerate(both)])
    corpus, queries = (
        {f"{name}{i}": text for i, text in enumerate(texts)} for name, texts in (("d", answers), ("q", questions))
    )
    write_beir(root / "news_beir", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(questions))})
    split = root / "synthetic" / "questions-split"
    write_beir(split / "heldout", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(questions))})
    write_jsonl(split / "train.jsonl", [{"query": q, "pos": [a]} for q, a in both])
    write_jsonl(root / "topics.jsonl", [{"text": q, "label": q.split()[-1]} for q in questions])
    write_jsonl(root / "articles.jsonl", [{"title": q, "abstract": a, "lang": "en", "question": q} for q, a in both])
    (root / "handbook").mkdir()
    (root / "handbook" / "app.md").write_text("# App\n\n" + "\n\n".join(answers))
    write_jsonl(root / "examples.jsonl", [{"query": questions[0], "response": answers[0]}])
    (root / "questions.txt").write_text("\n".join(questions[:3]))
    (root / "documents.txt").write_text("\n".join(questions))
    question_table = pa.table({"question": questions, "answer": answers})
    nli_table = pa.table({"premise": questions, "hypothesis": answers, "label": [i % 2 * 2 for i in range(len(both))]})
    for name, rows in (("train", question_table), ("msmarco/train", question_table), ("nli/train-00000-of-00001", nli_table)):
        path = root / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(rows, path)
    for block in itertools.chain.from_iterable(blocks(page, language) for page in RUN_PAGES for language in ("yaml", "text")):
        if block.title:
            (root / block.title).write_text(block.text)
    articles = next(block for block in blocks(DOCS / "guides" / "pairs.md", "yaml") if "articles.jsonl" in block.text)
    (root / "articles.yaml").write_text(yaml.safe_dump({"data": {"sources": yaml.safe_load(articles.text)}}))
    (root / "mixture.yaml").write_text((ROOT / "configs" / "finetune.yaml").read_text())
    return root


@pytest.fixture
def sandbox(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stand-ins as the working folder, with a cache of its own."""
    monkeypatch.chdir(stand_ins)
    monkeypatch.setenv("JAXEMBED_CACHE", str(stand_ins / "cache"))
    return stand_ins


def call(command: Command, extra: list[str], execute: bool) -> Namespace:
    """Parse the arguments of `python -m jaxembed.NAME ...` in this process, and run it if asked."""
    # Not imported: an attribute `jaxembed.train` would hide the function of that name.
    module = runpy.run_module(command.words[2], run_name="command")
    arguments = module["make_parser"]().parse_args([*command.words[3:], *extra])
    if execute:
        module["main"](arguments)
    return arguments


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: f"{command.page.stem}: {command}")
def test_command_is_known(command: Command, sandbox: Path) -> None:
    """Its program exists and takes the options; a config loads with the overrides."""
    match command.words:
        case ["python", "-m", module, *_] if module.startswith("jaxembed."):
            arguments = call(command, [], execute=False)
            if module == "jaxembed.train":
                config.load_config(arguments.config, arguments.overrides)
        case ["python", script, *arguments]:
            assert (ROOT / script).is_file()
            sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))  # some share their options
            assert all(f'"{word}"' in sources for word in arguments if word.startswith("--"))
        case [script, *arguments] if script.startswith("launch/"):
            dry_run([script, *arguments])
        case ["sbatch", *arguments]:
            start = arguments.index("launch/slurm.sh")
            dry_run(["bash", *arguments[start:]])
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        case ["pip", "install", *arguments]:
            extras = set(re.findall(r"[\w]+", "".join(re.findall(r"\[(.+?)\]", " ".join(arguments)))))
            assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
        case ["source" | "gcloud" | "vllm" | "text-embeddings-router" | "convert_hf_to_gguf.py" | "llama-server", *_]:
            pass
        case _:
            pytest.fail(f"a command that this test does not know: {command}")


def dry_run(words: list[str]) -> None:
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    words = [*words[: script + 1], "--dry-run", *words[script + 1 :]]
    done = subprocess.run(words, env=ENV | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


def runs_here(command: Command) -> bool:
    """Whether it is a command of jaxembed that needs no network. `evaluate` downloads the data of MTEB's tasks."""
    return command.words[:2] == ["python", "-m"] and not {"--tasks", "--benchmark"} & set(command.words)


# The runnable commands by block, each distinct block once.
RUNNABLE = {
    tuple(map(str, found)): found
    for page in RUN_PAGES
    for _, block in itertools.groupby(commands(page), key=lambda command: command.block)
    if (found := [command for command in block if command.is_runnable and runs_here(command)])
}
FINE_TUNE = next(iter(RUNNABLE.values()))[0]


@pytest.mark.parametrize("block", RUNNABLE.values(), ids=lambda block: f"{block[0].page.stem}: {block[0]}")
def test_commands_run(block: list[Command], sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(**_: Any) -> None:
        raise ValueError("no cluster here")  # as without one; JAX can be asked only once per process

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    use_one_device(monkeypatch)
    needs_fine_tune = any("runs/finetune" in word for command in block for word in command.words)
    done = sandbox / "done"  # a second export to the same folder is refused
    done.touch()
    for command in [FINE_TUNE, *block] if needs_fine_tune else block:
        if str(command) not in done.read_text().splitlines():
            call(command, SHORT_RUN if command.words[2] == "jaxembed.train" else [], execute=True)
            done.write_text(f"{done.read_text()}{command}\n")


def test_most_commands_run() -> None:
    names = {command.words[2].removeprefix("jaxembed.") for block in RUNNABLE.values() for command in block}
    assert names == {"train", "export", "encode", "evaluate", "mine", "merge", "data", "curate", "report", "prune"}


def test_python_example_of_the_readme_runs(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks(ROOT / "README.md", "python")
    exec(compile(example.text, "README.md", "exec"), {})
    assert capsys.readouterr().out.count(",") == 2
