"""Steps of a curation that compute vectors or scores with a model. Imported only if a config has one: JAX starts slowly."""

from __future__ import annotations

from pathlib import Path

from jaxembed.config.curation import AnyStep, CurateConfig, DuplicatesStepConfig
from jaxembed.curation.steps.items import AllRowsStep
from jaxembed.curation.steps.semantic_copies import SemanticCopies
from jaxembed.hub.frozen_encoder import check_model_exists, open_frozen_encoder


def check_models(step: AnyStep) -> None:
    """Raise `UserError` if a step names a model that does not exist. A hub model is downloaded."""
    assert isinstance(step, DuplicatesStepConfig)
    check_model_exists(step.model)


def make_all_rows_step(step: AnyStep, folder: Path, config: CurateConfig, cache: Path) -> AllRowsStep:
    """Return a step that decides after it has seen all rows. See `stages.make_all_rows_step`."""
    assert isinstance(step, DuplicatesStepConfig)
    return SemanticCopies(step, folder, open_frozen_encoder(step.model, cache), config.memory_mb)
