"""`ar2diff export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, DryRun, Overwrite, quiet, report


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Target format: sdar, for SGLang and LMDeploy (from block_causal Qwen3 "
            "models), or ar, a plain AR model (from causal_context models).",
        ),
    ],
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a converted model in the format of another engine, with the same weights.

    Example: ar2diff export runs/qwen --to ar --output-dir runs/qwen-ar
    """
    quiet()
    from .. import export as run

    done = run(model, output_dir, to, overwrite=overwrite, dry_run=dry_run)
    result = {"dry_run": dry_run, "output_dir": str(output_dir), **asdict(done)}
    report(result if as_json else {k: v for k, v in result.items() if k != "notes"}, as_json)
    if not as_json:
        typer.echo("\n".join(f"note: {note}" for note in done.notes))
