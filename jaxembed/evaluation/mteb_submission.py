"""Write a submission to MTEB's leaderboard: a module that describes the model, and the results.

The module goes into mteb/models/model_implementations of mteb's repository, and the results into the folder
`results` of its repository of results. The leaderboard reads the model's training data from `training_datasets`, and marks
tasks that it was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import pprint
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from jaxembed.config import read_run_config
from jaxembed.config.catalog import read_catalog
from jaxembed.config.data import SourceConfig
from jaxembed.config.removed import upgrade_run_tree
from jaxembed.config.tree import parse_config
from jaxembed.errors import UserError
from jaxembed.evaluation.instruction_variants import VariantTask
from jaxembed.evaluation.mteb_catalog import import_mteb
from jaxembed.evaluation.mteb_encoder import MtebEncoder, choose_prompts
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import EvaluationTask
from jaxembed.files import exists, expand_home, make_output_folder, read_text, write_json, write_text

if TYPE_CHECKING:
    from jaxembed.hub.base import BaseWithWeights

log = logging.getLogger("jaxembed")

MODULE_FILE = "model.py"
HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
CARD_RECIPE = re.compile(r"^## Recipe\n\n```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)  # in the model card of an export
CARD_FRONT_MATTER = re.compile(r"---\n(.*?)^---\s*?$", re.MULTILINE | re.DOTALL)  # at the start of a model card
CARD_LICENSE = re.compile(r"^license: *(\S+)", re.MULTILINE)
SEEN_TASK = re.compile(r"mteb [\d.]+: ([\w.\-]+)")  # in the `seen` of a catalog entry
MODULE_TEMPLATE = '''"""{name}, trained with jaxembed."""

from mteb.models.model_meta import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

# Complete prompts by task. Keys that end in -document are for documents.
PROMPTS = {prompts}

{comment}
model = ModelMeta(
    loader=SentenceTransformerEncoderWrapper,
    loader_kwargs={{"model_prompts": PROMPTS}},
{fields}
)
'''


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The facts about a model in a submission, besides its scores.

    Attributes:
        name: Name on the hub, ORGANIZATION/MODEL.
        n_parameters: Number of parameters.
        n_embedding_parameters: Number of parameters of the token embedding.
        adapted_from: Hub id of the model that training started from; empty if it has none.
        license: License in the front matter of its README.md; empty if it names none, or one that mteb does not list.
        sources: Sources that it was trained on. None: unknown.
    """

    name: str
    n_parameters: int
    n_embedding_parameters: int
    adapted_from: str = ""
    license: str = ""
    sources: Sequence[SourceConfig] | None = None


def check_name(name: str | None, model: str) -> str:
    """Return the name of a submission: --submission-name, or MODEL if it is a hub id.

    Raises:
        UserError: There is none, or it is not of the form ORGANIZATION/MODEL.
    """
    if name is None and not exists(expand_home(model)) and HUB_ID.fullmatch(model):
        return model
    if name is None:
        raise UserError("--submission: the name of the model on the hub is missing. Add --submission-name ORGANIZATION/MODEL.")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"--submission-name: {name!r} is not the name of a model on the hub (expected ORGANIZATION/MODEL)")
    return name


def check_options(args: argparse.Namespace) -> None:
    """Check the options of a submission.

    Raises:
        UserError: The model has no name for the hub, there is no folder of results or no task of MTEB, or other options score
            a part of the model, which the submission would not describe.
    """
    if not args.submission:
        if args.submission_name:
            raise UserError("--submission-name: names the model of a submission. Add --submission DIR.")
        return
    check_name(args.submission_name, args.model)
    if args.layers is not None:
        raise UserError("--submission: describes the whole model, not its first layers. Export them, and score that folder.")
    if args.precision and args.precision[0] != "float32":
        raise UserError(f"--submission: has scores at float32 (found {args.precision[0]} first). Name float32 first.")
    if not args.out or not (args.tasks or args.benchmark):
        raise UserError("--submission: needs the results of MTEB tasks. Add --out DIR, and --tasks or --benchmark.")
    make_output_folder(Path(args.submission), f"{args.submission}: the folder")


