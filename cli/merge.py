"""`ar2diff merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, DryRun, Overwrite, quiet, report


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")],
    output_dir: Annotated[Path, typer.Argument(help="New or empty folder.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the adapter's base.", show_default="as the adapter names it"
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and report how much the logits changed.

    Example: ar2diff merge runs/lora runs/merged
    """
    quiet()
    from .. import merge as run

    result = run(adapter, output_dir, base=base, overwrite=overwrite, dry_run=dry_run)
    report({"dry_run": dry_run, "output_dir": str(output_dir), **asdict(result)}, as_json)
