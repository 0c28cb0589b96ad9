"""The console script, and the names that `import jaxembed` offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import jaxembed
from helpers import tiny
from helpers.commands import ENV
from jaxembed.__main__ import COMMANDS
from jaxembed.cli import new_parser, prepare_new_output, prepare_output
from jaxembed.errors import UserError

PACKAGE = Path(jaxembed.__file__).parent


def run_script(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxembed", *args], capture_output=True, text=True, env=ENV, cwd=cwd, check=False
    )


def test_every_command_is_listed() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "cli", "errors", "files"}
    assert modules | {"data"} == set(COMMANDS)
    done = run_script("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)


def test_the_script_runs_a_command() -> None:
    done = run_script("data", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m jaxembed.data")
    done = run_script("tarin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'tarin' is not a command; expected data, train, ")
    assert run_script("--version").stdout.strip() == f"jaxembed {jaxembed.__version__}"


def test_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(jaxembed), "train", raising=False)  # other tests import the module of this name
    from jaxembed import Embedder, load_config, train

    assert callable(Embedder.load) and callable(load_config) and callable(train)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = jaxembed.Trainer


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path: Path, target: str) -> None:
    """It would be replaced, and the output would not be where the link leads."""
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(UserError, match="out: already exists"):
        prepare_new_output(str(tmp_path / "out"))


@pytest.mark.parametrize("path", [".", "/"])
def test_an_output_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"is a folder \(expected an output to write\)"):
        prepare_output(Path(path))


def test_an_argument_with_a_line_break_is_reported_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        new_parser("data", "").parse_args(["a\nb"])
    assert capsys.readouterr().err.count("\n") == 1


def test_train_takes_overrides_before_and_after_its_options() -> None:
    from jaxembed.train import make_parser

    orders = ["c.yaml a=1 b=2 --plan --slices 2", "c.yaml a=1 --plan b=2 --slices 2", "--plan c.yaml --slices 2 a=1 b=2"]
    for order in orders:
        args = make_parser().parse_args(order.split())
        assert (args.config, args.overrides, args.plan, args.slices) == ("c.yaml", ["a=1", "b=2"], True, 2)


CONFIG = "model: {base: BASE}\ndata: {sources: [{path: pairs.jsonl, format: pairs}]}\ntrain: {batch_size: 8}\nrun: {dir: out}\n"


@pytest.mark.parametrize(
    ("base", "override", "message"),
    [
        ("nowhere", "train.seed=0", "nowhere: "),
        ("base", "train.stepz=1", "unknown key train.stepz. Did you mean train.steps?"),
        ("base", "mesh.data=9", "mesh.data=9: more devices than available"),
        ("base", "run.dir=.", ": holds files, but not a run"),
        ("base", "run.dir=pairs.jsonl", "pairs.jsonl: is a file (expected a run directory)"),
    ],
)
def test_mistakes_are_reported_before_data_is_read(tmp_path: Path, base: str, override: str, message: str) -> None:
    """The data is not JSON, which would be reported if it were read first."""
    tiny.write_folder(tmp_path / "base", "qwen3")
    (tmp_path / "c.yaml").write_text(CONFIG.replace("BASE", base))
    (tmp_path / "pairs.jsonl").write_text("{\n")
    done = run_script("train", "c.yaml", override, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]


def test_commands_start_without_jax() -> None:
    """So --help and errors in options come fast. `evaluate` does import it."""
    modules = [f"jaxembed.{name}" if name != "data" else "jaxembed.data.__main__" for name in COMMANDS if name != "evaluate"]
    code = f"import {', '.join(modules)}, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)
