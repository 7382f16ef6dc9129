"""`ar2diff memory`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import AsJson, quiet, report


def memory(
    model: Annotated[str, typer.Argument(help="Folder or Hub id; its weights are not read.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name, or a YAML file.")] = None,
    launch: Annotated[
        str | None, typer.Option(metavar="STRATEGY", help="One of them; all if left out.")
    ] = None,
    num_processes: Annotated[int, typer.Option(metavar="N", help="To cut it over.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that each process of a run needs.

    Example: ar2diff memory Qwen/Qwen3-0.6B --recipe qwen3-0.6b --num-processes 2
    """
    from ..config.recipe import load_recipe
    from ..core.errors import Ar2DiffError

    plan = load_recipe(recipe, overrides or [])
    if num_processes < 1:
        raise Ar2DiffError(f"--num-processes {num_processes}: at least one", "give 1 or more")
    quiet()
    from ..training.memory import STRATEGIES, estimate

    if launch not in (None, *STRATEGIES):
        raise Ar2DiffError(f"--launch {launch!r} is unknown", f"one of {', '.join(STRATEGIES)}")
    result = estimate(model, plan, num_processes)
    if launch is not None:
        result["bytes"] = {launch: result["bytes"][launch]}
    if as_json:
        report(result, as_json)
        return
    print(table(result))


def table(result: dict) -> str:
    """The estimate in MB, a column a strategy."""
    strategies = list(result["bytes"])
    lines = [
        f"{result['parameters']:,} parameters, {result['trainable_parameters']:,} trained; "
        f"MB in each of {result['processes']} processes (one: in a single process)",
        f"{'':12}" + "".join(f"{name:>12}" for name in strategies),
    ]
    for part in result["bytes"][strategies[0]]:
        values = [result["bytes"][name][part] / 1e6 for name in strategies]
        lines.append(f"{part:12}" + "".join(f"{value:12,.1f}" for value in values))
    lines.append(
        f"First each process loads all weights: {result['loading'] / 1e6:,.1f} MB of main memory, "
        "whatever shards them later."
    )
    return "\n".join(lines)
