"""The config of `jaxembed synthesize`: a recipe for training rows that an LLM writes.

A recipe has inputs (optional), and tasks. A task has steps and a row:

    # Wang et al. 2024 (arXiv:2401.00368), tables 7 and 8
    name: example
    version: 1                       # of its prompts; stored in the provenance
    inputs:
      documents: docs.jsonl          # rows with any fields; '' if the user must set inputs.documents=PATH
    tasks:
      - name: short_long             # writes OUT/short_long.jsonl
        weight: 2                    # share of the rows of all tasks
        steps:
          - name: tasks
            kind: ask
            requests: 400            # drafts to start; or per: INPUT, one for each of its rows
            prompt: |
              Brainstorm a list of search tasks in {domain}. Answer with a JSON list of strings.
            values:                  # of placeholders without another source
              domain: {law: 0.7, medicine: 0.3}      # or [law, medicine], or {file: domains.txt}
            answer: {type: list, items: {max_chars: 300, max_items: 20}}
            unique: near
          - name: example            # a later step asks once for each draft: here, for each item
            kind: ask
            prompt: |
              Task: {tasks.item}. Answer with {"user_query": ..., "positive_document": ..., "hard_negative_document": ...}
              in {language}.
            values:
              language: [English, German]
            answer:
              type: object
              fields:
                user_query: {language: "{language}"}
                positive_document: {}
                hard_negative_document: {}
        row:                         # a row of pairs, scored_pairs, labels, nli or text
          prompt: "{tasks.item}"
          query: "{example.user_query}"
          pos: ["{example.positive_document}"]
          neg: ["{example.hard_negative_document}"]
        quotas:
          - {by: "{example.language}", max_share: 0.6}

Placeholders are {VALUE} for a value of the same step; {STEP.FIELD} for a field of an earlier step's answer, or a value that it
drew; and {INPUT.FIELD} for a field of the row of an input. The answer of type list has the field `item`, type text the field
`text`. Other braces, as in JSON, are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.data import NonEmpty, RowField, SourceConfig
from jaxembed.config.sections import Positive, Section, parse_section, read_tree
from jaxembed.config.shipped import SYNTHESIS_FOLDER, find_config
from jaxembed.config.synthesis_steps import (
    AnySynthesisStep,
    AskStepConfig,
    Name,
    RankStepConfig,
    RetrieveStepConfig,
    RoundTripStepConfig,
    find_unknown_placeholder,
)

LANGUAGE, LENGTH = "language", "length"  # keys of quotas, besides templates


class QuotaConfig(Section):
    """Limit the rows of a task that share a value. Further rows are rejected."""

    by: NonEmpty = Field(
        description='What groups the rows: a template such as "{tasks.language}"; language, the detected language of the first '
        "document; or length, the characters of the first document, rounded down to a power of two."
    )
    max_rows: Positive | None = Field(None, description="Maximum number of rows of a group.")
    max_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Maximum rows of a group, as a share of the rows of the task. Needs max_rows of the recipe.",
    )

    @model_validator(mode="after")
    def _check_limit(self) -> QuotaConfig:
        if (self.max_rows is None) == (self.max_share is None):
            raise ValueError("a quota needs max_rows or max_share. Set one of them.")
        return self


class TaskConfig(Section):
    """One kind of rows: the steps that write them, and the file that they go to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(description="Name of the task and of its file.")
    weight: float = Field(1.0, gt=0, le=1e6, description="Share of the rows of all tasks, relative to the other weights.")
    steps: tuple[AnySynthesisStep, ...] = Field(min_length=1)
    row: dict[RowField, str | tuple[str, ...]] = Field(
        min_length=1,
        description="Fields of a training row, each a template or a list of templates. A template that is a single placeholder "
        "keeps the type of its value, such as a number.",
    )
    quotas: tuple[QuotaConfig, ...] = Field((), description="Limits on the number of rows that share a value.")

    @model_validator(mode="after")
    def _check_steps(self) -> TaskConfig:
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError("two steps have the same name. Give each its own.")
        first, *later = self.steps
        if not isinstance(first, AskStepConfig) or (first.requests is None) == (not first.per):
            raise ValueError("the first step must be of kind ask, with requests or per. Set one of the two.")
        for i, step in enumerate(later, 1):
            if isinstance(step, AskStepConfig) and (step.requests or step.per):
                raise ValueError(f"steps.{i}: requests and per belong to the first step. Use repeat for several requests.")
            earlier = [s.name for s in self.steps[:i] if isinstance(s, RetrieveStepConfig)]
            if isinstance(step, RankStepConfig) and step.candidates not in earlier:
                raise ValueError(f"steps.{i}.candidates is {step.candidates!r} (expected the name of an earlier retrieve step)")
            if isinstance(step, RoundTripStepConfig) and step.input != first.per:
                raise ValueError(f"steps.{i}.input is {step.input!r} (expected the input that steps.0.per names)")
        return self

    @property
    def first(self) -> AskStepConfig:
        """The first step, which starts the drafts."""
        step = self.steps[0]
        assert isinstance(step, AskStepConfig)
        return step

    def find_retrieve_step(self, step: RankStepConfig) -> RetrieveStepConfig:
        """Return the step that retrieves the candidates of a rank step."""
        (retrieve_step,) = [s for s in self.steps if isinstance(s, RetrieveStepConfig) and s.name == step.candidates]
        return retrieve_step

    def check_placeholders(self, inputs: frozenset[str]) -> None:
        """Raise `ValueError` for a placeholder without values. `inputs` are the names of the inputs."""
        prefixes = frozenset({self.first.per} & inputs)
        known_names: frozenset[str] = frozenset()
        for i, step in enumerate(self.steps):
            for key, template in step.list_templates().items():
                self._check_template(f"steps.{i}.{key}", template, known_names | step.own_placeholders, prefixes)
            known_names |= {f"{step.name}.{field}" for field in step.field_names}
        templates = {f"quotas.{i}.by": quota.by for i, quota in enumerate(self.quotas)}
        for field, value in self.row.items():
            templates |= {f"row.{field}": text for text in ([value] if isinstance(value, str) else value)}
        for key, template in templates.items():
            self._check_template(key, template, known_names, prefixes)

    @staticmethod
    def _check_template(key: str, template: str, known_names: frozenset[str], prefixes: frozenset[str]) -> None:
        unknown = find_unknown_placeholder(template, known_names, prefixes)
        if unknown is None:
            return
        choices = sorted([*known_names, *(f"{prefix}.FIELD" for prefix in prefixes)])
        expected = f"expected one of {', '.join(choices)}" if choices else "none is known here"
        hint = "" if "." in unknown else f" Add values.{unknown} to the step."
        raise ValueError(f"{key}: placeholder {{{unknown}}} has no values ({expected}).{hint}")


