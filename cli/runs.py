"""`ar2diff runs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import AsJson, report

if TYPE_CHECKING:
    from ..training.history import PastRun


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder in which to look for runs.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the training runs in a folder, with what they reached.

    Example: ar2diff runs experiments
    """
    from dataclasses import asdict

    from ..core.errors import Ar2DiffError
    from ..training.history import find_runs

    if not folder.is_dir():
        raise Ar2DiffError(f"folder {folder} does not exist", "name the folder that holds the runs")
    found = find_runs(folder)
    if as_json:
        report({"runs": [asdict(run) for run in found]}, as_json)
        return
    rows = [_row(run) for run in found]
    if not rows:
        print(f"there are no runs in {folder}")
        return
    rows = [("run", "verb", "steps", "time", "reached"), *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        print("  ".join([*padded, last]).rstrip())


def _row(run: PastRun) -> tuple[str, ...]:
    from ..training.closing import in_brief
    from ..training.wording import duration

    steps = str(run.steps) if run.state == "complete" else f"{run.step}/{run.steps} {run.state}"
    time = "" if run.seconds is None else duration(run.seconds)
    return run.folder, run.verb or "", steps, time, in_brief(run.after)
