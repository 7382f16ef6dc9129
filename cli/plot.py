"""`ar2diff plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Output folders of training runs.")
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures.",
            show_default="log in the folder of a single run, else plots",
        ),
    ] = None,
) -> None:
    """Draw the metrics of runs, laid over each other if there are several.

    Example: ar2diff plot runs/first runs/second --output-dir comparison
    """
    from ..core.errors import Ar2DiffError
    from ..training.journal import METRICS, read_metrics
    from ..training.plots import LOG, draw

    found = {}
    for run in dict.fromkeys(runs):
        found[str(run)] = read_metrics(run)
        if not found[str(run)]:
            raise Ar2DiffError(
                f"{run} has no {LOG}/{METRICS}",
                "name the output folder of a training run; 'ar2diff runs' lists them",
            )
    if output_dir is None:
        output_dir = runs[0] / LOG if len(found) == 1 else Path("plots")
    for file in draw(found, output_dir):
        print(f"wrote {file} and {file.stem}-dark.svg")
