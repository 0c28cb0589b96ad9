"""Estimate the cost of a synthesis without a server: from an earlier, smaller run, or from sample prompts and assumptions."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxembed.config.synthesis import SynthesisConfig
from jaxembed.config.synthesis_steps import AnySynthesisStep, AskStepConfig, RankStepConfig, RetrieveStepConfig
from jaxembed.curation.curation_page import REPORT_FILE
from jaxembed.data.beir import join_title_and_text
from jaxembed.files import cache_dir, read_json
from jaxembed.synthesis.drafts import Draft, draw_values, fill_template, make_rng
from jaxembed.synthesis.engine import prepare_tasks
from jaxembed.synthesis.inputs import InputRows, read_inputs
from jaxembed.synthesis.output import RECIPE_FILE
from jaxembed.synthesis.requests import BYTES_PER_TOKEN, estimate_tokens
from jaxembed.synthesis.retrieval import CANDIDATES_FIELD
from jaxembed.synthesis.steps import make_request
from jaxembed.synthesis.tasks import TaskRun

SAMPLED_DRAFTS = 20  # drafts whose prompts are made
MAX_SHOWN_PROMPT_CHARS = 2000  # of a prompt
ASSUMED_LIST_ITEMS = 10  # length of a list, if its limits allow it
ASSUMED_ANSWER_SHARE = 0.5  # length of an answer, relative to max_tokens
ASSUMPTIONS = (
    f"{BYTES_PER_TOKEN} bytes a token, answers of {ASSUMED_ANSWER_SHARE:.0%} of max_tokens, lists of {ASSUMED_LIST_ITEMS} "
    "items where allowed, all answers valid, no row dropped. Write a few rows into OUT first for an estimate from real answers."
)
log = logging.getLogger("jaxembed")


class StepCost(NamedTuple):
    """Cost of a step per draft that reaches it, and the number of drafts that leave it."""

    requests: float
    prompt_tokens: float
    completion_tokens: float
    drafts_out: float


def estimate_synthesis(config: SynthesisConfig, recipe: Path, model: str, out: Path) -> dict[str, Any]:
    """Return the rows, requests and tokens of a synthesis, and what the estimate is based on.

    Args:
        config: The whole config.
        recipe: File of the config.
        model: Name of the model; may be empty.
        out: Output folder. If it has rows of the same recipe, the estimate is based on them.

    Raises:
        UserError: The input is bad.
    """
    inputs = read_inputs(config, str(recipe))
    tasks = prepare_tasks(config, recipe, inputs, cache_dir())
    costs = {task.config.name: _estimate_costs(task, config, inputs) for task in tasks}
    if scaled_report := _scale_report(config, model, out):
        return scaled_report
    totals = {"rows": 0, "requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    for task in tasks:
        for name, value in _sum_costs(costs[task.config.name], task).items():
            totals[name] += math.ceil(value)
    return {"dry_run": True, **totals, "based_on": ASSUMPTIONS}


def _scale_report(config: SynthesisConfig, model: str, out: Path) -> dict[str, Any] | None:
    """Return an estimate that scales the report of earlier rows to all rows; None without such a report."""
    if config.max_rows is None or not (out / REPORT_FILE).exists() or not (out / RECIPE_FILE).exists():
        return None
    report, identity = read_json(out / REPORT_FILE), read_json(out / RECIPE_FILE)
    num_rows = sum(task["rows"] for task in report["tasks"].values())
    is_same = identity["recipe"] == config.name and identity["version"] == config.version and model in ("", identity["model"])
    if not is_same or not num_rows:
        return None
    names = ("requests", "prompt_tokens", "completion_tokens")
    counts = {name: math.ceil(report["tokens"][name] * config.max_rows / num_rows) for name in names}
    return {"dry_run": True, "rows": config.max_rows, **counts, "based_on": f"{num_rows:,} rows in {out}"}


def _estimate_costs(task: TaskRun, config: SynthesisConfig, inputs: Mapping[str, InputRows]) -> list[StepCost]:
    """Estimate the cost of each step from samples. The first prompt of each step is logged."""
    drafts = list(itertools.islice(task.start_drafts(), SAMPLED_DRAFTS))
    costs = []
    for step in task.config.steps:
        # Average the cost over the drafts, and go on with the drafts that have assumed answers.
        samples = [_sample_step(step, draft, task, config.seed, inputs) for draft in drafts]
        sample_costs, drafts, prompts = (list(values) for values in zip(*samples, strict=True))
        costs.append(StepCost(*(sum(values) / len(values) for values in zip(*sample_costs, strict=True))))
        if prompts[0]:
            prompt = prompts[0][:MAX_SHOWN_PROMPT_CHARS]
            log.info("task %s, step %s, first prompt:\n%s\n", task.config.name, step.name, prompt)
    return costs


def _sample_step(
    step: AnySynthesisStep, draft: Draft, task: TaskRun, seed: int, inputs: Mapping[str, InputRows]
) -> tuple[StepCost, Draft, str]:
    """Return the cost of a step for a draft, the draft with an assumed answer, and the prompt."""
    if isinstance(step, AskStepConfig):
        drawn_values = draw_values(task.choices[step.name], step.distinct, make_rng(seed, (*draft.path, step.name)))
        request = make_request(step, draft, drawn_values, "", None)
        num_items = min(max(ASSUMED_LIST_ITEMS, step.answer.items.min_items), step.answer.items.max_items)
        drafts_out = step.repeat * (num_items if step.answer.type == "list" else 1)
        answer_tokens = ASSUMED_ANSWER_SHARE * step.sampling.max_tokens
        text = "x" * int(
            answer_tokens * BYTES_PER_TOKEN / (num_items if step.answer.type == "list" else len(step.answer.field_names))
        )
        cost = StepCost(
            step.repeat,
            step.repeat * (estimate_tokens(request.system) + estimate_tokens(request.prompt)),
            step.repeat * answer_tokens,
            drafts_out,
        )
        return (
            cost,
            draft.add_fields(step.name, {**drawn_values, **dict.fromkeys(step.answer.field_names, text)}),
            request.prompt,
        )
    if isinstance(step, RetrieveStepConfig):
        indices = list(range(min(step.k, len(inputs[step.input]))))
        return StepCost(0, 0, 0, 1), draft.add_fields(step.name, {CANDIDATES_FIELD: indices}), ""
    if isinstance(step, RankStepConfig):
        return _sample_ranking(step, draft, task, inputs)
    return StepCost(0, 0, 0, 1), draft, ""


def _sample_ranking(
    step: RankStepConfig, draft: Draft, task: TaskRun, inputs: Mapping[str, InputRows]
) -> tuple[StepCost, Draft, str]:
    """Return the cost of a rank step for a draft, the draft with a positive and a negative, and a prompt."""
    documents = inputs[task.config.find_retrieve_step(step).input]
    candidates = [documents[i] for i in draft.fields[step.candidates][CANDIDATES_FIELD]]
    prompts = []
    relevance, likelihood = step.relevance, step.likelihood
    for template in [*([relevance.prompt] if relevance else []), *([likelihood.prompt] if likelihood else [])]:
        for candidate in candidates:
            candidate_values = {
                "candidate.text": join_title_and_text(candidate),
                "candidate.title": str(candidate.get("title") or ""),
                "candidate.id": "",
            }
            prompts.append(fill_template(template, draft, candidate_values))
    text = join_title_and_text(candidates[0])
    cost = StepCost(len(prompts), sum(map(estimate_tokens, prompts)), len(prompts), 1)
    return cost, draft.add_fields(step.name, {"positive": text, "negative": text, "is_relabeled": False}), prompts[0]


def _sum_costs(costs: list[StepCost], task: TaskRun) -> dict[str, float]:
    """Return the rows, requests and tokens of a task. Each step processes only the drafts that its rows need."""
    num_first_drafts = sum(1 for _ in task.start_drafts())
    num_rows = num_first_drafts * math.prod(cost.drafts_out for cost in costs)
    num_rows = num_rows if task.target_rows is None else min(num_rows, task.target_rows)
    totals: dict[str, float] = {"rows": num_rows, "requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    num_drafts = float(num_rows)
    for cost in reversed(costs):
        num_drafts = math.ceil(num_drafts / cost.drafts_out)
        totals["requests"] += num_drafts * cost.requests
        totals["prompt_tokens"] += num_drafts * cost.prompt_tokens
        totals["completion_tokens"] += num_drafts * cost.completion_tokens
    return totals
