"""`ar2diff generate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .live import draw, interrupts, is_live, print_text, remark
from .output import AsJson, Dtype, progress, quiet, report
from .sampler import Pause, with_sampler

if TYPE_CHECKING:
    from ..checkpoint.model import Checkpoint
    from ..generation.prompts import Request
    from ..generation.writing import Writing


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
    suffix: Annotated[
        str | None,
        typer.Option(help="Text after the gap, set apart by a space if it begins with a word."),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,...",
            help="Number of tokens in the gap. If there are several, as in 4,8, the one with the "
            "likeliest text is chosen.",
        ),
    ] = None,
    revise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Write this part of the prompt anew, in as many tokens. Can be repeated.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Image that stands at {image} in the prompt, or before a prompt without it; for a "
            "vision-language model. Can be repeated.",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            help="The whole answer, or each gap, matches this regular expression.",
            rich_help_panel="Constraint",
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The answer, or each gap, is JSON of the schema in this file.",
            rich_help_panel="Constraint",
        ),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help="The answer, or each gap, is this text, or another of those given.",
            rich_help_panel="Constraint",
        ),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The answer is derived from the context-free grammar in this file, in Lark's "
            "form; not with --mode diffusion.",
            rich_help_panel="Constraint",
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
        bool,
        typer.Option(
            "--stream",
            help="Show how the text of a single prompt is denoised; without a terminal, print it "
            "as it is decided.",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Show the AR mode beside it; a single prompt, as --stream."),
    ] = False,
    pause: Pause = 0.0,
    as_json: AsJson = False,
    dtype: Dtype = "auto",
    *,
    settings: dict[str, Any],
) -> None:
    """Continue prompts with a converted model, or fill gaps in them.

    Example: ar2diff generate runs/demo --prompt "Tom has 3 apples." --max-new-tokens 64
    """
    from ..core.errors import Ar2DiffError, option, shortened
    from ..generation.prompts import check_stream, constraints_of, request_of
    from ..generation.results import (
        check_target,
        summary,
        unmatched_note,
        unread_note,
        write_results,
    )
    from ..generation.tokens import opened

    if prompt is None and " " in model and not Path(model[:200]).exists():
        raise Ar2DiffError(
            f"{shortened(model)} is a text, not a model",
            f"give a model before it, and the text as {option('prompt', shlex.quote(model))}",
        )
    request = request_of(
        prompt, prompts_file, prefix, suffix, length or (), revise or (), image or ()
    )
    if stream or compare:
        asked = "stream" if stream else "compare"
        check_stream(request, as_json or output is not None, asked)
    elif pause:
        raise Ar2DiffError(
            f"{option('pause')} only works together with {option('stream')}",
            f"set {option('stream')} too",
        )
    if output is not None:
        check_target(output, overwrite)
    settings |= constraints_of(regex, json_schema, choice, grammar)
    quiet()
    from .. import load
    from ..generation.complete import check_request

    check_request(model, request, settings, compare)
    loaded = load(model, dtype=dtype)
    if request.revise:
        gaps = opened(loaded.tokenizer, request.prompts[0], request.revise)
        request = replace(request, prompts=(gaps,))
    if stream or compare:
        _show(loaded.checkpoint, request, settings, compare, pause)
        return
    if request.infill is not None:
        before, after, lengths = request.infill
        results = [
            loaded.infill(before, after, length=lengths, images=request.images[0], **settings)
        ]
    else:
        with progress(len(request.prompts) if request.many else 0) as advance:
            results = loaded.generate(
                request.prompts, images=request.images, batch_size=batch_size,
                progress=advance, **settings,
            )  # fmt: skip
    if output is not None:
        write_results(output, (result.to_dict() for result in results))
    if as_json:
        rows = [result.to_dict() for result in results]
        alone = {name: value for name, value in rows[0].items() if name != "prompt"}
        report({"results": rows} if request.many else alone, True)
    elif output is None:
        for result in results:
            print_text(result)
    notes = (unread_note(loaded.spec, results), unmatched_note(results))
    remark(*filter(None, notes), summary(results))


def _show(
    checkpoint: Checkpoint,
    request: Request,
    settings: dict[str, Any],
    compare: bool,
    pause: float,
) -> None:
    """Show one text while it is written, and what the AR mode writes if it is asked for."""
    from ..generation.results import summary, unmatched_note, unread_note
    from ..generation.writing import Writing, with_ar_beside

    def begun(asked: dict[str, Any]) -> Writing:
        return Writing.of_prompt(checkpoint, request.prompts[0], asked, request.images[0])

    writings = with_ar_beside(begun, settings) if compare else [begun(settings)]
    live, stopped = is_live(), Event()
    with interrupts(stopped.set):
        if live:
            draw(writings, stopped.is_set, pause)
        else:
            _stream(writings, stopped.is_set)
    printed = [] if live else [writings[0].result().whole_text]
    for number, writing in enumerate(writings):
        result, mode = writing.result(), f"{writing.options.mode}: " if compare else ""
        same = result.whole_text in printed
        if not same:
            print_text(result)
            printed.append(result.whole_text)
        remark(*filter(None, (unread_note(checkpoint.spec, [result]), unmatched_note([result]))))
        remark(mode + summary([result]) + (", the same text" if same and number else ""))
    if stopped.is_set():
        raise KeyboardInterrupt


def _stream(writings: Sequence[Writing], stopped: Callable[[], bool]) -> None:
    """Write texts, printing the first one meanwhile."""
    from ..generation.writing import in_turn

    for part in writings[0].parts():
        typer.echo(part, nl=False)
        sys.stdout.flush()
        if stopped():
            break
    typer.echo()
    for _ in in_turn(writings[1:]):
        if stopped():
            break
