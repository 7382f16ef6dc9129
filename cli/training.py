"""What the training verbs have in common: their options, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .launch import planned, start, with_launch
from .output import AsJson, DryRun, quiet, report
from .push import publish


def training_verb(name: str, text: str, example: str) -> Callable[..., None]:
    """The verb `name`, which runs `ar2diff.training.<name>.<name>`.

    Args:
        text: its help. example: a command.
    """

    def verb(
        model: Annotated[str, typer.Argument(help="Folder or Hub id; id@revision is allowed.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields.")
        ] = None,
        recipe: Annotated[str | None, typer.Option(help="Recipe by name, or a YAML file.")] = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                metavar="SRC", help="jsonl, parquet, txt (.gz) or Hub data set; repeatable."
            ),
        ] = None,
        text_field: Annotated[
            str | None, typer.Option(help="Field of a row that is the text.")
        ] = None,
        output_dir: Annotated[
            Path | None, typer.Option(help="New or empty folder.", show_default="in runs")
        ] = None,
        max_steps: Annotated[int | None, typer.Option(help="0 converts without training.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with the run there.")] = False,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace the run there.")
        ] = False,
        dry_run: DryRun = False,
        push_to_hub: Annotated[
            str | None, typer.Option(metavar="REPO", help="Publish the result, as 'push' does.")
        ] = None,
        as_json: AsJson = False,
        *,
        launch: Any = None,
    ) -> None:
        from ..config.recipe import load_recipe, with_values
        from ..core.errors import Ar2DiffError
        from ..distributed.launch import planned_world
        from ..distributed.ranks import at_work, is_launched, is_main

        if resume and overwrite:
            raise Ar2DiffError("--resume and --overwrite contradict each other", "choose one")
        settings = list(overrides or [])
        if max_steps is not None:
            settings.append(f"train.max_steps={max_steps}")
        plan = load_recipe(recipe, settings)
        values = {}
        if data:
            known = {source.path: source for source in plan.data.sources}
            # A source that the recipe knows keeps its weight and its other settings.
            values["sources"] = [known[p].model_dump() if p in known else {"path": p} for p in data]
        if text_field is not None:
            values["text_field"] = text_field
        plan = with_values(plan, data=values)
        if output_dir is None:
            stem = model.rstrip("/").split("/")[-1].partition("@")[0]
            suffix = plan.convert.attention if name == "adapt" else name
            output_dir = Path("runs") / f"{stem}-{suffix}"
        if push_to_hub is not None and not is_launched():
            from ..hub.push import check_before

            check_before(push_to_hub, model, plan)
        if not dry_run:
            start(launch, plan.data.sources)
        quiet()
        with at_work(), planned_world(launch):
            run = getattr(import_module(f"..training.{name}", __package__), name)
            result = run(
                model,
                plan,
                output_dir,
                resume=resume,
                overwrite=overwrite,
                dry_run=dry_run,
            )
        if dry_run:
            result |= planned(launch, model, plan)
        if is_main():  # one process speaks for all
            if not as_json and not dry_run:
                result = {k: v for k, v in result.items() if k not in ("recipe", "versions")}
            if push_to_hub is not None and not dry_run:
                result |= {"published": _published(output_dir, push_to_hub)}
            report({"dry_run": dry_run, "output_dir": str(output_dir), **result}, as_json)

    verb.__name__, verb.__doc__ = name, f"{text}\n\n    Example: ar2diff {name} {example}\n    "
    return with_launch(verb)


def _published(output_dir: Path, repo: str) -> dict[str, Any]:
    from ..core.errors import Ar2DiffError

    try:
        done = publish(output_dir, repo)
    except Ar2DiffError as error:
        again = f"ar2diff push {output_dir} {repo}"
        raise Ar2DiffError(error.what, f"{error.fix}; the run has ended, so: {again}") from None
    return {name: getattr(done, name) for name in ("url", "commit", "difference", "tokens")}
