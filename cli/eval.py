"""`ar2diff eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import AsJson, quiet, report


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id, converted or not.")],
    data: Annotated[str, typer.Option(help="jsonl, parquet or txt file.")],
    text_field: Annotated[str, typer.Option(help="Field of a row that is the text.")] = "text",
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window; shorter texts are left out.")
    ] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws a window.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Windows, from the file's start.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Likelihood on held-out text: the diffusion bound with its error, the AR mode's NLL.

    Example: ar2diff eval runs/demo --data valid.jsonl --limit 64
    """
    quiet()
    from ..checkpoint.io import load_checkpoint
    from ..evaluation.score import evaluate

    checkpoint = load_checkpoint(model, device="auto")
    result = evaluate(
        checkpoint, data, field=text_field, length=length, samples=samples, limit=limit, seed=seed
    )
    report({"model": model, **result}, as_json)
