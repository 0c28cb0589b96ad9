"""Several named adapters on one base: each is trained by its own batches alone, as if it were the only one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers import tiny
from helpers.loading import load_model
from helpers.runs import make_config, read_losses, train_until_stopped, use_one_device, write_base_and_data
from jaxembed import Embedder, cli, config
from jaxembed.config import InfoNCEConfig, LoraConfig, OptimConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.sources import Source, open_source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.devices.cpu import get_compiler_options
from jaxembed.devices.mesh import make_all_shards, make_mesh
from jaxembed.devices.placement import make_replicated_sharding, put_batch
from jaxembed.errors import UserError
from jaxembed.evaluation.encoders import load_encoder
from jaxembed.evaluation.heldout import open_held_out_sets, score_sets
from jaxembed.formats.peft import read_adapters
from jaxembed.hub.card import read_card
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.hub.resolve import find_run
from jaxembed.losses.objectives import Objectives
from jaxembed.model.lora import join_params, split_params, stack_adapters
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import TrainState, make_train_step

NAMES = ("retrieval", "sts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("adapters"))


def named(root: Path, run: str, *overrides: str) -> config.Config:
    """A run of two adapters on an int8 base, two batches of the first for each of the second; all of one shape."""
    sources = [
        {"path": str(root / "pairs.jsonl"), "adapter": "retrieval", "weight": 2, "instructions": ["Find it"]},
        {"path": str(root / "pairs.jsonl"), "adapter": "sts", "name": "same", "instructions": ["Find me"]},
    ]
    lora = {"rank": 2, "alpha": 4, "base_dtype": "int8", "names": NAMES, "targets": ["q_proj", "down_proj"]}
    return make_config(
        root, run, f"data.sources={json.dumps(sources)}", f"model.lora={json.dumps(lora)}", "data.hard_negatives=0",
        "model.unroll=false", "model.attention_kernel=einsum", "train.steps=4", "optim.learning_rate=0.01", "mesh.data=1",
        *overrides,
    )  # fmt: skip


def opened(root: Path, *adapters: str) -> list[Source]:
    """A source of the 96 pairs for each adapter, the weight of the i-th being i."""
    tree = [{"path": str(root / "pairs.jsonl"), "adapter": name, "weight": i} for i, name in enumerate(adapters, 1)]
    return [open_source(config.SourceConfig(**one), root) for one in tree]


def builder(sources: list[Source], adapters: tuple[str, ...]) -> BatchBuilder:
    tokenizer = tiny.build_tokenizer()
    append_eos(tokenizer)
    tokenizer = TextTokenizer(tokenizer, EmbeddingSpec(max_length=32))
    sampler = BatchSampler(sources=sources, tokenizer=tokenizer, hard_negatives=0, seed=0)
    return BatchBuilder(sampler=sampler, row_length=64, shards=make_all_shards(1), adapters=adapters)


def test_batches_of_adapters_mix_by_the_weights_of_their_sources(folder: Path) -> None:
    sources = opened(folder, "sts", "retrieval", "sts", "other")  # weights 1 + 3, 2, 4
    plan, build = BatchPlan(sources, 8, seed=0), builder(sources, ("other", "retrieval", "sts"))
    batches = [build(step, plan[step]).batch for step in range(20)]
    counts = np.bincount([batch.adapter for batch in batches])
    assert np.abs(counts - [8, 4, 8]).max() <= 1
    assert np.abs(np.bincount([sources[plan[s][0] // 96].config.adapter == "other" for s in range(5000)])[1] - 2000) <= 1
    of_sts = np.concatenate([batch.source for batch in batches if batch.adapter == 2])
    assert np.bincount(of_sts).tolist() == [2 * counts[2], 0, 6 * counts[2]]
    assert np.array_equal(plan[17], BatchPlan(sources, 8, seed=0)[17])
    one, unnamed = (BatchPlan(opened(folder, *names), 8, seed=0) for names in (("a", "a"), ("", "")))
    assert all(np.array_equal(one[step], unnamed[step]) for step in range(20))
    with pytest.raises(
        UserError, match=r"batch_size: 100 is more than the examples of the sources of adapter retrieval \(96\)"
    ):
        BatchPlan(sources, 100, seed=0)


def test_a_batch_of_two_adapters_is_refused(folder: Path) -> None:
    build = builder(opened(folder, *NAMES), NAMES)
    assert build(0, np.arange(96, 104)).batch.adapter == 1
    message = r"batch: trains several adapters: retrieval \(source pairs\), sts \(source pairs\) \(expected one"
    with pytest.raises(UserError, match=message):
        build(0, np.arange(92, 100))


def own(tree: Any, index: int | None = None) -> dict[str, Any]:
    """The leaves of params and optimizer state that belong to an adapter (`index`, where they are stacked), by path."""
    found = {str(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
    kept = {path: x for path, x in found.items() if "lora_" in path or "'adapters'" in path}
    return kept if index is None else {path: x[index] for path, x in kept.items()}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return len(a) == 13 and a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_each_adapter_is_trained_as_if_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch does not train stays as it is; what it trains has the parameters, moments and count of one trained alone."""
    # XLA's default fusions, which the tests turn off, round alike in the programs for one adapter and for two.
    default_fusions = {**get_compiler_options(), "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr("jaxembed.training.step.get_compiler_options", lambda: default_fusions)
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    mesh, optim = make_mesh(1), OptimConfig(learning_rate=0.01, schedule="constant", weight_decay=0.1)
    model, params = load_model(
        folder / "base", EmbeddingSpec(max_length=32), lora=lora, unroll=False, attention_kernel="einsum"
    )
    first, frozen = split_params(params)
    second = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), first)
    optimizer = make_optimizer(optim, 9, has_named_adapters=True)
    fresh = jax.jit(optimizer.init)(first)
    copy, stack = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)), jax.jit(lambda *trees: stack_adapters(trees))
    step = make_train_step(model, Objectives([InfoNCEConfig()]), optimizer, make_schedule(optim, 9))

    def run(trained: Any, opt_state: Any, adapters: tuple[str, ...], order: list[int]) -> tuple[list[Any], list[float]]:
        """(params, optimizer state) before and after each step, and the losses. All steps are on the same pairs."""
        build, zero = builder(opened(folder, *adapters or ("",)), adapters), jnp.zeros((), jnp.int32)
        batches = [put_batch(mesh, build(0, np.arange(8) + 96 * i).batch) for i in range(len(adapters) or 1)]
        state, seen, found = TrainState(trained, opt_state, zero, jax.random.key(0), frozen), [], []
        state = jax.device_put(state, make_replicated_sharding(mesh))
        for index in order:
            seen.append(jax.device_get((state.params, state.opt_state)))
            state, metrics = step(copy(state), batches[index])
            found.append(float(metrics["loss"]))
        return [*seen, jax.device_get((state.params, state.opt_state))], found

    order = [0, 0, 1, 0, 1, 0]
    together, found = run(stack(first, second), stack(fresh, fresh), NAMES, order)
    for before, after, trained in zip(together, together[1:], order, strict=False):
        assert equal(own(before, 1 - trained), own(after, 1 - trained))
        moved = own(after, trained)
        assert not any(np.array_equal(x, moved[path]) for path, x in own(before, trained).items() if x.any())
    for index, start in enumerate((first, second)):
        alone, of_alone = run(start, fresh, (), [0] * order.count(index))
        assert equal(own(together[-1], index), own(alone[-1]))
        assert [loss for loss, trained in zip(found, order, strict=True) if trained == index] == of_alone
        assert of_alone[-1] < of_alone[0]


