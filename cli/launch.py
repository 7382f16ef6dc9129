"""The options of several processes, which the training verbs have in common."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

LAUNCH = typer.Option(
    "--launch",
    metavar="STRATEGY",
    help="Run in several processes: ddp, zero1, zero2, zero3, fsdp2, an accelerate .yaml or a "
    "DeepSpeed .json.",
    rich_help_panel="Several processes",
)
PROCESSES = typer.Option(
    "--num-processes",
    metavar="N",
    help="Number of processes on this node; by default, one per GPU. Anything after -- is "
    "passed to the launcher; for two nodes: -- --nnodes 2 --rdzv-backend c10d --rdzv-endpoint "
    "HOST:PORT.",
    rich_help_panel="Several processes",
)
SMALL = 1 << 16  # bytes of data for each process
OPTIONS = {"launch": str, "num_processes": int}


def with_launch(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb `--launch`, `--num-processes` and flags after `--`. It receives a `Launch` as
    `launch`, or None, and calls `start` once it knows that the command is sound."""
    own = inspect.signature(function, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.name != "launch"]
    for (name, kind), option in zip(OPTIONS.items(), (LAUNCH, PROCESSES), strict=True):
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )

    @functools.wraps(function)
    def verb(**values: Any) -> None:
        from ..distributed.launch import make_launch

        flags = after_dashes(sys.argv)
        if flags:  # typer takes them for arguments
            values["overrides"] = (values["overrides"] or [])[: -len(flags)]
        chosen, processes = values.pop("launch"), values.pop("num_processes")
        function(**values, launch=make_launch(chosen, processes, flags))

    verb.__signature__ = own.replace(parameters=parameters)
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    del verb.__wrapped__
    return verb


def after_dashes(arguments: list[str]) -> list[str]:
    """The arguments that follow `--`."""
    return arguments[arguments.index("--") + 1 :] if "--" in arguments else []


def without_launch(arguments: list[str]) -> list[str]:
    """A command line without the options of this file, as each process gets it."""
    kept: list[str] = []
    rest = iter(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for argument in rest:
        if argument in ("--launch", "--num-processes"):
            next(rest, None)
        elif not argument.startswith(("--launch=", "--num-processes=")):
            kept.append(argument)
    return kept


def start(launch: Any, sources: Any) -> None:
    """Run this command line in the processes of the launch, and exit; None: go on in this one.

    Args:
        sources: of the recipe's data. If these are files so small that there may be fewer rows than
            processes, the rows are counted before any process is started.
    """
    if launch is None:
        return
    from ..data.sources import count_rows, find_file
    from ..distributed.ranks import check_rows

    files = [find_file(source.path) for source in sources]
    if all(files) and sum(file.stat().st_size for file in files) < SMALL * launch.processes:
        check_rows(sum(map(count_rows, sources)), launch.processes)
    launch.run(without_launch(sys.argv[1:]))


def planned(launch: Any, model: str, recipe: Any) -> dict[str, Any]:
    """What a dry run of any verb shows besides: the resolved recipe, the bytes that each process
    needs (by part, where they are known), and the launch as a command for a shell."""
    from ..training.memory import estimate

    result: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    strategy = "one" if launch is None else launch.strategy
    needed = asdict(estimate(model, recipe, launch.processes if launch else 1))["bytes"]
    result["memory"] = needed.get(strategy, "unknown for fsdp2 and for launch files")
    if launch is not None:
        told = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
        line = [part for part in without_launch(sys.argv[1:]) if part != "--dry-run"]
        command = launch.command(line)
        result["launch"] = " ".join([*told, shlex.join(command)])
    return result
