"""The sections of a report, in order."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from jaxembed.reporting.blocks import ReportSection
from jaxembed.reporting.inputs import ReportedModel
from jaxembed.reporting.model_sections import (
    make_latent_section,
    make_map_section,
    make_neighbor_section,
    make_similarity_section,
    view_run,
)
from jaxembed.reporting.model_size import read_model_size
from jaxembed.reporting.score_sections import (
    make_benchmark_section,
    make_comparison_section,
    make_leak_section,
    make_summary_section,
    make_width_section,
)
from jaxembed.reporting.training_sections import (
    make_data_section,
    make_held_out_section,
    make_setup_section,
    make_training_section,
)


def make_sections(
    models: Sequence[ReportedModel], mesh: Mesh | None, baseline: str | None = None, checkpoint: str = "best"
) -> list[ReportSection]:
    """Return the sections of a report. Some may be empty.

    Args:
        models: The models of the report.
        mesh: The devices that encode held-out texts. None: no model is loaded, and sections that need one are left out.
        baseline: Name of the model that the others are compared with. Default: the first.
        checkpoint: Checkpoint of the runs whose models are loaded: best, last, or a step.

    Raises:
        UserError: `baseline` names no model, or a model or held-out set cannot be read.
    """
    sizes = {model.name: read_model_size(model.path) for model in models}
    runs = [model.run for model in models if model.run]
    sections = [make_summary_section(models, sizes, baseline)]
    if runs:
        sections += [make_training_section(runs), make_held_out_section(runs)]
    sections += [
        make_benchmark_section(models),
        make_width_section(models),
        make_comparison_section(models),
        make_leak_section(models),
    ]
    if mesh is not None:
        views = [view_run(model.run, model.name, checkpoint, mesh) for model in models if model.run]
        sections += [
            make_map_section(views),
            make_neighbor_section(views),
            make_similarity_section(views),
            make_latent_section(views),
        ]
    return [*sections, make_data_section(runs), make_setup_section(runs)] if runs else sections
