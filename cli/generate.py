"""`ar2diff generate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .output import HELP_JSON, quiet, report


class Mode(StrEnum):
    """How to decode."""

    diffusion = "diffusion"
    ar = "ar"


def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    mode: Annotated[
        Mode, typer.Option(help="ar: left to right, where it is alive.")
    ] = Mode.diffusion,
    threshold: Annotated[float, typer.Option(help="Commit tokens surer than this.")] = 0.9,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help=HELP_JSON)] = False,
) -> None:
    """Write text with a converted model.

    Example: ar2diff generate runs/demo --prompt "Tom has 3 apples." --max-new-tokens 64
    """
    from ..errors import Ar2DiffError, first_line

    if (prompt is None) == (prompts_file is None):
        raise Ar2DiffError(
            "give one of --prompt and --prompts-file", "see 'ar2diff generate --help'"
        )
    if prompts_file is not None:
        try:
            prompts = [
                line
                for line in prompts_file.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise Ar2DiffError(f"{prompts_file}: {first_line(error)}", "check the file") from None
        if not prompts:
            raise Ar2DiffError(f"{prompts_file}: no prompt in it", "write one prompt a line")
    else:
        prompts = [prompt]
    quiet()
    from ..checkpoint import load_checkpoint
    from ..decoding import complete

    checkpoint = load_checkpoint(model, device="auto")
    results = [
        complete(
            checkpoint,
            text,
            max_new_tokens=max_new_tokens,
            mode=mode.value,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
        )
        for text in prompts
    ]
    if as_json:
        report(results[0] if prompt is not None else {"results": results}, True)
        return
    for text, result in zip(prompts, results, strict=True):
        typer.echo(f"{text}{result['text']}")
        typer.secho(
            f"[{result['new_tokens']} tokens, {result['forwards']} forwards, "
            f"{result['tokens_per_forward']:.2f} tokens a forward, {result['seconds']:.2f} s]",
            err=True,
            dim=True,
        )
