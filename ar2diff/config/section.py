"""The base class of every section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

MOST_SAMPLES = 4096  # noise draws of a row: one forward takes them together
MOST_ROWS = 65_536  # of a micro-batch
LARGEST, LARGEST_FLOAT = 10**15, 1e38  # what tensors, and the counters of the libraries, can hold


class Section(BaseModel):
    """A mapping in a recipe: unknown keys are errors, and values never change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _can_be_held(cls, value: Any) -> Any:
        if type(value) is int and abs(value) > LARGEST:
            raise ValueError(f"must lie between -{LARGEST} and {LARGEST}")
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise ValueError(f"must lie between -{LARGEST_FLOAT} and {LARGEST_FLOAT}")
        return value
