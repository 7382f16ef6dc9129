"""What a report has measured so far, part by part: a report that was stopped goes on where it was.

DIR/rows/plan.json        what is measured; other rows are not mixed with these
DIR/rows/speed.jsonl      a line for every repeat, question, ...; one file for each question
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.output import disk_errors, write_json
from ..config.safe_json import parse_json
from ..core.errors import Ar2DiffError, option
from .figures import QUESTIONS

ROWS, PLAN = "rows", "plan.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Something that is measured in one go, and done again if it was stopped.

    Attributes:
        question: `speed`, `quality`, `length` or `control`. name: unique within it.
        cost: about how long it takes, in any unit that all parts share.
        run: measures it.
    """

    question: str
    name: str
    cost: float
    run: Callable[[], Sequence[Row]]


class Journal:
    """The rows in a report's folder.

    Args:
        folder: of the report. plan: what is measured, as JSON values.
        fresh: drop the rows that are there.

    Attributes:
        rows: by question and part. seconds: that all parts together took.

    Raises:
        Ar2DiffError: the folder holds rows of another plan.
    """

    def __init__(self, folder: Path, plan: Row, fresh: bool = False):
        self.folder = folder / ROWS
        file = self.folder / PLAN
        if fresh:
            for old in [file, *self.folder.glob("*.jsonl")]:
                old.unlink(missing_ok=True)
        check_plan(folder, plan)
        write_json(file, plan)
        self.seconds = 0.0
        self.rows = {question: self._read(question) for question in QUESTIONS}

    def has(self, part: Part) -> bool:
        """Whether a part has been measured."""
        return part.name in self.rows[part.question]

    def write(self, part: Part, rows: Sequence[Row], seconds: float) -> None:
        """Add the rows of a part, of which there is at least one, and how long it took."""
        lines = _lines(part.name, rows, seconds)
        self.seconds += seconds
        with disk_errors(self.folder), self._file(part.question).open("a", encoding="utf-8") as to:
            to.write(lines)
            to.flush()
            os.fsync(to.fileno())
        self.rows[part.question][part.name] = list(rows)

    def of(self, question: str) -> list[Row]:
        """All rows of a question."""
        return [row for rows in self.rows[question].values() for row in rows]

    def _file(self, question: str) -> Path:
        return self.folder / f"{question}.jsonl"

    def _read(self, question: str) -> dict[str, list[Row]]:
        """The rows of every whole part; what a kill has cut off is removed from the file."""
        file = self._file(question)
        if not file.exists():
            return {}
        found: dict[str, list[Row]] = defaultdict(list)
        sizes, took = {}, {}
        with disk_errors(file):
            text = file.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                row = parse_json(line)
                name = row.pop("part")
                sizes[name], took[name] = row.pop("of"), row.pop("took")
            except (ValueError, KeyError, AttributeError):
                continue
            found[name].append(row)
        whole = {name: rows for name, rows in found.items() if len(rows) == sizes[name]}
        kept = "".join(_lines(name, rows, took[name]) for name, rows in whole.items())
        self.seconds += sum(took[name] for name in whole)
        if kept != text:
            with disk_errors(file):
                beside = file.with_name(f"{file.name}.partial")
                beside.write_text(kept, encoding="utf-8")
                beside.replace(file)
        return whole


def _lines(name: str, rows: Sequence[Row], seconds: float) -> str:
    about = {"part": name, "of": len(rows), "took": round(seconds, 3)}
    return "".join(json.dumps(about | row, ensure_ascii=False) + "\n" for row in rows)


def check_plan(folder: Path, plan: Row) -> None:
    """Refuse a report's folder that holds rows of another plan.

    Raises:
        Ar2DiffError: it does.
    """
    file = folder / ROWS / PLAN
    if not file.exists():
        return
    try:
        old = parse_json(file.read_bytes())
    except (ValueError, OSError):
        old = {}
    names = sorted(
        name for name in plan if not isinstance(old, dict) or old.get(name) != plan[name]
    )
    if names == ["size"]:
        raise Ar2DiffError(
            f"{folder} holds a report that measured more, or less",
            f"use {option('quick', True)} as the earlier call did, or did not; choose another "
            f"{option('output_dir')}; or replace the report with {option('overwrite', True)}",
        )
    if names:
        raise Ar2DiffError(
            f"{folder} holds a report that was measured with another {names[0].replace('_', ' ')}",
            f"choose another {option('output_dir')}, or replace it with "
            f"{option('overwrite', True)}",
        )
