"""`ar2diff report` and `ar2diff compare`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import AsJson, Dtype, quiet, report

if TYPE_CHECKING:
    from ..reports.journal import Part


def report_command(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a converted model, or of a draft adapter.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="The autoregressive model to compare it with.",
            show_default="the one it was made from, if that is here",
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="TUNED_AR",
            help="The base, trained further on the same data without being converted.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another converted model. Can be repeated."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File with held-out text; of a vision-language model, also with conversations "
            "about images.",
            show_default="texts that the model's run held out from its training, if they are here; "
            "else the embedded stories, for models made from the embedded one",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text of a row.")] = "text",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="T,...", help="Tasks of lm-evaluation-harness to measure too."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure less: minutes, for a small model.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUESTION",
            help="Measure only speed, quality, length or control. Can be repeated.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the report.", show_default="MODEL-report"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the report in the output folder.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure whether a converted model is worth using, beside its base: speed, quality, length and
    control. A report that was stopped goes on where it was.

    Example: ar2diff report runs/demo --base ar2diff/demo/model --quick
    """
    quiet()
    from .. import report as measure

    folder, found = measure(
        model, output_dir, base=base, control=control, against=against or (), data=data,
        text_field=text_field, tasks=[name for name in (tasks or "").split(",") if name],
        quick=quick, only=only or (), dtype=dtype, seed=seed, overwrite=overwrite,
        command=shlex.join(["ar2diff", *sys.argv[1:]]), steps=_shown,
    )  # fmt: skip
    report(_summary(folder, found), as_json)


def compare_command(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT...", help="Folders of reports, or their files.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")] = Path(
        "compare.html"
    ),
) -> None:
    """Show several reports as one page, to compare recipes, checkpoints or machines.

    Example: ar2diff compare runs/short-report runs/long-report
    """
    from .. import compare

    typer.echo(f"report: {compare(reports, output)}")


def _summary(folder: Path, found: Any) -> dict[str, Any]:
    """What the command prints in the end."""
    counts = {}
    for figure in found.figures:
        counts[figure.question] = counts.get(figure.question, 0) + 1
    page = folder / "report.html"
    return {
        "report": str(page if page.exists() else folder / "report.json"),
        "figures": counts,
        "seconds": found.protocol["seconds"],
        "missing": [f"{miss.question}: {miss.what} ({miss.why})" for miss in found.missing],
    }


def _shown(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts to measure, with a bar on a terminal, and lines elsewhere."""
    total, start = sum(part.cost for part in parts), time.monotonic()
    done, question = 0.0, ""
    with _bar(total) if parts and sys.stderr.isatty() else nullcontext() as advance:
        for part in parts:
            if advance is None and part.question != question:
                question = part.question
                _tell(question, time.monotonic() - start, done, total)
            if advance is not None:
                advance(0.0, f"{part.question}: {part.name}")
            yield part
            done += part.cost
            if advance is not None:
                advance(part.cost, f"{part.question}: {part.name}")


def _tell(question: str, seconds: float, done: float, total: float) -> None:
    left = f", about {seconds * (total - done) / done:.0f} s left" if done else ""
    print(
        f"report: {question} ({100 * done / total:.0f} % done{left})", file=sys.stderr, flush=True
    )


def _bar(total: float) -> Any:
    """A context manager that shows a bar, and yields what moves it on."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def shown() -> Iterator[Any]:
        columns = (
            BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda amount, now: bar.update(task, advance=amount, description=now)

    return shown()
