"""The commands end to end on tiny models: train, resume, encode, export, and their one-line errors."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers import tiny
from helpers.commands import run_command
from helpers.runs import make_config, read_losses, use_one_device, write_base_and_data
from jaxembed import Embedder
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.runs.train import train
from jaxembed.training.loop import TrainingLoop
from jaxembed.training.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("train"))


def test_training_learns_and_records_itself(folder):
    result = train(make_config(folder, "whole"), "python -m jaxembed.train whole.yaml")
    run = folder / "whole"
    assert result["step"] == 12
    assert result["scores"]["sts/spearman"] > result["untrained"]["sts/spearman"]
    assert np.mean(read_losses(run)[-3:]) < np.mean(read_losses(run)[:3])
    for name in ("config.yaml", "versions.json", "data_hashes.json", "base.json", "jaxembed.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    row = next(row for row in read_metrics(run) if "loss" in row)
    expected = {
        "stage", "step", "loss", "infonce", "learning_rate", "grad_norm", "step_seconds", "data_wait_seconds",
        "useful_tokens_per_second", "examples_per_second", "padding_fraction", "new_programs",
    }  # fmt: skip
    assert expected <= set(row)
    assert row["infonce_negatives"] <= 31
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "base.json").read_text())["hash"]
    start = json.loads((run / "starts.jsonl").read_text())
    assert (start["step"], start["command"], start["devices"]) == (0, "python -m jaxembed.train whole.yaml", 2)
    assert 0 < start["parameters"] == start["trained_parameters"]


def test_rates_count_all_steps_and_no_evaluation(folder, monkeypatch):
    """Steps before an evaluation that falls between two logged steps count, the evaluation does not."""
    seconds = {"step": 0.0, "evaluation": 0.0}

    def time_method(name, kind):
        method = getattr(TrainingLoop, name)

        def run(*args):
            start = time.perf_counter()
            result = method(*args)
            seconds[kind] += time.perf_counter() - start
            return result

        monkeypatch.setattr(TrainingLoop, name, run)

    time_method("_start_step", "step")
    time_method("_evaluate", "evaluation")
    start = time.perf_counter()
    train(make_config(folder, "rates", "train.steps=2", "train.log_every=2", "train.eval_every=1"))
    (row,) = (row for row in read_metrics(folder / "rates") if "loss" in row)
    assert seconds["step"] < 2 * row["step_seconds"] < time.perf_counter() - start - seconds["evaluation"]


def test_training_records_sizes_shares_and_lengths_of_its_sources(folder):
    plain = [f"data.sources=[{{path: {folder / 'pairs.jsonl'}}}]", "data.max_length=8", "data.hard_negatives=0"]
    train(make_config(folder, "measured", *plain, "train.steps=3", "eval.sets=[]"))
    (((source,),)) = json.loads((folder / "measured" / "data.json").read_text())
    assert (source["name"], source["format"], source["rows"], source["examples"]) == ("pairs", "pairs", 96, 96)
    assert source["share"] == 1 and source["epochs"] == 0.5
    tokens = source["tokens"]
    assert tokens["texts"] == sum(tokens["histogram"]["counts"]) == 2 * 96
    assert 0 < tokens["truncated"] < 1 and tokens["most"] > tokens["max_length"] == 8


def test_dropped_rows_are_reported_and_recorded(folder, caplog):
    source = f"data.sources=[{{path: {folder / 'sts.jsonl'}, name: sts, min_score: 1}}]"
    with caplog.at_level("INFO", "jaxembed"):
        train(
            make_config(folder, "part", source, "train.steps=3", "data.max_length=8", "data.hard_negatives=0", "eval.sets=[]")
        )
    assert "  dropped: 48 (score below min_score)" in caplog.messages
    assert json.loads((folder / "part" / "dropped.json").read_text()) == [{"sts": {"score below min_score": 48}}]


def test_losses_depend_only_on_the_seed(folder):
    train(make_config(folder, "again", "train.steps=3"))
    train(make_config(folder, "twin", "train.steps=3"))
    train(make_config(folder, "other", "train.steps=3", "train.seed=1"))
    assert read_losses(folder / "again") == read_losses(folder / "twin")
    assert read_losses(folder / "again") != read_losses(folder / "other")


def test_a_run_directory_of_another_config_is_refused(folder):
    train(make_config(folder, "mine", "train.steps=1"))
    with pytest.raises(UserError, match=r"mine: belongs to another config \(optim\.learning_rate: 0\.001 -> 0\.01\)"):
        train(make_config(folder, "mine", "train.steps=1", "optim.learning_rate=0.01"))


def test_changed_data_is_refused(folder):
    pairs, held_out = folder / "edited.jsonl", folder / "edited-sts.jsonl"
    pairs.write_text((folder / "pairs.jsonl").read_text())
    held_out.write_text((folder / "sts.jsonl").read_text())
    edited = make_config(folder, "edited", "train.steps=1", f"data.sources.0.path={pairs}", f"eval.sets.0.path={held_out}")
    train(edited)
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r"edited: its training data changed \(.*edited\.jsonl: '\w+' -> '\w+'\)"):
        train(edited)
    pairs.write_text("".join(lines))
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        UserError, match=r"edited: the held-out data that selects its best checkpoint changed \(sts: '\w+' -> '"
    ):
        train(edited)


def test_batch_must_be_divisible_and_within_the_data(folder):
    with pytest.raises(UserError, match=r"^train\.batch_size is 15 \(expected a multiple of 2, the shards of the mesh"):
        train(make_config(folder, "odd", "train.batch_size=15"))
    with pytest.raises(UserError, match=r"train\.batch_size: 128 is more than the examples of the sources \(96\)"):
        train(make_config(folder, "big", "train.batch_size=128"))
    with pytest.raises(UserError, match=r"data\.max_length: 256 is too long \(.* has 128 positions\)"):
        train(make_config(folder, "long", "data.max_length=256"))
    with pytest.raises(UserError, match=r"data\.max_length: 1 leaves no room for a text \(1 are special tokens\)"):
        train(make_config(folder, "short", "data.max_length=1"))
    with pytest.raises(UserError, match=r"x: cannot be accessed \(File name too long\)"):
        train(make_config(folder, "named", f"run.dir={'x' * 300}"))
    with pytest.raises(UserError, match=r"eval\.best is nothing/here \(expected one of sts/spearman"):
        train(make_config(folder, "best", "eval.best=nothing/here"))


def test_a_pooling_with_weights_trains_and_is_exported(folder, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    train(
        make_config(
            folder, "latent", "model.pooling.kind=latent_attention", "model.pooling.latents=7", "train.steps=4", "eval.sets=[]"
        )
    )
    model = Embedder.load(folder / "latent")
    largest = {name: float(np.abs(x).max()) for name, x in flatten_dict(model.params["pooling"], sep="/").items()}
    assert largest["attention/out/kernel"] > 0 < largest["mlp/out/kernel"]  # zero before training
    assert model.spec.latents == 7
    export(model, tmp_path / "out", "float32", Card("latent", "base"))
    further = make_config(folder, "further", f"model.base={tmp_path / 'out'}", "train.steps=1", "optim.learning_rate=1e-9")
    train(further)  # starts from the exported pooling, not from a random one
    np.testing.assert_allclose(Embedder.load(folder / "further").encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-4)


def test_best_and_last_checkpoints_load(folder):
    train(make_config(folder, "loads", "train.keep_checkpoints=1"))
    best, last = (Embedder.load(folder / "loads", checkpoint=which) for which in ("best", "last"))
    assert last.revision == "loads-12"
    assert best.spec.prompts["query"] == "Instruct: Find it\nQuery:"
    np.testing.assert_allclose(np.linalg.norm(best.encode(tiny.TEXTS), axis=1), 1, atol=1e-6)
    with pytest.raises(UserError, match="no checkpoint '5'"):
        Embedder.load(folder / "loads", checkpoint="5")


def test_a_preset_trains_a_tokenizer(folder, monkeypatch):
    use_one_device(monkeypatch)
    train(make_config(folder, "scratch", "model.base=preset:tiny", "train.steps=1", "eval.sets=[]"))
    model = Embedder.load(folder / "scratch")
    ids = model.tokenizer(["aaa bbb"], [""]).ids[0]
    assert model.tokenizer.hf_tokenizer.decode(ids) == "aaa bbb<|endoftext|>"


def test_encode_command_streams_in_order(folder, tmp_path):
    texts = [f"{a} {b}" for a in tiny.TEXTS for b in ("one", "two")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    vectors = {}
    for name in ("in.jsonl", "in.txt"):
        out = tmp_path / f"{name}.npy"
        done = run_command(
            "jaxembed.encode", str(folder / "base"), str(tmp_path / name), str(out), "--instruction", "Find", "--dim", "16"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {"out": str(out), "vectors": len(texts), "width": 16}
        vectors[name] = np.load(out)
    np.testing.assert_array_equal(vectors["in.jsonl"], vectors["in.txt"])
    model = Embedder.load(folder / "base")
    np.testing.assert_allclose(vectors["in.txt"], model.encode(texts, instruction="Find", dim=16), atol=1e-5)
    assert np.abs(vectors["in.txt"] - model.encode(texts, dim=16)).max() > 1e-3

    done = run_command("jaxembed.encode", str(folder / "base"), str(tmp_path / "in.txt"), str(tmp_path / "in.txt.npy"))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("already exists. Remove it, or name another output.")


def test_encode_with_a_stored_prompt_and_no_output_after_an_error(folder, tmp_path):
    train(make_config(folder, "prompted", "train.steps=1"))
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    encode = ["jaxembed.encode", str(folder / "prompted"), str(tmp_path / "in.txt"), str(tmp_path / "out.npy")]
    assert run_command(*encode, "--prompt-name", "query").returncode == 0
    expected = Embedder.load(folder / "prompted").encode(["one", "two"], instruction="Find it")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)

    (tmp_path / "out.npy").unlink()
    done = run_command(*encode, "--prompt-name", "passage")
    assert done.returncode == 2
    message = "error: prompt_name: 'passage' is not stored with this model (stored: query, document, pairs)."
    assert done.stderr.strip().splitlines()[-1] == message
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "the following arguments are required: CONFIG.yaml. Set config keys as"),
        (["train", "a.yaml", "--steps"], "unrecognized arguments: --steps. Set config keys as train.steps=3. See python"),
        (["encode", "m", "a", "b", "--prompt-name", "x", "--instruction", "y"], "argument --instruction: not allowed with"),
        (["evaluate", "m", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
    ],
)
def test_errors_of_the_command_line_are_one_line(arguments, message):
    done = run_command(f"jaxembed.{arguments[0]}", *arguments[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_bad_row_is_reported_in_one_line_with_exit_code_2(folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "pos": ["b"]}\n{"query": "a", "pos": "b"}\n')
    make_config(folder, "bad_row")
    overrides = f"data.sources.0.path={bad}", f"run.dir={tmp_path / 'run'}"
    done = run_command("jaxembed.train", str(folder / "bad_row.yaml"), *overrides)
    assert done.returncode == 2
    assert done.stderr.strip() == f'error: {bad}:2: "pos" is a string (expected a list of strings). Write "pos": ["b"].'
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["export", "evaluate"])
def test_an_existing_output_is_reported_in_one_line(folder, tmp_path, name):
    (tmp_path / "out").write_text("mine")
    arguments = {"export": [str(tmp_path / "out")], "evaluate": ["--tasks", "STSBenchmark", "--out", str(tmp_path / "out")]}
    done = run_command(f"jaxembed.{name}", str(folder / "base"), *arguments[name])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: ")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["train", "encode", "export", "merge", "evaluate"])
def test_help(name):
    done = run_command(f"jaxembed.{name}", "--help")
    assert done.returncode == 0
    assert f"python -m jaxembed.{name}" in done.stdout
