"""Scores of published models, as printed in their papers. Evaluation shows them next to its own scores."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from jaxembed.config.sections import Section, parse_section
from jaxembed.config.shipped import read_shipped_yaml

PUBLISHED_SCORES_FILE = "published/scores.yaml"


class PublishedRow(Section):
    """The scores of a model, in percent."""

    scores: tuple[float | None, ...] = Field(description="Score by column; null if the paper does not give it.")
    average: float | None = Field(None, description="Average, as printed in the paper.")


class PublishedTable(Section):
    """A table of scores in a paper."""

    source: str = Field(description="The paper and the table.")
    benchmark: str = Field(description="Benchmark of MTEB, or name of the group, that the table belongs to.")
    columns: dict[str, int] = Field(description="Number of tasks by column: types of tasks, domains, or benchmarks.")
    metric: str = Field("", description="Metric of all scores, if they have the same one.")
    rows: dict[str, PublishedRow] = Field(description="Scores by model.")


def read_published_tables() -> Mapping[str, PublishedTable]:
    """Return the shipped tables by name."""
    tree = read_shipped_yaml(PUBLISHED_SCORES_FILE)
    return {name: parse_section(PublishedTable, table, f"{PUBLISHED_SCORES_FILE}: {name}") for name, table in tree.items()}
