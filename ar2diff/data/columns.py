"""Rows whose columns have other names or are parts of a prompt: `data.columns` in a recipe."""

from __future__ import annotations

import re
from typing import Any

from ..config.sections import Columns
from ..core.errors import Ar2DiffError, nearest, option
from .parts import COLUMNS, PLACEHOLDER
from .rows import kind_of
from .sources import columns_of

PLACE = re.compile(r"\{([^{}]+)\}")  # of a column in a text
# Names that prompts and completions often have, the most telling first.
PROMPTS = ("question", "instruction", "query", "problem", "task", "input", "user", "source")
COMPLETIONS = ("answer", "response", "output", "solution", "reply", "assistant", "target", "chosen")


def arranged(row: dict[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """The row with `prompt`, `completion` and `messages` taken from where the recipe says.

    Args:
        where: what an error calls the row.

    Raises:
        Ar2DiffError: the row lacks a column, or a column that goes into a text does not hold text.
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
        row = {
            name: value for name, value in row.items() if name not in ("messages", "conversations")
        }
    return {**row, **found}


def columns_read(columns: Columns) -> set[str]:
    """The columns that `arranged` takes values from."""
    texts = [text for text in (columns.prompt, columns.completion, columns.messages) if text]
    return {name for text in texts for name in PLACE.findall(text) or [text]}


def likely_prompt(row: dict[str, Any]) -> str | None:
    """The column of a row that is probably its prompt."""
    named = next((name for name in ("prompt", *PROMPTS) if name in row), None)
    return named or _column_of_messages(row)


def likely_columns(row: dict[str, Any]) -> str:
    """The settings of `data.columns` that would probably read a row; empty if there are none."""
    if messages := _column_of_messages(row):
        return option("data.columns.messages", messages)
    prompt = likely_prompt(row)
    rest = ("completion", *COMPLETIONS)
    completion = next((name for name in rest if name in row and name != prompt), None)
    pairs = (("prompt", prompt), ("completion", completion))
    found = [option(f"data.columns.{name}", column) for name, column in pairs if column]
    return " ".join(found)


def _column_of_messages(row: dict[str, Any]) -> str | None:
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if {"role", "from"} & value[0].keys():
                return name
    return None


def _value(row: dict[str, Any], text: str, where: str) -> Any:
    """A column, or a text with columns in braces, of which some may be empty or null. For one of
    images stand their placeholders."""
    names = PLACE.findall(text)
    row = row | {name: _placeholders(row[name]) for name in COLUMNS if name in row and names}
    for name in names or [text]:
        if name not in row:
            raise Ar2DiffError(
                f"{where}: the row has no column {name!r} (it has {columns_of(row)})"
                f"{nearest(name, row)}",
                "use names of existing columns; within a text, put them in {braces}",
            )
        if names and _text(row[name]) is None:
            raise Ar2DiffError(
                f"{where}: column {name!r} holds {kind_of(row[name])}, but must hold text",
                "correct or remove the row",
            )
    if not names:
        return row[text]
    if not any(_text(row[name]) for name in names):
        raise Ar2DiffError(
            f"{where}: there is no text in {' and '.join(map(repr, names))}",
            "correct or remove the row",
        )
    return PLACE.sub(lambda place: _text(row[place[1]]) or "", text)


def _text(value: Any) -> str | None:
    """Text and numbers as they are, null as nothing, a list as "a, b and c"; None for all else."""
    if value is None:
        return ""
    if isinstance(value, list):
        texts = [_text(item) for item in value]
        if None in texts:
            return None
        *first, last = texts or [""]
        return f"{', '.join(first)} and {last}" if first and last else last
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value)


def _placeholders(images: Any) -> str:
    """What stands in a text for the images of a column."""
    return PLACEHOLDER * (len(images) if isinstance(images, list) else images is not None)
