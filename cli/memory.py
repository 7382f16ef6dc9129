"""`ar2diff memory`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .output import AsJson, Overrides, RecipeOption, quiet, report


def memory(
    model: Annotated[
        str,
        typer.Argument(help="Folder or Hub id of the model; its weights are not read."),
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    launch: Annotated[
        str | None,
        typer.Option(metavar="STRATEGY", help="Show only this strategy.", show_default="all"),
    ] = None,
    num_processes: Annotated[
        int, typer.Option(metavar="N", help="Number of processes that share the run.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that each process of a run needs.

    Example: ar2diff memory Qwen/Qwen3-0.6B --recipe qwen3-0.6b --num-processes 2
    """
    from ..config.recipe import load_recipe
    from ..core.errors import Ar2DiffError, nearest, option, shortened

    plan = load_recipe(recipe, overrides or [])
    if num_processes < 1:
        raise Ar2DiffError(
            f"{option('num_processes', num_processes)} is less than 1", "set it to 1 or more"
        )
    quiet()
    from ..training.memory import ESTIMATED, estimate

    if launch not in (None, *ESTIMATED):
        raise Ar2DiffError(
            f"{option('launch')} {shortened(launch)} is unknown{nearest(launch, ESTIMATED)}",
            f"choose one of {', '.join(ESTIMATED)}",
        )
    result = asdict(estimate(model, plan, num_processes))
    if launch is not None:
        result["bytes"] = {launch: result["bytes"][launch]}
    if as_json:
        report(result, as_json)
        return
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The estimate in MB, with a column for each strategy."""
    strategies = list(result["bytes"])
    lines = [
        f"{result['parameters']:,} parameters, {result['trainable_parameters']:,} of them trained; "
        f"MB in each of {result['processes']} processes (one: in a single process)",
        f"{'':12}" + "".join(f"{name:>12}" for name in strategies),
    ]
    for part in result["bytes"][strategies[0]]:
        values = [result["bytes"][name][part] / 1e6 for name in strategies]
        if part != "reference" or any(values):
            lines.append(f"{part:12}" + "".join(f"{value:12,.1f}" for value in values))
    lines.append(
        f"At the start, each process loads all weights into main memory, even if they are sharded "
        f"later: {result['loading'] / 1e6:,.1f} MB."
    )
    return "\n".join(lines)
