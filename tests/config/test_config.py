"""The configuration tree: what it accepts, and its one-line errors."""

import typing
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from jaxembed.config import Config, ModelConfig, load_config
from jaxembed.config.model import LoraTarget, PoolingKind
from jaxembed.config.shipped import list_shipped_configs
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.model.lora import TARGET_PROJECTIONS
from jaxembed.model.masks import MASKS
from jaxembed.model.pooling import POOLINGS

SMALLEST = {"model": {"base": "preset:tiny"}, "data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def load_smallest(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder, SMALLEST), overrides)


def error_of(folder: Path, *overrides: str, tree: Any = SMALLEST) -> str:
    with pytest.raises(UserError) as error:
        load_config(write(folder, tree), overrides)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder / "mine.yaml"), "FILE")


def test_errors_of_adapters(tmp_path: Path) -> None:
    sources = [{"path": "a.jsonl", "adapter": "a"}, {"path": "b.jsonl", "adapter": "a"}]
    tree = {"model": {"base": "x", "lora": {"names": ["a", "b"]}}, "data": {"sources": sources}}
    expected = "FILE: model.lora.names: no source trains 'b'. Name it as the adapter of a source, or remove it."
    assert error_of(tmp_path, tree=tree) == expected
    expected = "FILE: eval.sets.0.adapter is 'c' (expected one of model.lora.names: a, b)."
    assert error_of(tmp_path, "eval.sets=[{name: s, path: x, adapter: c}]", tree=tree) == expected
    assert load_config(write(tmp_path, tree), ["data.sources.1.adapter=b"]).data.sources[1].adapter == "b"


def test_a_run_has_one_guide_and_one_teacher(tmp_path: Path) -> None:
    def objectives(*entries: str) -> str:
        return f"objectives=[{', '.join(entries)}]"

    guided, taught = ("{name: infonce, guide: %s}", "{name: embedding_matching, teacher: %s}")
    config = load_smallest(tmp_path, objectives(guided % "a", guided % "a", "{name: infonce}", taught % "b"))
    assert (config.guide, config.teacher) == ("a", "b") and config.models_by_role == {"guide": "a", "teacher": "b"}
    assert (load_smallest(tmp_path).guide, load_smallest(tmp_path).teacher) == (None, None)
    stage = "{train: {steps: 1}, objectives: [%s]}"
    stages = load_smallest(tmp_path, f"stages=[{stage % taught % 'b'}, {stage % '{name: infonce}'}]")
    assert stages.models_by_role == {"teacher": "b"} and [stage.teacher for stage in stages.stages] == ["b", None]
    expected = "FILE: objectives name several models as {} (a, b); a run has one."
    assert error_of(tmp_path, objectives(guided % "a", guided % "b")) == expected.format("guide")
    assert error_of(tmp_path, objectives(taught % "a", taught % "b", taught % "a")) == expected.format("teacher")
    assert error_of(tmp_path, f"stages=[{stage % guided % 'a'}, {stage % guided % 'b'}]") == expected.format("guide")
    expected = "FILE: objectives.0.{} is '' (expected a MODEL: a run directory, a folder, a hub id, or the URL of a server)."
    assert error_of(tmp_path, objectives(guided % "''")) == expected.format("guide")
    assert error_of(tmp_path, objectives(taught % "''")) == expected.format("teacher")


def test_the_smallest_config_has_every_default(tmp_path: Path) -> None:
    config = load_smallest(tmp_path)
    assert (config.run.name, config.run.dir) == ("mine", "runs/mine")
    assert (config.train.steps, config.objectives[0].name, config.row_length) == (1000, "infonce", 512)


def test_dump_reads_back_the_same(tmp_path: Path) -> None:
    config = load_smallest(tmp_path, "data.sources.0.instructions=[é, 'b: c']", "eval.sets=[{name: x, path: y}]")
    assert load_config(write(tmp_path, config.dump())) == config
    staged = load_smallest(
        tmp_path, "stages=[{train: {steps: 2}}, {train: {steps: 3}, optim: {learning_rate: 0.5}}]", "train.seed=7"
    )
    assert [(s.train.steps, s.train.seed, s.optim.learning_rate) for s in staged.stages] == [(2, 7, 2e-5), (3, 7, 0.5)]
    assert load_config(write(tmp_path, staged.dump())) == staged


