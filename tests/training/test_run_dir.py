"""Run directories: which configs resume a run, including runs of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jaxembed.config import Config, load_config
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.training.run_dir import (
    Record,
    check_record,
    check_run_dir,
    check_same_config,
    create_run_dir,
    write_record,
)
from jaxembed.training.run_lock import RunLock

# config.yaml of a run that an earlier version wrote: it lacks keys that came later, and has one that was removed since.
OLD_CONFIG = """
run: {name: old, dir: RUN}
model:
  base: preset:tiny
  attention: null
  pooling: {kind: null, include_instruction: null, latents: null, heads: null}
  projection: {width: null, bias: null}
  echo: null
  normalize: null
  append_eos: null
  instruction_template: null
  query_suffix: null
  example_template: null
  lora: null
  dtype: float32
  remat: false
  unroll: false
  attention_kernel: auto
data:
  max_length: 32
  row_length: null
  hard_negatives: 1
  batching: {kind: blended, ratio: 0.5, no_duplicates: false}
  mixture: {by: weight, temperature: 1.0}
  sources:
  - {path: pairs.jsonl, format: auto, columns: {}, name: '', weight: 1.0, adapter: '', instructions: [Find it],
     document_instruction: '', symmetric: false, few_shot: null, in_batch_negatives: null, label_documents: auto,
     label_names: {}, label_negatives: own, single_labels: error, max_examples: null, min_score: 4.0, pair_templates: [],
     where: {}, min_chars: 0, max_chars: null}
  python_packages: {packages: [stdlib, numpy], holdout_package: null, holdout_functions: 1000}
objectives:
- {name: infonce, weight: 1.0, sources: [], temperature: 0.05, learn_temperature: false, negatives: all,
   directions: [query_document], per_direction: false, mask_same_label: false, margin: null, guide: null, guide_margin: 0.0,
   guide_margin_kind: absolute, focal: 0.0, hardness: 0.0, hardness_of: hard, mixed_negatives: 0}
matryoshka: {dims: [], weights: []}
gradcache: {rows: null}
mine: null
optim: {learning_rate: 0.001, warmup_steps: 2, schedule: linear, weight_decay: 0.01, clip: 1.0, restart: true}
mesh: {data: 2, fsdp: 1, tensor: 1}
train: {steps: 12, batch_size: 16, seed: 0, log_every: 1, checkpoint_every: 4, eval_every: 6, on_nan: stop,
  stall_timeout_s: 1800.0, keep_checkpoints: 2, profile_steps: null, peak_flops: null}
eval:
  sets:
  - {name: sts, kind: sts, path: sts.jsonl, adapter: '', instruction: Find it, document_instruction: ''}
  best: ''
  untrained: true
  bm25: false