def write_model_submission(args: argparse.Namespace, encoder: TaskEncoder, tasks: Sequence[EvaluationTask]) -> None:
    """Write the submission of a model that was scored."""
    from jaxembed.hub.resolve import find_model

    facts = read_facts(find_model(args.model, args.checkpoint), check_name(args.submission_name, args.model))
    plain_tasks = [task.task if isinstance(task, VariantTask) else task for task in tasks]
    mteb_tasks = [task.task for task in plain_tasks if isinstance(task, MtebTask)]
    folder = Path(args.submission)
    write_submission(folder, facts, encoder, mteb_tasks, Path(args.out) / "results")
    log.info("wrote the submission to %s; the evaluation guide says where its files go", folder)


def read_facts(base: BaseWithWeights, name: str) -> ModelFacts:
    """Return the facts about a model for a submission.

    Args:
        base: The model. Its weights are not loaded.
        name: Its name on the hub.
    """
    import flax.linen as nn
    import jax  # takes a second to import

    from jaxembed.hub.restore import RunBase
    from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes

    shapes = nn.unbox(infer_parameter_shapes(EmbeddingModel(base.transformer, base.spec)))
    folder = expand_home(base.name)
    trained_from = base.trained_from if isinstance(base, RunBase) else ""
    return ModelFacts(
        name=name,
        n_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        n_embedding_parameters=base.transformer.vocab_size * base.transformer.width,
        adapted_from=trained_from if HUB_ID.fullmatch(trained_from) and not exists(expand_home(trained_from)) else "",
        license=read_license(folder),
        sources=read_sources(folder),
    )


def read_sources(model: Path) -> list[SourceConfig] | None:
    """Return the sources that a run, or the run of an exported folder, was trained on. None: unknown."""
    card = model / "README.md"
    if exists(model / "config.yaml"):
        config = read_run_config(model / "config.yaml")
    elif exists(card) and (recipe := CARD_RECIPE.search(read_text(card))):
        config = parse_config(upgrade_run_tree(yaml.safe_load(recipe[1])), str(card))
    else:
        return None
    return [source for stage in config.stages for source in stage.data.sources]


def read_license(model: Path) -> str:
    """Return the license in the front matter of a folder's README.md, or an empty string.

    A license is a name that mteb lists, or a URL. Any other one is logged, because mteb would refuse it.
    """
    import_mteb()
    from mteb.models.model_meta import Licenses

    card = model / "README.md"
    front_matter = CARD_FRONT_MATTER.match(read_text(card)) if exists(card) else None
    match = CARD_LICENSE.search(front_matter[1]) if front_matter else None
    if match is None:
        return ""
    name = match[1].strip("\"'")
    if name.startswith("http"):
        return name
    if name.lower() in get_args(Licenses):
        return name.lower()
    log.warning("%s: mteb does not list the license %r, so the submission names none", card, name)
    return ""


def find_training_tasks(sources: Iterable[SourceConfig]) -> tuple[list[str], list[str]]:
    """Return the tasks of MTEB whose data a run was trained on, and the sources that belong to no task.

    A source belongs to a task if it has the task's name or data set, or if its catalog entry names the task.
    """
    tasks = import_mteb().get_tasks(exclude_superseded=False, exclude_beta=False)
    names_by_lowercase = {task.metadata.name.lower(): task.metadata.name for task in tasks}
    names_by_path: dict[str, list[str]] = {}
    for task in tasks:
        names_by_path.setdefault(str(task.metadata.dataset.get("path")).lower(), []).append(task.metadata.name)
    training_tasks: set[str] = set()
    sources_without_task: dict[str, None] = {}
    for source in sources:
        entry = read_catalog().get(source.display_name, {})
        candidates = [source.display_name, *SEEN_TASK.findall(" ".join(map(str, entry.get("seen", ()))))]
        matches = [names_by_lowercase[name.lower()] for name in candidates if name.lower() in names_by_lowercase]
        matches += names_by_path.get("/".join(source.path.removeprefix("hf:").split(":")[0].split("/")[:2]).lower(), [])
        training_tasks.update(matches)
        if not matches:
            sources_without_task.setdefault(source.display_name)
    return sorted(training_tasks), list(sources_without_task)


