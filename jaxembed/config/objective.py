"""The keys that all objectives share."""

from __future__ import annotations

from pydantic import Field, field_validator

from jaxembed.config.sections import Section


class ObjectiveConfig(Section):
    """The keys that all objectives share."""

    name: str
    weight: float = Field(1.0, gt=0, description="Weight of this objective in the sum.")
    sources: tuple[str, ...] = Field(
        (), description="Names of the sources that this objective applies to. Default: all sources that fit it."
    )

    @field_validator("guide", "teacher", check_fields=False)
    @classmethod
    def _check_model_name(cls, name: str | None) -> str | None:
        if name is not None and not name.strip():
            raise ValueError("expected a MODEL: a run directory, a folder, a hub id, or the URL of a server")
        return name