stages: []
"""

CONFIG = {
    "model": {"base": "preset:tiny", "unroll": False},
    "data": {"max_length": 32, "hard_negatives": 1, "sources": [{"path": "pairs.jsonl", "instructions": ["Find it"]}]},
    "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
    "train": {"steps": 12, "batch_size": 16, "log_every": 1, "checkpoint_every": 4, "eval_every": 6},
    "eval": {"sets": [{"name": "sts", "kind": "sts", "path": "sts.jsonl", "instruction": "Find it"}]},
    "mesh": {"data": 2},
}


def start_run(config: Config) -> None:
    """Create the run directory of a run that was killed early."""
    with RunLock(Path(config.run.dir)) as lock:
        (create_run_dir(config, lock) / "base.json").write_text("{}")


def load(folder: Path, *overrides: str, run: str = "run") -> Config:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return load_config(path, [f"run.dir={folder / run}", *overrides])


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run directory of an earlier version."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(OLD_CONFIG.replace("RUN", str(run)))
    (run / "base.json").write_text("{}")
    return run


def test_a_run_of_an_earlier_version_resumes(old_run: Path) -> None:
    check_run_dir(load(old_run.parent))


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other", "mesh.data=1", "model.remat=true", "model.unroll=true", "model.attention_kernel=einsum",
        "train.log_every=5", "train.checkpoint_every=3", "train.eval_every=3", "train.keep_checkpoints=7", "train.on_nan=skip",
        "train.profile_steps=[3, 4]", "train.peak_flops=1e12", "train.stall_timeout_s=10", "train.loggers=[]",
        "eval.untrained=false",
        "eval.bm25=true", "eval.best=sts/spearman", "data.sources.0.name=other",
        "eval.sets=[{name: sts, kind: sts, path: sts.jsonl, instruction: Find it}, {name: b, path: b}]",
    ],
)  # fmt: skip
def test_settings_that_do_not_change_the_losses_may_change(old_run: Path, override: str) -> None:
    check_run_dir(load(old_run.parent, override))


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("optim.learning_rate=0.01", r"optim\.learning_rate: 0\.001 -> 0\.01"),
        ("train.steps=13", r"train\.steps: 12 -> 13"),
        ("train.seed=1", r"train\.seed: 0 -> 1"),
        ("model.dtype=bfloat16", r"model\.dtype: 'float32' -> 'bfloat16'"),
        ("data.sources.0.max_examples=3", r"data\.sources\.0\.max_examples: None -> 3"),
        ("objectives=[{name: infonce, temperature: 0.1}]", r"objectives\.0\.temperature: 0\.05 -> 0\.1"),
        ("gradcache.rows=4", r"gradcache\.rows: None -> 4"),
        ("eval.sets=[{name: other, path: b}]", r"eval\.selecting_set\.name: 'sts' -> 'other'"),
        ("mine={}", "mine: None -> "),
    ],
)
def test_settings_that_change_the_losses_are_refused(old_run: Path, override: str, change: str) -> None:
    line = rf"^{old_run}: belongs to another config \({change}.*\)\. Name another run\.dir, or restore the config\.$"
    with pytest.raises(UserError, match=line):
        check_run_dir(load(old_run.parent, override))


def test_a_start_that_failed_early_does_not_bind_the_directory(tmp_path: Path) -> None:
    """A wrong eval.best, for example, is found when the config and the tokenizer are written."""
    wrong, corrected = load(tmp_path, "eval.best=typo"), load(tmp_path, "train.steps=13")
    with RunLock(tmp_path / "run") as lock:
        (create_run_dir(wrong, lock) / "tokenizer").mkdir()
    with RunLock(tmp_path / "run") as lock:
        create_run_dir(check_run_dir(corrected), lock)
    assert (tmp_path / "run" / "config.yaml").read_text() == corrected.dump()
    assert not (tmp_path / "run" / "tokenizer").exists(), "the corrected config may name another base"


def test_a_config_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    config = load(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.yaml").rename(tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=r"run/config\.yaml: is not a config that a run has written, and would be replaced\."):
        check_run_dir(config)


def test_a_folder_of_something_else_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    with pytest.raises(UserError, match="holds files, but not a run"):
        check_run_dir(load(tmp_path))
    (tmp_path / "run" / "lock").mkdir()
    with pytest.raises(UserError, match="holds files, but not a run"):
        check_run_dir(load(tmp_path))


def test_settings_of_stages_are_compared_like_those_of_a_single_stage(tmp_path: Path) -> None:
    stages = "stages=[{train: {steps: 2, log_every: 3}}, {train: {steps: 3}}]"
    path = tmp_path / "mine.yaml"

    def load_staged(*overrides: str) -> Config:
        path.write_text(yaml.safe_dump(CONFIG | {"train": {"batch_size": 16}}))
        return load_config(path, [f"run.dir={tmp_path / 'run'}", stages, *overrides])

    start_run(load_staged())
    check_run_dir(load_staged("stages.0.train.log_every=4", "train.keep_checkpoints=5"))
    with pytest.raises(UserError, match=r"stages\.1\.train\.steps: 3 -> 4"):
        check_run_dir(load_staged("stages.1.train.steps=4"))


def test_a_moved_run_resumes(old_run: Path) -> None:
    old_run.rename(old_run.with_name("moved"))
    check_run_dir(load(old_run.parent, run="moved"))


def test_held_out_sets_may_be_added_to_a_run_without_any(tmp_path: Path) -> None:
    start_run(load(tmp_path, "eval.sets=[]"))
    check_run_dir(load(tmp_path))


def test_only_the_named_keys_of_a_record_are_compared(tmp_path: Path) -> None:
    """A moved base and a key that the record does not have are not changes."""
    write_record(tmp_path, Record("base", {"name": "a", "hash": "1"}, "its base changed"))
    check_record(tmp_path, Record("base", {"name": "b", "hash": "1", "new": 0}, "its base changed", {"hash"}))
    with pytest.raises(UserError, match=r"its base changed \(hash: '1' -> '2'\)"):
        check_record(tmp_path, Record("base", {"name": "a", "hash": "2"}, "its base changed", {"hash"}))


def test_documents_of_an_earlier_run_keep_its_equality(old_run: Path) -> None:
    """Another rule would leave out other pairs. New runs use the one rule of equality."""
    templates = "pair_templates: [{query: '{title}', positive: '{body}'}]"
    recorded = (old_run / "config.yaml").read_text().replace("pair_templates: []", templates)
    (old_run / "config.yaml").write_text(recorded)
    override = f"data.sources=[{{path: pairs.jsonl, instructions: [Find it], {templates}}}]"
    resumed = check_run_dir(load(old_run.parent, override))
    assert [source.equality for stage in resumed.stages for source in stage.data.sources] == ["exact"]
    new = check_run_dir(load(old_run.parent, override, run="new"))
    assert [source.equality for stage in new.stages for source in stage.data.sources] == ["normalized"]


def test_a_process_with_another_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, first = load(tmp_path), load(tmp_path, "optim.learning_rate=0.5")
    check_same_config(own)
    monkeypatch.setattr(processes, "broadcast_from_first", lambda _: first.dump().encode())
    with pytest.raises(UserError, match=r"^config: differs from that of process 0 \(optim\.learning_rate: 0\.5 -> 0\.001\)"):
        check_same_config(own)