class SynthesisConfig(Section):
    """The whole config of `jaxembed synthesize`."""

    name: NonEmpty = Field(description="Name of the recipe, for the provenance of its rows.")
    version: Positive = Field(1, description="Version of the prompts, for the provenance of the rows.")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Seed of all random draws, including the seeds that are sent to the server."
    )
    max_rows: Positive | None = Field(
        None, description="Number of rows to write, of all tasks together. Default: all that the steps yield."
    )
    inputs: dict[Name, str] = Field(
        {},
        description="Files or folders of rows, by name. Tasks start from their rows, or search them. An empty path must be "
        "set with inputs.NAME=PATH.",
    )
    input_chars: Positive = Field(
        20000, description="Maximum characters of each field of an input row. Longer texts are truncated."
    )
    existing: tuple[SourceConfig, ...] = Field(
        (),
        description="Existing training files, with the keys of data.sources of a training config. A row whose query occurs in "
        "them is rejected as a duplicate.",
        json_schema_extra={"nested_rows": False},
    )
    duplicates: Literal["none", "exact", "near"] = Field(
        "near",
        description="Reject a row whose query equals (exact) or nearly equals (near) that of an earlier row, or of a row of "
        "existing.",
    )
    threshold: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="Minimum Jaccard index of the character n-grams of two nearly equal queries, estimated. It applies to "
        "duplicates: near, not to unique: near of a step, which always uses 0.8.",
    )
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)

    @field_validator("inputs", mode="before")
    @classmethod
    def _read_empty_paths(cls, inputs: Any) -> Any:
        return {name: "" if path is None else path for name, path in inputs.items()} if isinstance(inputs, dict) else inputs

    @field_validator("tasks")
    @classmethod
    def _check_names(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same name. Give each its own.")
        return tasks

    @model_validator(mode="after")
    def _check_references(self) -> SynthesisConfig:
        inputs = frozenset(self.inputs)
        for i, task in enumerate(self.tasks):
            for j, step in enumerate(task.steps):
                name = step.per if isinstance(step, AskStepConfig) else getattr(step, "input", "")
                if name and name not in inputs:
                    raise ValueError(f"tasks.{i}.steps.{j}: no input {name!r}. Add inputs.{name}: PATH.")
            if any(quota.max_share for quota in task.quotas) and self.max_rows is None:
                raise ValueError(f"tasks.{i}.quotas: max_share needs the number of rows. Set max_rows, or --max-rows.")
            try:
                task.check_placeholders(inputs)
            except ValueError as error:
                raise ValueError(f"tasks.{i}.{error}") from None
        return self


def load_synthesis_config(path: str | Path, overrides: Sequence[str] = (), max_rows: int | None = None) -> SynthesisConfig:
    """Read the YAML file of a recipe, apply overrides, and check the result.

    Args:
        path: The YAML file, or the name of a shipped recipe.
        overrides: Settings of the form `key.sub=value`, applied in order.
        max_rows: Number of rows to write. Default: the one of the recipe.

    Raises:
        UserError: The file cannot be read, or a key is unknown or has a wrong value.
    """
    path = find_config(path, [SYNTHESIS_FOLDER])
    tree = read_tree(path, overrides)
    if max_rows is not None:
        tree["max_rows"] = max_rows
    return parse_section(SynthesisConfig, tree, str(path))