def test_a_run_of_two_adapters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes bit for bit, and gives the model of each adapter, merged as it was trained."""
    mesh = make_mesh(1)
    use_one_device(monkeypatch)
    sets = [{"name": n, "kind": "sts", "path": str(folder / "sts.jsonl"), "adapter": n} for n in NAMES]
    config = named(folder, "whole", f"eval.sets={json.dumps(sets)}", "eval.untrained=false")
    train(config)
    half = named(folder, "half", "eval.sets=[]")
    train_until_stopped(half, 3)
    train(half)
    assert read_losses(folder / "half") == read_losses(folder / "whole")
    rows = read_metrics(folder / "whole")
    assert sorted(row["adapter"] for row in rows if "loss" in row) == [0, 0, 0, 1]

    run = find_run("whole", folder / "whole", "last").restore(ComputeOptions(unroll=False), mesh)
    vectors = {}
    sts, tokenizer, hf_config = run.select_adapter("sts"), run.build_tokenizer(), run.base.hf_config
    merged, unmerged = (Embedder(m, {}, tokenizer, mesh, hf_config) for m in (sts.merge_adapters()[0], sts.model))
    for name in NAMES:
        model, parts = Embedder.load(folder / "whole", adapter=name), run.select_adapter(name)
        vectors[name] = merged.with_params(model.params).encode(tiny.TEXTS)
        unmerged = unmerged.with_params(join_params(parts.trained, parts.frozen))
        np.testing.assert_allclose(unmerged.encode(tiny.TEXTS), vectors[name], atol=1e-5)
        instruction = f"Instruct: {'Find it' if name == 'retrieval' else 'Find me'}\nQuery:"
        source = "pairs" if name == "retrieval" else "same"
        assert model.spec.prompts == {"query": instruction, "document": "", source: instruction}
        card = read_card(folder / "whole", model.revision, name)
        assert (model.revision, card.checkpoint, len(card.scores)) == (f"whole-4-{name}", f"step 4, adapter {name}", 1)
    assert np.abs(vectors["retrieval"] - vectors["sts"]).max() > 1e-3
    (scored,) = (row for row in rows if "eval/sts/spearman" in row)
    sts_set = open_held_out_sets(config.eval.sets, folder)[1]
    assert score_sets([sts_set], unmerged.encode) == {"sts/spearman": pytest.approx(scored["eval/sts/spearman"], abs=1e-5)}
    assert scored["eval/sts/spearman"] != pytest.approx(scored["eval/retrieval/spearman"], abs=1e-4)

    parity = export_adapters(folder / "whole", tmp_path / "out", "last")
    assert parity.error < 1e-5 and 0.99 < parity.cosine < 0.999999
    for name in NAMES:
        written, trained = (
            flatten_dict(tree)
            for tree in (read_adapters(tmp_path / "out" / name, run.model.transformer)[1], run.select_adapter(name).trained)
        )
        assert written.keys() == trained.keys()
        assert all(np.array_equal(written[path], trained[path]) for path in written)

    for adapter, problem in ((None, "has several adapters"), ("st", "no adapter 'st'")):
        with pytest.raises(UserError, match=rf"whole: {problem} \(retrieval, sts\)\. Choose one with --adapter"):
            Embedder.load(folder / "whole", adapter=adapter)
    with pytest.raises(UserError, match=r"base: no adapter 'sts' to choose \(this is not a run directory\)"):
        Embedder.load(folder / "base", adapter="sts")
    parser = cli.new_parser("evaluate", "")
    cli.add_model_arguments(parser)
    args = parser.parse_args([str(folder / "whole"), "--adapter", "sts"])
    assert load_encoder(args.model, args.checkpoint, adapter=args.adapter).revision.startswith("whole-4-sts-")