def test_a_file_without_stages_has_one_stage(tmp_path: Path) -> None:
    config = load_smallest(tmp_path, "train.steps=5")
    (stage,) = config.stages
    assert stage.data == config.data and stage.train == config.train and config.total_steps == 5


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("optim.learning_rate=1e-5", "optim", "learning_rate", 1e-5),  # a string to YAML
        ("model.pooling={kind: last}", "model", "pooling.kind", "last"),
        ("model.pooling.kind=last", "model", "pooling.kind", "last"),
        ("model.base=a=b", "model", "base", "a=b"),
        ("data.row_length=", "data", "row_length", None),
        ("run.name=other", "run", "dir", "runs/other"),
        ("run.dir=x", "run", "name", "mine"),
        ("eval.bm25=true", "eval", "bm25", True),
    ],
)
def test_overrides(tmp_path: Path, override: str, section: str, field: str, value: Any) -> None:
    found: Any = getattr(load_smallest(tmp_path, override), section)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_overrides_of_list_entries_and_their_order(tmp_path: Path) -> None:
    config = load_smallest(tmp_path, "data.sources.1.path=c.jsonl", "data.sources.1.weight=2", "train.steps=1", "train.steps=2")
    assert [(s.path, s.weight) for s in config.data.sources] == [("a.jsonl", 1.0), ("c.jsonl", 2.0)]
    assert config.train.steps == 2
    config = load_smallest(tmp_path, "data.sources.1={path: d.jsonl}")
    assert [source.path for source in config.data.sources] == ["a.jsonl", "d.jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "FILE: unknown key train.stepz. Did you mean train.steps?"),
        ("optim.lerning_rate=5", "FILE: unknown key optim.lerning_rate. Did you mean optim.learning_rate?"),
        ("modle.base=x", "FILE: unknown key modle. Did you mean model?"),
        (
            "objectives=[{name: infonce, negatives: hard}]",
            "FILE: objectives.0: negatives=hard compares a query with its own negatives, but data.hard_negatives is 0. Set "
            "it to 1 or more.",
        ),
        (
            "train.gradient_accumulation_steps=4",
            "FILE: unknown key train.gradient_accumulation_steps. Gradient accumulation over small batches gives fewer "
            "negatives than one large batch. Set train.batch_size to all queries of a step, and gradcache.rows to the rows "
            "that fit into memory.",
        ),
        ("data.sources.0.pth=x", "FILE: unknown key data.sources.0.pth. Did you mean data.sources.0.path?"),
        ("model.pooling.knid=mean", "FILE: unknown key model.pooling.knid. Did you mean model.pooling.kind?"),
        ("mesh.qqqq=1", "FILE: unknown key mesh.qqqq. Known keys: data, fsdp, tensor"),
        ("train.steps=many", "FILE: train.steps is 'many' (expected an integer)"),
        ("train.steps=1.5", "FILE: train.steps is 1.5 (expected an integer)"),
        ("train.steps=null", "FILE: train.steps is null (expected an integer)"),
        ("model.remat=maybe", "FILE: model.remat is 'maybe' (expected true or false)"),
        ("optim.learning_rate=[]", "FILE: optim.learning_rate is a list of 0 (expected a number)"),
        ("train.seed=-1", "FILE: train.seed is -1 (expected a number that is at least 0)"),
        ("model={base: x, lora: {dropout: 1}}", "FILE: model.lora.dropout is 1 (expected a number below 1.0)"),
        ("mine={window: [50]}", "FILE: mine.window is a list of 1 (expected a longer list)"),
        ("mine={window: [1, 2, 3]}", "FILE: mine.window is a list of 3 (expected a list of at most 2)"),
        (
            "data.sources.0.columns={qury: a}",
            "FILE: unknown key data.sources.0.columns.qury. Did you mean data.sources.0.columns.query?",
        ),
        ("data.sources.0.where={3: a}", "FILE: data.sources.0.where.3 is 3 (expected a text"),
        (
            "data.sources.0.columns={x: a}",
            "FILE: unknown key data.sources.0.columns.x. Known keys: query, pos, neg, prompt, pos_scores, neg_scores, "
            "text, label, sentence1, sentence2, score, premise, hypothesis",
        ),
        ("data.sources.0.label_names={a: ''}", "FILE: data.sources.0.label_names.a is '' (expected a text that is not empty"),
        ("train.steps=0", "FILE: train.steps is 0 (expected a number above 0)"),
        ("train=5", "FILE: train is 5 (expected a mapping such as {key: value})"),
        (
            "model.attention=sideways",
            "FILE: model.attention is 'sideways' (expected 'causal', 'bidirectional', 'prefix' or 'prefix_lm')",
        ),
        ("optim.learning_rate=.nan", "FILE: optim.learning_rate is nan (expected a finite number)"),
        ("train.stall_timeout_s=.inf", "FILE: train.stall_timeout_s is inf (expected a finite number)"),
        ("train.seed=99999999999", "FILE: train.seed is 99999999999 (expected a number that is at most 2147483647)"),
        ('data.sources.0.label_names={a: "b\\0"}', "FILE: data.sources.0.label_names: a text must not contain a NUL character"),
        ("matryoshka.dims=[64, 64]", "FILE: matryoshka: dims has 64 twice. Remove one."),
        ("quantization.precisions=[int8, int8]", "FILE: quantization: precisions has int8 twice. Remove one."),
        ('run.dir="a\\0b"', "FILE: run.dir: a text must not contain a NUL character"),
        (
            "eval.sets.0.path=x",
            "FILE: eval.sets has no entry 0, because the config has no such list. Give all of it: eval.sets=[{...}]",
        ),
        ("data.sources=[]", "FILE: data.sources is a list of 0 (expected a list of at least 1)"),
        ("data.sources.0={weight: 2}", "FILE: data.sources.0.path is missing. It has no default."),
        ("data.row_length=511", "FILE: data: row_length is 511 (expected at least max_length, 512: a text must fit a row"),
        ("model.instruction_template=Query", "FILE: model: instruction_template must contain {instruction}"),
        ("model.example_template=x", "FILE: model: example_template must contain {query} and {response}"),
        (
            "data.sources.0.few_shot={}",
            "FILE: data.sources.0: few_shot shows its examples under an instruction. Set instructions, none of them empty.",
        ),
        ("mesh.data=0", "FILE: mesh: data is 0 (expected a number of devices, or -1 for the remaining ones"),
        ("mesh.fsdp=-1", "FILE: mesh: data and fsdp are -1; only one axis can take the remaining devices"),
        ("train.steps", "override 'train.steps': expected key.sub=value, such as train.steps=100"),
        ("=5", "override '=5': expected key.sub=value"),
        ("train.steps=[", "override 'train.steps=[': the value is not valid YAML"),
        ("train.steps=2001-99-99", "FILE: train.steps is '2001-99-99' (expected an integer)"),
        ("data.sources.2.path=x", "override 'data.sources.2.path=x': '2' is not an index into a list of 2 entries"),
        ("data.sources.²=x", "override 'data.sources.²=x': '²' is not an index into a list of 2 entries"),
        ("data.sources.path=x", "override 'data.sources.path=x': 'path' is not an index into a list of 2 entries"),
        ("model.base.x=1", "override 'model.base.x=1': base is a str, not a section"),
        (
            "data.sources.1.adapter=a",
            "FILE: data.sources.1.adapter is 'a', but model.lora.names is empty. Name the adapters there.",
        ),
        ("model.lora.names=[a, a]", "FILE: model.lora.names: the names of adapters must differ"),
        ("model.lora.names=[../a]", "FILE: model.lora.names.0 is '../a' (expected only letters, digits, _, and -)"),
        ("model.lora.names=[a]", "FILE: data.sources.0.adapter is '' (expected one of model.lora.names: a"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(tmp_path, override).startswith(message)


def test_a_text_that_is_not_yaml_needs_quotes(tmp_path: Path) -> None:
    assert error_of(tmp_path, "model.echo={text}: {text}").endswith(""". Quote a text: model.echo='"..."'.""")
    message = error_of(tmp_path, "model.echo=A {text} B: {text}")
    assert message.startswith(
        """FILE: model.echo is a mapping of 1 (expected a text; quote a number, true, false, null, or one that has : or {; """
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("", "FILE: holds nothing (expected a mapping of sections such as model: and data:)"),
        ("[1]", "FILE: holds a list (expected a mapping of sections such as model: and data:)"),
        ("a: [", "FILE: not valid YAML (while parsing"),
        ("a: 1\na: 2", "FILE: not valid YAML (while constructing a mapping"),
        ("a: !!python/object:os.system {}", "FILE: not valid YAML"),
        ("1: 2", "FILE: "),
        ({"data": SMALLEST["data"]}, "FILE: model is missing. It has no default."),
    ],
)
def test_errors_of_files(tmp_path: Path, tree: Any, message: str) -> None:
    assert error_of(tmp_path, tree=tree).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"absent.yaml: no such config file\. Give the path .*, or the name of a shipped config\.$"
    ):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
            load_config(path)


