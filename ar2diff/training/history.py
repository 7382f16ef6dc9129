"""The runs in a folder, and what each has reached. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.output import check_not_locked, finished_record, run_record
from ..core.errors import Ar2DiffError
from .findings import reached
from .journal import read_metrics

DEEP = 3  # levels of folders in which runs are looked for
MEANS = ("loss", "masked_accuracy", "ar_loss", "accepted_1", "reward", "stop_rate", "kl")


@dataclass(frozen=True)
class PastRun:
    """A run that was begun.

    Attributes:
        folder: its output folder. verb: the command; None of an older run.
        base_model: the model that it began with.
        state: `complete`, `running`, or `unfinished`, which can be resumed.
        step, steps: how far it came, and how far it is to go.
        before, after, seconds: as in `RunResult`; so far, of a run that is not complete.
    """

    folder: str
    verb: str | None
    base_model: str | None
    state: str
    step: int
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float | None


def find_runs(folder: Path) -> list[PastRun]:
    """The runs in a folder and those below it, by name; a folder that is a run itself is the only
    one."""
    return [run for place in _folders(folder, DEEP) if (run := _run_in(place)) is not None]


def _folders(folder: Path, deep: int) -> Iterator[Path]:
    yield folder
    if deep and run_record(folder) is None:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _folders(inner, deep - 1)


def _run_in(folder: Path) -> PastRun | None:
    record = run_record(folder)
    if record is None or not isinstance(record.get("steps"), int) or not record["steps"]:
        return None
    rows, complete = read_metrics(folder), finished_record(folder) is not None
    before, after = record.get("before"), record.get("after")
    if after is None:
        before, after = reached(rows, MEANS)
    last: dict[str, Any] = rows[-1] if rows else {}
    return PastRun(
        folder=str(folder),
        verb=record.get("verb"),
        base_model=record.get("base_model"),
        state="complete" if complete else "running" if _is_locked(folder) else "unfinished",
        step=record["steps"] if complete else last.get("step", 0),
        steps=record["steps"],
        before=before or {},
        after=after or {},
        seconds=record.get("seconds", last.get("seconds")),
    )


def _is_locked(folder: Path) -> bool:
    try:
        check_not_locked(folder)
    except Ar2DiffError:
        return True
    return False
