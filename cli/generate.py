"""`ar2diff generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import AsJson, progress, quiet, report
from .sampler import with_sampler


@with_sampler
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    prompt: Annotated[
        str | None, typer.Option(help='To go on from, or to fill: "the{mask:4} sat" has a gap.')
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One a line; .jsonl: the field prompt; .gz too.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Text before a gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text behind it.")] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="The gap's tokens; of several the likeliest."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write results there, one a line.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it is decided; for one prompt.")
    ] = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Write text with a converted model, or fill gaps in it.

    Example: ar2diff generate runs/demo --prompt "Tom has 3 apples." --max-new-tokens 64
    """
    from ..generation.prompts import check_stream, check_target, request_of, write_results

    request = request_of(prompt, prompts_file, prefix, suffix, length or ())
    if stream:
        check_stream(request, as_json or output is not None)
    if output is not None:
        check_target(output, overwrite)
    quiet()
    from ..generation.complete import answer, check_request, load, summary, unread_note
    from ..generation.complete import stream as stream_text

    check_request(model, request, settings)
    checkpoint = load(model)
    if stream:
        for text, result in stream_text(checkpoint, request.prompts[0], **settings):
            typer.echo(text, nl=result is not None)
            sys.stdout.flush()
        results = [result]
    else:
        with progress(len(request.prompts) if request.many else 0) as advance:
            results = answer(checkpoint, request, batch_size, settings, advance)
    if output is not None:
        write_results(output, results)
    if as_json:
        alone = {name: value for name, value in results[0].items() if name != "prompt"}
        report({"results": results} if request.many else alone, True)
    elif output is None and not stream:
        for result in results:
            typer.echo(result["text"] if "filled" in result else result["prompt"] + result["text"])
    sys.stdout.flush()  # text before figures, where both go to one place
    note = unread_note(checkpoint.spec, results)
    for line in [*([note] if note else []), summary(results)]:
        typer.secho(f"[{line}]", err=True, dim=True)
