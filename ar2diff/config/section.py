"""The base class of every section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MOST_SAMPLES = 4096  # noise draws of a row: one forward takes them together


class Section(BaseModel):
    """A mapping in a recipe: unknown keys are errors, and values never change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)