def test_the_tree_is_frozen(tmp_path: Path) -> None:
    config = load_smallest(tmp_path)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]
    named = ({0: "a", 1: "b"}, {"1": "b", "0": "a"}, {0: "a", 1: "c"})
    first, same, other = (config.data.sources[0].model_validate({"path": "a", "label_names": names}) for names in named)
    assert (first == same, first == other) == (True, False) and len({config, first, same, other}) == 3


@pytest.mark.parametrize("name", list_shipped_configs())
def test_shipped_configs_are_valid(name: str) -> None:
    assert load_config(name).run.name == name


def test_a_config_changes_only_its_own_keys_of_a_spec(tmp_path: Path) -> None:
    spec = EmbeddingSpec(attention="causal", pooling="last", append_eos=False, prompts={"query": "q"})
    assert spec.apply_model_config(load_smallest(tmp_path).model, 77) == spec.replace(max_length=77)
    chosen = load_smallest(
        tmp_path, "model.attention=bidirectional",
        "model.pooling={kind: latent_attention, include_instruction: true, latents: 9, heads: 2}",
        "model.normalize=false", "model.append_eos=true", "model.instruction_template='{instruction}:'",
        "model.query_suffix='?'", "model.example_template='{query}{response}'", "model.projection={width: 3, bias: true}",
    )  # fmt: skip
    expected = EmbeddingSpec(
        attention="bidirectional", pooling="latent_attention", latents=9, pooling_heads=2, include_instruction=True,
        normalize=False, append_eos=True, max_length=77, instruction_template="{instruction}:", prompts={"query": "q"},
        query_suffix="?", example_template="{query}{response}", projection=3, projection_bias=True,
    )  # fmt: skip
    assert spec.apply_model_config(chosen.model, 77) == expected


def test_prompts_are_built_from_the_template_and_stored_by_name() -> None:
    spec = EmbeddingSpec(instruction_template="<{instruction}> ")
    assert (spec.build_prompt("find {x}"), spec.build_prompt(""), spec.build_prompt(None)) == ("<find {x}> ", "", "")
    assert spec.add_source_prompts({}) == spec
    named = spec.add_source_prompts({"a": ("find", "doc"), "b": ("sort", "")}).prompts
    assert named == {"query": "<find> ", "document": "<doc> ", "a": "<find> ", "b": "<sort> "}


def test_choices_in_the_config_equal_those_of_the_model() -> None:
    """The tree lists them again, because reading a config must not import JAX."""
    attention = typing.get_args(typing.get_args(ModelConfig.model_fields["attention"].annotation)[0])
    assert set(attention) == set(MASKS)
    assert set(typing.get_args(PoolingKind)) == set(POOLINGS)
    assert typing.get_args(LoraTarget) == tuple(TARGET_PROJECTIONS)
