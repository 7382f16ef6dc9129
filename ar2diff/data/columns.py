"""Rows whose columns are called otherwise, or are parts of a prompt: `data.columns` of a recipe."""

from __future__ import annotations

import re
from typing import Any

from ..config.recipe import Columns
from ..core.errors import Ar2DiffError

PLACE = re.compile(r"\{([^{}]+)\}")  # of a column in a text


def arranged(row: dict[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """The row with `prompt`, `completion` and `messages` where the recipe says they are.

    Args:
        where: what an error calls the row.

    Raises:
        Ar2DiffError: the row lacks a column, or what stands in a text is none.
    """
    wanted = {
        "prompt": columns.prompt,
        "completion": columns.completion,
        "messages": columns.messages,
    }
    found = {
        name: _value(row, text, f"{where}: data.columns.{name}")
        for name, text in wanted.items()
        if text is not None
    }
    if found and "messages" not in found:  # messages that were not asked for would go first
        row = {name: value for name, value in row.items() if name != "messages"}
    return {**row, **found}


def _value(row: dict[str, Any], text: str, where: str) -> Any:
    """A column, or a text with columns in braces."""
    names = PLACE.findall(text)
    for name in names or [text]:
        if name not in row:
            raise Ar2DiffError(
                f"{where}: the row has no column {name!r} (it has {', '.join(row) or 'nothing'})",
                "name one that it has; columns within a text stand in {braces}",
            )
        if names and not _text(row[name]):
            raise Ar2DiffError(f"{where}: {name} is empty or no text", "mend or remove the row")
    return PLACE.sub(lambda place: _text(row[place[1]]), text) if names else row[text]


def _text(value: Any) -> str:
    """A text or a number as it is, a list of them as "a, b and c"; empty for anything else."""
    if isinstance(value, list):
        *first, last = [_text(item) for item in value] or [""]
        return f"{', '.join(first)} and {last}" if first and last else last
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    return str(value)
