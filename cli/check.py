"""`ar2diff check`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import AsJson, Dtype, as_yaml, quiet, report


def check_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a model is, whether it does what its config says, and which programs would decode
    it wrongly.

    Example: ar2diff check runs/demo
    """
    quiet()
    from .. import check

    result = check(model, dtype=dtype)
    if as_json:
        report(result.to_dict(), True)
    else:
        kind = "a masked language model" if result.masked_lm else "an autoregressive model"
        plain = {"diffusion": f"no, this is {kind}"}
        shown = result.spec.to_dict() if result.spec else plain
        if result.draft:
            shown = {k: v for k, v in result.draft.to_dict().items() if k != "targets"}
            shown["targets"] = f"{len(result.draft.targets)} linear layers"
        for name, value in shown.items():
            typer.echo(f"{name:15} {as_yaml(value)}")
        if result.default:
            typer.echo(f"{'mode':15} {result.default.mode} by default: {result.default.why}")
        for finding in result.findings:
            typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.what}")
        for place, how in result.elsewhere.items():
            typer.echo(f"note {place}: {how}")
    if not result.ok:
        raise typer.Exit(2)
