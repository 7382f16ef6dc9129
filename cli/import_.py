"""`ar2diff import`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, DryRun, Overwrite, quiet, report


def import_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a Dream, LLaDA, LLaDA-MoE, LLaDA 2, SDAR or A2D model.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder.")],
    block_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the blocks that the model was trained on.",
            show_default="from its config or family; A2D: whole rows",
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Import a diffusion model that needs code of its own, as a stock class that does not.

    Example: ar2diff import Dream-org/Dream-v0-Instruct-7B --output-dir runs/dream
    """
    quiet()
    from .. import import_checkpoint

    result = import_checkpoint(
        model, output_dir, block_length=block_length, overwrite=overwrite, dry_run=dry_run
    )
    report({"dry_run": dry_run, "output_dir": str(output_dir), **asdict(result)}, as_json)
    if not (as_json or dry_run):
        typer.echo(f"next: ar2diff check {output_dir}")
