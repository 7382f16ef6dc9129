"""`ar2diff check`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import AsJson, quiet, report


def check(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, whether it does what its spec promises, and who decodes it wrongly.

    Example: ar2diff check runs/demo
    """
    quiet()
    from ..evaluation.check import inspect

    result = inspect(model)
    if as_json:
        report(result, True)
    else:
        for name, value in (result["spec"] or {"diffusion": "no: an autoregressive model"}).items():
            typer.echo(f"{name:15} {value}")
        for finding in result["findings"]:
            typer.echo(f"{'ok  ' if finding['ok'] else 'FAIL'} {finding['what']}")
        for place, how in result["elsewhere"].items():
            typer.echo(f"note {place}: {how}")
    if not result["ok"]:
        raise typer.Exit(2)
