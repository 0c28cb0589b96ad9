"""What a plan counts: FLOPs, collectives and memory, against constants by hand and with the real TPU compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from helpers.commands import TPU_COMPILER_ENV, run_command
from jaxembed import cli
from jaxembed.config import Config
from jaxembed.data.sources import open_rows
from jaxembed.errors import UserError
from jaxembed.planning.assignment import Assignment, parse_assignment, run_in_child
from jaxembed.planning.collectives import find_collectives
from jaxembed.planning.flops import count_matmul_flops
from jaxembed.planning.plan import _find_largest_batch, _make_out_of_memory_error, make_planning_target, plan
from jaxembed.planning.stand_in_negatives import add_stand_in_negatives
from jaxembed.planning.topology import list_topology_devices
from jaxembed.runs.open import open_run
from jaxembed.train import _plan, make_parser

HLO = """\
HloModule jit_step

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %ag = f32[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(f)/encode/w"}
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%way (p: f32[4,8]) -> f32[16,8] {
  %again = f32[16,8]{1,0} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/jvp(loss)/d"}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %loop = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body
  %twice = (s32[], f32[4,8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %start = (bf16[4,8], bf16[16,8]) all-gather-start(%x), channel_id=3, replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/jvp(loss)/d"}
  %rest = f32[16,8] fusion(%y), kind=kLoop, calls=%way
  %send = (f32[4,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_GATHER"}
  %sum = f32[10]{0} all-reduce(%z), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""  # noqa: E501

# As the TPU compiler writes it; a color is a memory other than that of the device.
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 3, shape |bf16[4,512]| at ShapeIndex {}:
allocation 2: size 2048, parameter 0, shape |bf16[2,512]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 32, output shape is |(bf16[2,512], f32[])|, maybe-live-out:
allocation 4: size 512, constant:
allocation 5: size 8192, preallocated-temp:
allocation 6: size 65536, color 1, preallocated-temp:
"""


def make_plan(config: Config) -> dict[str, Any]:
    """Plan a run for the devices here."""
    target = make_planning_target(config.mesh)
    run = open_run(config, target.mesh)
    return plan(config, target, run.model, run.stages)


def test_collectives_in_loops_are_counted_as_often_as_they_run() -> None:
    found = find_collectives(HLO, ("loss", "encode"))
    assert found.to_table() == {
        "encode": {"all-gather": {"count": 26, "result_bytes": 26 * 1024, "sent_bytes": 26 * 768}},
        "loss": {"all-gather": {"count": 1, "result_bytes": 512, "sent_bytes": 384}},
        "other": {
            "all-reduce": {"count": 1, "result_bytes": 40, "sent_bytes": 60},
            "all-gather between slices": {"count": 1, "result_bytes": 384, "sent_bytes": 256},
        },
    }
    several = "  %s = ((f32[4], f32[2]), (f32[16], f32[8]), u32[], u32[]) all-gather-start(%x, %y), replica_groups={{0,1,2,3}}"
    assert find_collectives(f"ENTRY %main (a: f32[4]) -> f32[4] {{\n{several}\n}}", ()).collectives[0].result_bytes == 96
    assert found.unknown_loops == 0
    assert find_collectives(HLO.replace("constant(24)", "parameter(0)"), ()).unknown_loops == 1


def test_flops_count_loops_and_recomputation() -> None:
    def layer(x: jax.Array) -> jax.Array:
        return jnp.sin(x @ jnp.ones((8, 8)))

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (layer(c), None), x, length=5)[0].sum()

    layer_flops = 2 * 4 * 8 * 8
    x = jnp.ones((4, 8))
    assert count_matmul_flops(jax.make_jaxpr(looped)(x)) == 5 * layer_flops
    checkpointed = jax.make_jaxpr(jax.value_and_grad(lambda x: jax.checkpoint(layer)(x).sum()))(x)
    assert count_matmul_flops(checkpointed) == 3 * layer_flops  # forward, recomputed, backward
    branches = jax.make_jaxpr(lambda x: jax.lax.cond(x[0, 0] > 0, layer, lambda x: x, x))(x)
    assert count_matmul_flops(branches) == layer_flops


def test_a_plan_counts_parameters_moments_and_collectives(tmp_path: Path) -> None:
    runs.write_base_and_data(tmp_path)
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()  # it needs no weights
    result = make_plan(runs.make_config(tmp_path, "run", "mesh.data=-1", "optim.warmup_steps=0"))
    (stage,) = result["stages"]
    assert result["devices"] == 8 and stage["memory"]["estimate"] and not (tmp_path / "run").exists()
    assert stage["trained"] == stage["parameters"]
    assert stage["optimizer_bytes"] == 2 * 4 * stage["parameters"] + 2 * 4  # two moments, two counts
    # The loss gathers 2 documents of each of 16 queries, 32 wide, and a few numbers for each text.
    gathered_bytes = stage["collectives"]["loss"]["all-gather"]["result_bytes"]
    assert 16 * 2 * 32 * 4 <= gathered_bytes < 16 * 2 * 32 * 4 * 1.2


def test_a_plan_counts_the_negatives_that_a_stage_will_mine(tmp_path: Path) -> None:
    """The pairs have one negative each. Mining finds at most two."""
    mine = json.dumps({"rule": "top_k", "negatives": 2})
    config = runs.make_config(runs.write_base_and_data(tmp_path), "run", "data.hard_negatives=3", f"mine={mine}", "mesh.data=1")
    [stage] = open_run(config, make_planning_target(config.mesh).mesh).stages
    planned = add_stand_in_negatives(stage)
    drawn = [[s.sources[0].draw(i, np.random.default_rng(i), 3) for i in range(8)] for s in (stage, planned)]
    assert [{len(example.negatives) for example in examples} for examples in drawn] == [{1}, {2}]
    assert [example.positive for example in drawn[0]] == [example.positive for example in drawn[1]]
    texts = {text for row in open_rows(stage.sources[0].config, tmp_path)[1] for text in row["pos"]}
    assert {example.negatives[1] for example in drawn[1]} <= texts
    sizes = [_find_largest_batch(s)[0].batch.texts.tokens.size for s in (stage, planned)]
    assert sizes[0] < sizes[1]


def test_the_error_of_too_little_memory_lists_remedies(tmp_path: Path) -> None:
    runs.write_base_and_data(tmp_path)
    config = runs.make_config(tmp_path, "run", "model.remat=true", "gradcache.rows=4")
    stage: Any = SimpleNamespace(index=0, config=config.stages[0])
    message = str(_make_out_of_memory_error(config, stage, 40 << 30, 16 << 30))
    assert message == (
        "a step needs 40.00 GiB, but a device has 16.00 GiB. Try mesh.data=1 mesh.fsdp=-1, a smaller gradcache.rows, "
        "model.dtype=bfloat16, model.lora."
    )
    assert runs.make_config(tmp_path, "run", "mesh.data=1", "mesh.fsdp=-1").mesh.fsdp == -1, "the remedy is accepted"
    staged = runs.make_staged_config(tmp_path, "staged", [{"train": {"steps": 1}}, {"train": {"steps": 1}}])
    stage.config = staged.stages[0]
    message = str(_make_out_of_memory_error(staged, stage, 40 << 30, 16 << 30))
    assert message.startswith("stages.0: a step needs") and ", stages.0.gradcache.rows=8, " in message


def test_a_step_that_does_not_fit_its_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.write_base_and_data(tmp_path)
    monkeypatch.setattr("jaxembed.planning.plan._get_device_memory", lambda: 1 << 10)
    message = r"^a step needs [\d.]+ MiB, but a device has 1\.00 KiB\. Try mesh\.data=1 mesh\.fsdp=-1, "
    with pytest.raises(UserError, match=message):
        make_plan(runs.make_config(tmp_path, "run"))


def test_memory_is_read_from_the_assignment_of_the_compiler() -> None:
    expected = Assignment(arguments=6144, outputs=2080, aliased=2048, temporaries=8704, hlo="HloModule m")
    assert parse_assignment(ASSIGNMENT, "HloModule m") == expected


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_child_process_returns_its_result_or_error() -> None:
    assert run_in_child(os.getpid) != os.getpid()
    with pytest.raises(UserError, match=r"^--topology: no such slice 'v9'"):
        run_in_child(lambda: list_topology_devices("v9"))
    with pytest.raises(UserError, match=r"^--topology: the process that compiles ended with code -9\. Check"):
        run_in_child(lambda: os.kill(os.getpid(), 9))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match=r"ended with code 1\. Check"):
        run_in_child(interrupt)


def test_an_interrupted_plan_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(function: Any) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("jaxembed.train.run_in_child", interrupt)
    config: Any = SimpleNamespace(stages=[None])
    with pytest.raises(KeyboardInterrupt):
        _plan(config, make_parser().parse_args(["c.yaml", "--topology", "v5e:2x2"]))
    assert not list(tmp_path.iterdir())


def test_a_topology_needs_the_tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--topology: the TPU compiler is not installed\. Run pip install"):
        list_topology_devices("v5e:2x2")


def test_jax_does_not_look_for_a_tpu_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is for the TPU compiler alone. With another plugin, or a choice in the environment, JAX looks by itself."""
    for modules, chosen, expected in (
        ({"libtpu"}, None, "cpu"), ({"libtpu", "jax_plugins"}, None, None), (set(), None, None), ({"libtpu"}, "cuda", "cuda"),
    ):  # fmt: skip
        monkeypatch.setattr("importlib.util.find_spec", lambda name, installed=modules: name if name in installed else None)
        monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
        monkeypatch.setenv("JAX_PLATFORMS", chosen or "")  # restored at the end, whatever is set in between
        if chosen is None:
            monkeypatch.delenv("JAX_PLATFORMS")
        cli._skip_absent_tpu()
        assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4xx4", ""])
def test_an_unknown_topology_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--topology: no such slice .* Expected v4, v5e, v5p, v6e with a shape"):
        list_topology_devices(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_plans_for_two_slices(tmp_path: Path) -> None:
    runs.write_base_and_data(tmp_path)
    runs.make_config(tmp_path, "run")
    overrides = [f"run.dir={tmp_path / 'run'}", "mesh.data=-1", "mesh.fsdp=4"]
    topology = ["--topology", "v5e:2x2", "--slices", "2"]
    done = run_command("jaxembed.train", str(tmp_path / "run.yaml"), *overrides, *topology, env=TPU_COMPILER_ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["devices"], result["device"], result["mesh"]["data"]) == (8, "TPU v5 lite", 2)
    assert not (tmp_path / "run").exists()
    assert "libtpu" not in done.stderr and "hostname" not in done.stderr, "no warnings of a missing TPU"
    (stage,) = result["stages"]
    assert stage["memory"]["device"] == 16 << 30 and stage["memory"]["code"] is None
    assert stage["loss"]["temporaries"] > 0 and stage["loss"]["sent_bytes"] > 0
    assert stage["proposal"]["settings"].startswith("mesh.data=-1 mesh.fsdp=")
    assert "proposal, estimated and not compiled: mesh.data=-1" in done.stderr and "loss alone: " in done.stderr
    kinds = {kind for scope in stage["collectives"].values() for kind in scope}
    assert {"all-gather", "all-gather between slices", "all-reduce between slices"} <= kinds
