"""`ar2diff eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import AsJson, Dtype, quiet, report


def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a model, converted or not, or of a draft adapter.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="File with held-out text, or - for standard input."),
    ],
    text_field: Annotated[str, typer.Option(help="Field that holds the text of a row.")] = "text",
    length: Annotated[
        int, typer.Option(min=2, help="Number of tokens in a window; shorter texts are skipped.")
    ] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Number of noise draws per window.")] = 8,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum number of windows, from the start of the file.", show_default="all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise draws.")] = 0,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the likelihood of held-out text: the bound of the diffusion mode with its standard
    error, and the negative log-likelihood of the AR mode. With a draft adapter, also how many of
    its drafts are right on text that its base writes.

    Example: ar2diff eval runs/demo --data valid.jsonl --limit 64
    """
    quiet()
    from .. import evaluate

    result = evaluate(
        model,
        data,
        text_field=text_field,
        length=length,
        samples=samples,
        limit=limit,
        seed=seed,
        dtype=dtype,
    )
    report(result.to_dict(), as_json)
