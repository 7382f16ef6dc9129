"""`ar2diff eval`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import AsJson, Dtype, quiet, report
from .recipes import aligned
from .sampler import with_sampler

if TYPE_CHECKING:
    from ..evaluation.task_results import TaskResult

PANEL = "Tasks"  # of the help


@with_sampler
def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a model, converted or not, or of a draft adapter.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File with held-out text, or - for standard input."),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --data: file with conversations, or prompts and completions, also "
            "with images; the model answers, and the answers that are the same are counted.",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text of a row.")] = "text",
    length: Annotated[
        int, typer.Option(min=2, help="Number of tokens in a window; shorter texts are skipped.")
    ] = 128,
    samples: Annotated[
        int, typer.Option(min=1, help="Number of noise draws per window, or per answer of a task.")
    ] = 8,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of windows, or of documents per task, from the first.",
            show_default="all",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Instead of --data: tasks of lm-evaluation-harness, or those of ar2diff, such as "
            "demo_questions.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with more tasks, as YAML.", rich_help_panel=PANEL),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of examples in each prompt.",
            show_default="as the task says",
            rich_help_panel=PANEL,
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Render prompts with the tokenizer's chat template.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of rows per forward pass.", rich_help_panel=PANEL)
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Write what the model answered to each document to this file.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the file of --output.", rich_help_panel=PANEL),
    ] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    settings: dict[str, Any] | None = None,
) -> None:
    """Measure the likelihood of held-out text: the bound of the diffusion mode with its standard
    error, and the negative log-likelihood of the AR mode. With a draft adapter, also how many of
    its drafts are right on text that its base writes. Or run benchmarks: tasks of
    lm-evaluation-harness, decoded with the sampler's options.

    Example: ar2diff eval runs/demo --data valid.jsonl --limit 64

    Example: ar2diff eval runs/vision --answers asked.jsonl --mode diffusion

    Example: ar2diff eval runs/demo --tasks demo_questions --mode diffusion --threshold 0.9
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness has bars of its own
    quiet()
    from ..core.errors import Ar2DiffError, option
    from ..generation.results import check_target, write_results

    settings = settings or {}
    seed = settings.pop("seed", 0)
    given = [name for name in (data, answers, tasks) if name is not None]
    if len(given) != 1:
        names = f"{option('data')}, {option('answers')} and {option('tasks')}"
        raise Ar2DiffError(
            f"{'more than one' if given else 'none'} of {names} is given",
            f"set {option('data')} to measure the likelihood of text, {option('answers')} to count "
            f"answers, or {option('tasks')} to run benchmarks",
        )
    if answers is not None:
        from ..evaluation.exact import exact_answers

        only = {"include_path": include_path, "fewshot": fewshot, "output": output}
        for name in [name for name, value in only.items() if value is not None]:
            raise Ar2DiffError(
                f"{option(name)} only works with {option('tasks')}", f"leave out {option(name)}"
            )
        counted = exact_answers(
            model, answers, limit=limit, batch_size=batch_size, dtype=dtype, seed=seed, **settings
        )
        report(counted.to_dict(), as_json)
        return
    if data is not None:
        from .. import evaluate

        only = {"include_path": include_path, "fewshot": fewshot, "output": output, **settings}
        only["chat_template"] = chat_template or None
        for name in [name for name, value in only.items() if value is not None]:
            raise Ar2DiffError(
                f"{option(name)} only works with {option('tasks')}", f"leave out {option(name)}"
            )
        found = evaluate(
            model, data, text_field=text_field, length=length, samples=samples, limit=limit,
            seed=seed, dtype=dtype,
        )  # fmt: skip
        report(found.to_dict(), as_json)
        return
    from ..evaluation.task_results import run_tasks

    if output is not None:
        check_target(output, overwrite)
    results = run_tasks(
        model, [name.strip() for name in tasks.split(",")], settings, limit=limit, samples=samples,
        seed=seed, batch_size=batch_size, include_path=include_path, fewshot=fewshot,
        chat_template=chat_template, dtype=dtype,
    )  # fmt: skip
    if output is not None:
        write_results(output, ({"task": r.task, **row} for r in results for row in r.rows))
    if as_json:
        report({"model": model, "tasks": [result.to_dict() for result in results]}, True)
    else:
        print(_table(results, samples))


def _table(results: list[TaskResult], samples: int) -> str:
    """The results as lines: the setting, a row per figure, and what the errors are."""
    bounds = any(result.bound for result in results)
    head = ["task", "metric", "value", "standard error", "due to draws", "documents"]
    rows = []
    for result in results:
        for metric in result.metrics:
            name = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
            errors = [metric.standard_error, metric.bound_error]
            shown = ["-" if error is None else f"{error:.4f}" for error in errors]
            rows.append([result.task, name, f"{metric.value:.4f}", *shown, str(metric.documents)])
    kept = [n for n, name in enumerate(head) if bounds or name != "due to draws"]
    lines = aligned([tuple(row[n] for n in kept) for row in [head, *rows]], None)
    setting = ", ".join(f"{name} {value}" for name, value in results[0].setting.items())
    lines.insert(0, f"decoded with: {setting}")
    if bounds:
        lines.append(
            f"Scores of texts are upper bounds on -log p, from {samples} noise draws each, not "
            "likelihoods; 'due to draws' is the part of the error that more draws would remove."
        )
    return "\n".join(lines)
