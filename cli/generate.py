"""`ar2diff generate`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import AsJson, Dtype, progress, quiet, report
from .sampler import with_sampler


@with_sampler
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    prompt: Annotated[
        str | None,
        typer.Option(help='Text to continue, or to fill: "the{mask:4} sat" has a gap of 4 tokens.'),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one prompt per line, or with a column 'prompt' (jsonl, json, "
            "parquet or csv, each also as .gz); - for standard input."
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Text before the gap to fill, instead of a prompt.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Text after the gap.")] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,...",
            help="Number of tokens in the gap. If there are several, as in 4,8, the one with the "
            "likeliest text is chosen.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of prompts to decode together.")
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Write the results to this file, one JSON object per line."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text of a single prompt as it is decided.")
    ] = False,
    as_json: AsJson = False,
    dtype: Dtype = "auto",
    *,
    settings: dict[str, Any],
) -> None:
    """Continue prompts with a converted model, or fill gaps in them.

    Example: ar2diff generate runs/demo --prompt "Tom has 3 apples." --max-new-tokens 64
    """
    from ..generation.prompts import check_stream, request_of
    from ..generation.results import check_target, summary, unread_note, write_results

    request = request_of(prompt, prompts_file, prefix, suffix, length or ())
    if stream:
        check_stream(request, as_json or output is not None)
    if output is not None:
        check_target(output, overwrite)
    quiet()
    from .. import load
    from ..generation.complete import check_request

    check_request(model, request, settings)
    loaded = load(model, dtype=dtype)
    if stream:
        results = [_streamed(loaded.stream(request.prompts[0], **settings))]
    elif request.infill is not None:
        before, after, lengths = request.infill
        results = [loaded.infill(before, after, length=lengths, **settings)]
    else:
        with progress(len(request.prompts) if request.many else 0) as advance:
            results = loaded.generate(
                request.prompts, batch_size=batch_size, progress=advance, **settings
            )
    if output is not None:
        write_results(output, (result.to_dict() for result in results))
    if as_json:
        rows = [result.to_dict() for result in results]
        alone = {name: value for name, value in rows[0].items() if name != "prompt"}
        report({"results": rows} if request.many else alone, True)
    elif output is None and not stream:
        for result in results:
            typer.echo(result.whole_text)
    sys.stdout.flush()  # the text first, if both streams go to one place
    note = unread_note(loaded.spec, results)
    for line in [*([note] if note else []), summary(results)]:
        typer.secho(f"[{line}]", err=True, dim=True)


def _streamed(pieces: Generator[str, None, Any]) -> Any:
    """Print pieces of text as they come; returns what the generator returns."""
    while True:
        try:
            typer.echo(next(pieces), nl=False)
            sys.stdout.flush()
        except StopIteration as end:
            typer.echo()
            return end.value
