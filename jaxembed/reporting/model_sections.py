"""Sections of a report that need the models of the runs: map, neighbors, similarities, latent attention."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import open_held_out_sets
from jaxembed.files import cache_dir
from jaxembed.hub.embedder import Embedder
from jaxembed.reporting.blocks import ReportSection
from jaxembed.reporting.charts import draw_heat_map, draw_histogram, draw_points
from jaxembed.reporting.held_out_views import (
    MAX_LISTED_NEIGHBORS,
    MAX_VIEWED_SETS,
    EncodedTexts,
    SetView,
    compute_latent_attention,
    make_histogram_rows,
    project_texts,
    view_set,
)
from jaxembed.reporting.run_files import RunFiles
from jaxembed.reporting.training_views import open_training_sources, view_training_source

log = logging.getLogger("jaxembed")


@dataclasses.dataclass(frozen=True)
class RunViews:
    """The content of a report about the model of a run.

    Attributes:
        run: Name of the run.
        sets: The views of its held-out sets.
        training_views: The views of its training sources that have hard negatives.
        latents: The cells of the heat map and its note, if the model has latent attention.
    """

    run: str
    sets: Sequence[SetView]
    training_views: Sequence[SetView]
    latents: tuple[list[dict[str, object]], str] | None


def view_run(run: RunFiles, name: str, checkpoint: str, mesh: Mesh) -> RunViews:
    """Load a checkpoint of a run, and encode its held-out sets and a sample of its training rows.

    Args:
        run: The run.
        name: Its name in the report.
        checkpoint: best, last, or a step.
        mesh: The devices that encode.

    Raises:
        UserError: The checkpoint, the base under its adapters, or a held-out set cannot be read.
    """
    configs = run.config.eval.sets
    if len(configs) > MAX_VIEWED_SETS:
        log.info("%s: the first %d of %d held-out sets are encoded", name, MAX_VIEWED_SETS, len(configs))
    try:
        held_out = open_held_out_sets(configs[:MAX_VIEWED_SETS], cache_dir())
    except UserError as error:
        raise UserError(f"{run.folder}: {str(error).removesuffix('.')}. Restore it, or give --no-model.") from None
    training_sources = open_training_sources(run)
    views: dict[str, SetView] = {}
    training_views: list[SetView] = []
    latents = None
    for adapter in dict.fromkeys([*(h.config.adapter for h in held_out), *(s.config.adapter for s in training_sources)]):
        embedder = Embedder.load(run.folder, checkpoint=checkpoint, adapter=adapter or None, mesh=mesh)
        for held_out_set in held_out:
            if held_out_set.config.adapter == adapter and (view := view_set(held_out_set, embedder)):
                views[view.name] = view
        for source in training_sources:
            if source.config.adapter == adapter and (view := view_training_source(source, embedder)):
                training_views.append(view)
        if latents is None and views and embedder.spec.pooling.startswith("latent_attention"):
            latents = compute_latent_attention(next(iter(views.values())).text_groups, embedder)
        del embedder  # memory holds one model at a time
    return RunViews(name, [views[config.name] for config in configs if config.name in views], training_views, latents)


def _iter_text_groups(sets: Iterable[SetView]) -> Iterable[EncodedTexts]:
    return (group for view in sets for group in view.text_groups)


def make_map_section(views: Sequence[RunViews]) -> ReportSection:
    """Return a map of the held-out texts of each run."""
    charts = []
    for run_view in views:
        if text_groups := list(_iter_text_groups(run_view.sets)):
            points, variance = project_texts(text_groups)
            note = f"{len(points):,} texts. The axes explain {100 * variance:.0f} % of the variance of their vectors."
            charts.append(draw_points(_make_title(run_view, views, "Held-out texts"), points, note))
    intro = "Principal component analysis (PCA) of the vectors. Point at a text to read it, or tap it to keep it below the map."
    return ReportSection("map", "Map", intro, charts=charts)


def make_neighbor_section(views: Sequence[RunViews]) -> ReportSection:
    """Return queries and their nearest documents, which the reader can browse."""
    neighbors = [
        {
            "label": ", ".join(filter(None, (run_view.run if len(views) > 1 else "", set_view.name))),
            "note": set_view.note,
            "hits": MAX_LISTED_NEIGHBORS,
            "queries": set_view.queries,
            "documents": set_view.documents,
        }
        for run_view in views
        for set_view in run_view.sets
        if set_view.queries
    ]
    intro = (
        f"A sample of queries and their nearest documents by cosine. A query is a hit if a relevant document is among "
        f"the first {MAX_LISTED_NEIGHBORS}. The number is the rank of its first relevant document."
    )
    return ReportSection("neighbors", "Neighbors", intro, neighbors=neighbors)


def make_similarity_section(views: Sequence[RunViews]) -> ReportSection:
    """Return histograms of the cosines of positives, hard negatives, and random negatives."""
    charts = [
        draw_histogram(
            _make_title(run_view, views, set_view.name),
            make_histogram_rows(set_view.similarities),
            "cosine",
            "share of the pairs",
            set_view.note,
        )
        for run_view in views
        for set_view in (*run_view.sets, *run_view.training_views)
        if set_view.similarities
    ]
    intro = (
        "Hard negatives of a held-out set are the five nearest documents that are not relevant, random negatives are five "
        "random other ones."
    )
    if any(run_view.training_views for run_view in views):
        intro += " Training rows have their own hard negatives; their random negatives are positives of other rows."
    return ReportSection("similarities", "Similarities", intro, charts=charts)


def make_latent_section(views: Sequence[RunViews]) -> ReportSection:
    """Return the attention of texts to the latents, where a model has latent attention."""
    charts = [
        draw_heat_map(_make_title(run_view, views, "Attention to latents"), run_view.latents[0], run_view.latents[1])
        for run_view in views
        if run_view.latents is not None
    ]
    intro = "Mean attention of the tokens of a text to each latent, as in appendix C of NV-Embed (Lee et al. 2024)."
    return ReportSection("latents", "Latent attention", intro, charts=charts)


def _make_title(run_view: RunViews, views: Sequence[RunViews], title: str) -> str:
    return f"{run_view.run}: {title}" if len(views) > 1 else title