def write_submission(folder: Path, facts: ModelFacts, encoder: TaskEncoder, tasks: Sequence[Any], results: Path) -> None:
    """Write a submission.

    Args:
        folder: The folder to write to.
        facts: The facts about the model.
        encoder: The model that was scored.
        tasks: mteb's task objects.
        results: Folder of mteb's results.
    """
    import_mteb()
    from mteb.cache import ResultCache
    from mteb.models.model_meta import ModelMeta
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    training_tasks, other_sources = (None, []) if facts.sources is None else find_training_tasks(facts.sources)
    fields = collect_metadata(facts, encoder, training_tasks)
    prompts = list_prompts(encoder, tasks)
    scored_meta = MtebEncoder(encoder, encoder.versions[0]).mteb_model_meta
    meta = ModelMeta(loader=SentenceTransformerEncoderWrapper, loader_kwargs={"model_prompts": prompts}, **fields)
    submitted_results = folder / "results" / facts.name.replace("/", "__") / str(fields["revision"])
    submitted_results.mkdir(parents=True, exist_ok=True)
    write_text(folder / MODULE_FILE, format_module(fields, prompts, other_sources))
    for task in tasks:
        name = task.metadata.name
        shutil.copyfile(ResultCache(results).get_task_result_path(name, scored_meta), submitted_results / f"{name}.json")
    write_json(submitted_results / "model_meta.json", meta.to_dict())


def collect_metadata(facts: ModelFacts, encoder: TaskEncoder, training_tasks: Sequence[str] | None) -> dict[str, Any]:
    """Return the fields of mteb's ModelMeta, except those that load the model."""
    width = encoder.versions[0].width or encoder.width  # of the vectors whose results are submitted
    dims = sorted({width, *(dim for dim in encoder.spec.matryoshka_dims if dim < width)}, reverse=True)
    return {
        "name": facts.name,
        "revision": encoder.results_revision,
        "release_date": None,
        "languages": None,
        "n_parameters": facts.n_parameters,
        "n_embedding_parameters": facts.n_embedding_parameters,
        "memory_usage_mb": None,
        "max_tokens": encoder.spec.max_length,
        "embed_dim": dims if len(dims) > 1 else width,
        "license": facts.license or None,
        "open_weights": True,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
        "similarity_fn_name": "cosine",
        "use_instructions": bool(encoder.spec.prompts or encoder.spec.instruction_table),
        "training_datasets": None if training_tasks is None else set(training_tasks),
        "adapted_from": facts.adapted_from or None,
    }


def list_prompts(encoder: TaskEncoder, tasks: Iterable[Any]) -> dict[str, str]:
    """Return the complete prompts of tasks, by the names under which mteb looks them up."""
    prompts: dict[str, str] = {}
    for task in tasks:
        for part in getattr(task, "tasks", [task]):  # a task that aggregates others
            task_prompts = choose_prompts(encoder, part.metadata)
            prompts[part.metadata.name] = task_prompts.query
            prompts[f"{part.metadata.name}-document"] = task_prompts.document
    return prompts


def format_module(fields: Mapping[str, Any], prompts: Mapping[str, str], other_sources: Sequence[str]) -> str:
    """Return the source of the module.

    Args:
        fields: Fields of ModelMeta.
        prompts: Complete prompts by task.
        other_sources: Training sources that belong to no task.
    """
    comment = f"# Sources of the training data without a task of MTEB: {', '.join(other_sources)}." if other_sources else ""
    if fields["training_datasets"] is None:
        comment = "# The training data are unknown. Name their tasks of MTEB in training_datasets."
    values = {**fields, "training_datasets": fields["training_datasets"] and sorted(fields["training_datasets"])}
    lines = [f"    {key}={value!r}," for key, value in values.items() if key != "training_datasets"]
    datasets = values["training_datasets"]
    lines.append(f"    training_datasets={'None' if datasets is None else f'set({datasets!r})'},")
    return MODULE_TEMPLATE.format(
        name=fields["name"], prompts=pprint.pformat(dict(prompts), width=120), comment=comment, fields="\n".join(lines)
    )
