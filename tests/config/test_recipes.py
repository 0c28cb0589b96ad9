"""The shipped recipes, compared value by value with the papers' tables (tests/data_tables)."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.recipes import NAMES, find_recipe, load_recipe
from jaxembed.config import CausalLMConfig, Config, InfoNCEConfig, SourceConfig
from jaxembed.config.instructions import load_instruction_table
from jaxembed.config.shipped import find_shipped_folder

TABLES = Path(__file__).parents[1] / "data_tables"
ROOT = find_shipped_folder().parent
# Paths of before there were recipes -> the recipes that they link to.
OLD_PATHS = {"kalm": "kalm_v1", "nv_embed": "nv_embed_v2"} | {name: name for name in ("nv_embed_single", "nv_embed_reversed")}
NV_RECIPES = ("nv_embed_v1", "nv_embed_v2", "nv_embed_single", "nv_embed_reversed")
KALM_RECIPES = ("kalm_v1", "kalm_v1_no_pretraining", "kalm_v2")
# Sets of NV-Embed's Table 9 -> the names of their entries in the catalog, after "nv-embed-".
NV_ENTRIES = {
    "ArguAna": "arguana", "NaturalLanguageInference": "all-nli", "PAQ": "paq", "MSMARCO": "msmarco", "SQuAD": "squad",
    "StackExchange": "stackexchange-duplicates", "NaturalQuestions": "nq", "HotpotQA": "hotpotqa", "FEVER": "fever",
    "FiQA2018": "fiqa", "BioASQ": "bioasq", "HoVer": "hover", "NFCorpus": "nfcorpus", "MIRACL": "miracl", "MrTyDi": "mr-tydi",
    "SciFact": "scifact", "STS12": "sts12", "STS22": "sts22", "STSBenchmark": "stsbenchmark",
    "AmazonCounterfactualClassification": "amazon-counterfactual", "AmazonPolarityClassification": "amazon-polarity",
    "AmazonReviewsClassification": "amazon-reviews", "Banking77Classification": "banking77",
    "EmotionClassification": "emotion", "ImdbClassification": "imdb", "MTOPIntentClassification": "mtop-intent",
    "MTOPDomainClassification": "mtop-domain", "MassiveIntentClassification": "massive-intent",
    "MassiveScenarioClassification": "massive-scenario", "ToxicConversationsClassification": "toxic-conversations",
    "TweetSentimentExtractionClassification": "tweet-sentiment", "ArxivClusteringP2P": "arxiv-abstracts",
    "ArxivClusteringS2S": "arxiv-titles", "BiorxivClusteringP2P": "biorxiv-abstracts", "BiorxivClusteringS2S": "biorxiv-titles",
    "MedrxivClusteringP2P": "medrxiv-abstracts", "MedrxivClusteringS2S": "medrxiv-titles",
    # Table 9 calls the posts "Reddit-Clustering", and the titles "Reddit-Clustering-S2S".
    "RedditClustering": "reddit-posts", "RedditClusteringS2S": "reddit-titles",
    "StackExchangeClustering": "stackexchange-posts", "StackExchangeClusteringS2S": "stackexchange-titles",
    "TwentyNewsgroupsClustering": "twenty-newsgroups",
}  # fmt: skip
MISPRINT = "Identify the main category of Medrxiv papers based on the titles and abstracts"  # of Reddit and StackExchange


def read_table(name: str) -> dict[str, Any]:
    return yaml.safe_load((TABLES / f"{name}.yaml").read_text())


def source_names(sources: Iterable[SourceConfig]) -> list[str]:
    return [source.name for source in sources]


def find_source(run: Config, name: str) -> SourceConfig:
    return next(source for stage in run.stages for source in stage.data.sources if source.name == name)


def shorten_name(source: SourceConfig) -> str:
    """Return the name of a data set of NV-Embed, also of the variant whose labels are spelled out."""
    return source.name.removeprefix("nv-embed-").removesuffix("-labels")


def parse_count(text: str) -> int:
    return round(float(text[:-1]) * {"k": 1_000, "M": 1_000_000}[text[-1]])


def get_infonce(stage: Any) -> InfoNCEConfig:
    return next(objective for objective in stage.objectives if isinstance(objective, InfoNCEConfig))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_opens_with_its_command(name: str) -> None:
    assert find_recipe(name).read_text().startswith(f"# python -m jaxembed.train {name}\n")
    assert load_recipe(name).stages


def test_a_page_shows_values_data_and_plan(tmp_path: Path) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "recipe_pages.py"))
    plan = {"recipe": "gecko", "machine": "a chip", "stage": 1, "gradcache_rows": 16, "memory_bytes": 2**30}
    plans = {"about": "Compiled.", "plans": [plan | {"device_bytes": 2**34, "step_s": 2.0, "hours": 5.5, "date": "2026-01-01"}]}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    pages["write_page"].__globals__["PLANS"] = tmp_path / "plans.json"
    page = pages["write_page"]("gecko")
    assert "python -m jaxembed.train gecko\n" in page
    assert "| `stages.1.matryoshka.dims` | `[256]` | survey, section 6: 256 and 768 dimensions |" in page
    assert "| `fret` | 6,600,000 | set its path |" in page
    assert "| a chip | 1 | 16 | 1.0 of 16 GiB | 2.0 s | 5.5 h |" in page
    assert "[gecko](../recipes/gecko.md) | Gecko (arXiv:2403.20327) on a decoder base" in pages["write_list"]()
    assert "| [gecko](../recipes/gecko.md) | a chip |" in pages["write_plans"]() and "on 2026-01-01" in pages["write_plans"]()


def test_old_paths_are_the_same_recipes() -> None:
    for old, name in OLD_PATHS.items():
        path = ROOT / "configs" / f"{old}.yaml"
        assert path.is_symlink() and path.resolve() == find_recipe(name)


# KaLM


@pytest.mark.parametrize("name", KALM_RECIPES)
def test_kalm_has_the_papers_numbers(name: str) -> None:
    run, table = load_recipe(name), read_table("kalm")
    paper = table["section_3_1"]
    model = run.model
    assert (model.base, model.pooling.kind, model.dtype) == (paper["base"], paper["pooling"], paper["dtype"])
    assert model.instruction_template == table["table_1"]["template"]
    assert model.attention == ("bidirectional" if name == "kalm_v2" else "causal")
    assert (model.pooling.include_instruction, model.append_eos) == (True, False)
    for stage in run.stages:
        assert stage.data.max_length == paper["max_length"] and stage.data.mixture.by == "size"
        assert get_infonce(stage).temperature == paper["temperature"]
    fine_tuning = run.stages[0 if name == "kalm_v1_no_pretraining" else 1]
    stages = {"fine_tuning": fine_tuning} | ({} if fine_tuning is run.stages[0] else {"pretraining": run.stages[0]})
    pairs = {
        "pretraining": sum(parse_count(row[2]) for row in table["table_8"]),
        "fine_tuning": sum(r[4] for r in table["table_9"]),
    }
    for key, stage in stages.items():
        batch_size = paper[key]["device_batch_size"] * paper[key]["devices"]
        assert stage.train.batch_size == batch_size
        assert stage.train.steps == pytest.approx(pairs[key] / batch_size, rel=1e-3)  # one epoch
        assert stage.train.steps == pytest.approx(paper[key]["steps"], rel=0.02)  # as the paper rounds it
        assert stage.optim.learning_rate == paper[key]["learning_rate"]
    assert pairs == {"pretraining": 474_000_000, "fine_tuning": 5_152_792}
    if "pretraining" in stages:
        assert stages["pretraining"].data.hard_negatives == 0 and get_infonce(stages["pretraining"]).negatives == "in_batch"
        assert not stages["pretraining"].matryoshka.dims
    assert fine_tuning.mine is not None and fine_tuning.mine.rule == "window"
    mining = paper["mining"]
    assert list(fine_tuning.mine.window) == mining["window"]
    assert fine_tuning.mine.negatives == fine_tuning.data.hard_negatives == mining["negatives"]
    assert fine_tuning.mine.consistency_top_k == mining["consistency_top_k"]
    assert [896, *fine_tuning.matryoshka.dims] == table["matryoshka"]["dims"]
    assert [1.0, *fine_tuning.matryoshka.weights] == table["matryoshka"]["weights"]


def test_kalm_trains_on_the_papers_data() -> None:
    table, (pretraining, fine_tuning) = read_table("kalm"), load_recipe("kalm_v1").stages
    assert [source.max_examples for source in pretraining.data.sources] == [parse_count(row[2]) for row in table["table_8"]]
    assert not any(source.instructions for source in pretraining.data.sources)
    *rows, synthetic = fine_tuning.data.sources
    assert [source.max_examples for source in rows] == [row[4] for row in table["table_9"]]
    assert synthetic.max_examples == 550_000
    instructions = {"Retrieval": [table["table_1"]["retrieval"]], "STS": []}
    own_instructions = set(table["table_10"].values())
    for source, (_, kind, *_) in zip(rows, table["table_9"], strict=True):
        if kind == "Classification":
            assert source.instructions and set(source.instructions) <= own_instructions, source.name
            assert source.in_batch_negatives is False, source.name
            assert (source.label_documents, source.label_negatives) == ("labels", "all"), source.name
        else:
            assert list(source.instructions) == instructions[kind], source.name
            assert source.in_batch_negatives and not source.symmetric, source.name
    assert find_source(load_recipe("kalm_v1"), "kalm-arxiv").label_names["cs.AI"] == "artificial intelligence"


def test_kalm_instructions_are_the_papers() -> None:
    ours, table = load_instruction_table("kalm"), read_table("kalm")
    assert ours.by_task == table["table_10"] and ours.template == table["table_1"]["template"]
    assert {ours.by_type[kind] for kind in ("Retrieval", "Reranking")} == {table["table_1"]["retrieval"]}
    assert {ours.by_type[kind] for kind in ("STS", "PairClassification")} == {""}


# NV-Embed


@pytest.mark.parametrize("name", NV_RECIPES)
def test_nv_embed_has_the_papers_numbers(name: str) -> None:
    run, paper = load_recipe(name), read_table("nv_embed")
    table, model = paper["table_8"], run.model
    assert model.base == "mistralai/Mistral-7B-v0.1" and model.attention == "bidirectional"
    pooling = model.pooling
    assert (pooling.kind, pooling.include_instruction) == ("latent_attention", False)
    assert (pooling.latents, pooling.heads) == (table["latents"], table["heads"])
    assert model.lora is not None
    assert {key: getattr(model.lora, key) for key in table["lora"]} == table["lora"]
    for stage in run.stages:
        assert (stage.train.batch_size, stage.data.hard_negatives) == (table["batch_size"], table["hard_negatives"])
        assert (stage.optim.warmup_steps, stage.optim.weight_decay) == (table["warmup_steps"], table["weight_decay"])
        assert stage.data.max_length == paper["max_length"]
        assert (stage.optim.schedule, stage.optim.restart) == ("linear", True)
        assert (stage.data.mixture.by, stage.data.batching.kind) == ("size", "blended")
        assert len(stage.objectives) == 1
        mine, own_rule = stage.mine, ("top_k" if name == "nv_embed_v1" else "topk_perc_pos")
        assert mine is not None and (mine.model, mine.rule) == (paper["teacher"], own_rule)
        assert (mine.share, mine.negatives) == (paper["percentage_margin"], table["hard_negatives"])
    if name in ("nv_embed_v1", "nv_embed_v2"):
        assert [stage.train.steps for stage in run.stages] == table["steps"]
        assert [stage.optim.learning_rate for stage in run.stages] == table["learning_rates"]
    negatives = {"nv_embed_single": ["hard"], "nv_embed_reversed": ["hard", "all"]}.get(name, ["all", "hard"])
    assert [get_infonce(stage).negatives for stage in run.stages] == negatives


@pytest.mark.parametrize("name", NV_RECIPES)
def test_nv_embed_trains_on_the_papers_data(name: str) -> None:
    run, paper = load_recipe(name), read_table("nv_embed")
    left_out = paper["added_in_v2"] if name == "nv_embed_v1" else []
    rows = {
        NV_ENTRIES[task]: (task, parse_count(count), listed) for task, count, listed in paper["table_9"] if task not in left_out
    }
    all_sources = max((stage.data.sources for stage in run.stages), key=len)
    names = {shorten_name(source) for source in all_sources}
    assert names == set(rows) | (set() if name == "nv_embed_v1" else {"synthetic"})
    examples = {task.replace("RedditClusteringP2P", "RedditClustering") for task in paper["table_5"]} | {
        "RedditClusteringS2S", "StackExchangeClusteringS2S",
    }  # fmt: skip
    for source in all_sources:
        if source.name == "nv-embed-synthetic":
            assert source.max_examples == paper["synthetic_rows"]
            continue
        task, count, listed = rows[shorten_name(source)]
        assert source.max_examples == count, source.name
        if listed == [MISPRINT] and task.startswith(("Reddit", "StackExchange")):
            evaluated = task.removesuffix("S2S") if task.endswith("S2S") else f"{task}P2P"
            listed = [paper["table_10"][evaluated]]
        assert list(source.instructions) == listed, source.name
        assert source.symmetric == task.startswith("STS"), source.name
        if "Classification" in task or "Clustering" in task:
            documents = "examples" if task in examples and name != "nv_embed_v1" else "labels"
            assert (source.label_documents, source.in_batch_negatives) == (documents, False), source.name


def test_nv_embed_stages_differ_in_their_data() -> None:
    first, second = load_recipe("nv_embed_v2").stages
    blended_in = set(source_names(second.data.sources)) - set(source_names(first.data.sources))
    assert len(first.data.sources) == 17 and len(blended_in) == 26
    assert all(find_source(load_recipe("nv_embed_v2"), name).format in ("labels", "scored_pairs") for name in blended_in)
    reversed_stages = load_recipe("nv_embed_reversed").stages
    assert [stage.data.sources for stage in reversed_stages] == [second.data.sources, first.data.sources]


def test_nv_embed_instructions_are_the_papers() -> None:
    ours, paper = load_instruction_table("nv_embed"), read_table("nv_embed")
    assert {task: ours.by_task[task] for task in paper["table_10"]} == paper["table_10"]
    assert set(ours.by_task) - set(paper["table_10"]) == {"CQADupstackRetrieval"}
    assert ours.by_type == {"STS": "Retrieve semantically similar text."}
    assert MISPRINT not in {text for task in ours.training for text in ours.training[task] if not task.startswith("Medrxiv")}


# The survey


@pytest.mark.parametrize("name", [name for name in read_table("survey") if name != "gte"])
def test_recipes_have_the_surveys_values(name: str) -> None:
    run, row = load_recipe(name), read_table("survey")[name]
    model, last = run.model, run.stages[-1]
    values = {
        "base": model.base, "attention": model.attention, "pooling": model.pooling.kind, "template": model.instruction_template,
        "include_instruction": model.pooling.include_instruction, "lora_rank": model.lora and model.lora.rank,
        "batch_size": run.stages[0].train.batch_size,
        "generative_batch_size": next((o.batch_size for o in last.objectives if isinstance(o, CausalLMConfig)), None),
        "batching": last.data.batching.kind,
        "dims": list(last.matryoshka.dims), "directions": list(get_infonce(last).directions),
        "hard_negatives": last.data.hard_negatives, "random_exits": last.exits.random,
        "miner": last.mine and [last.mine.model, last.mine.depth],
    }  # fmt: skip
    shared = values.keys() & row.keys()
    assert shared and {key: values[key] for key in shared} == {key: row[key] for key in shared}
    names = source_names(last.data.sources)
    assert names == row.get("sources", names)
    assert not set(row.get("without", ())) & set(names)
    weights = {source.name: source.weight for source in last.data.sources if source.weight != 1}
    assert weights == row.get("sample_ratios", weights)
    for source, count in row.get("rows", {}).items():
        assert find_source(run, source).max_examples == count
    if "examples" in row:
        assert last.train.steps == round(row["examples"] / row["batch_size"])


def test_gte_has_the_surveys_mixture() -> None:
    run, row = load_recipe("gte"), read_table("survey")["gte"]
    counts = {
        source.name.removeprefix("gte-"): (source.max_examples or 0) // 1_000_000 for source in run.stages[0].data.sources
    }
    assert counts == row["pretraining"]
    assert [list(get_infonce(stage).directions) for stage in run.stages] == [row["directions"]] * 2


def test_echo_has_the_data_of_e5_mistral() -> None:
    ours, e5 = (source_names(load_recipe(name).data.sources) for name in ("echo_mistral", "e5_mistral"))
    assert ours == [name for name in e5 if name != "e5-mistral-synthetic"]


def test_every_base_has_sizes_to_plan_with() -> None:
    plans = runpy.run_path(str(ROOT / "benchmarks" / "recipe_plans.py"))
    assert {load_recipe(name).model.base for name in NAMES} == set(plans["PRESETS"])


def test_recorded_plans_are_of_the_recipes_as_they_are() -> None:
    plans = json.loads((ROOT / "docs" / "results" / "recipe-plans.json").read_text())["plans"]
    for plan in plans:
        stage = load_recipe(plan["recipe"]).stages[plan["stage"]]
        found = (plan["steps"], plan["gradcache_rows"])
        assert found == (stage.train.steps, stage.gradcache.rows), f"{plan['recipe']}: plan it again"
