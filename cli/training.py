"""The options that the training verbs have in common, and how they are run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .launch import planned, start, with_launch
from .output import AsJson, DryRun, Overrides, RecipeOption, Verbose, quiet, report
from .push import publish


def training_verb(
    name: str, text: str, example: str, *, model: str, data: str, steps: str = ""
) -> Callable[..., None]:
    """The command `name`, which runs the API function of that name.

    Args:
        text: the command's help. example: arguments of a typical call. model, data, steps: what the
            verb's help says of its model, of its data, and besides of `--max-steps`.
    """

    def verb(
        model: Annotated[str, typer.Argument(help="Folder or Hub id of {}, as ID or ID@REVISION.")],
        overrides: Overrides = None,
        recipe: RecipeOption = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                metavar="FILE",
                help="{}: a file (jsonl, json, parquet, csv or txt, each also as .gz), - for "
                "standard input, or a Hub data set. Can be repeated.",
            ),
        ] = None,
        self_data: Annotated[
            str | None,
            typer.Option(
                metavar="PROMPTS",
                help="Also train on text that the model itself writes, continuing the prompts in "
                "this file; data.self has further settings.",
            ),
        ] = None,
        text_field: Annotated[
            str | None, typer.Option(help="Field that holds the text of a row.")
        ] = None,
        output_dir: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="New or empty folder.", show_default="a folder in runs"
            ),
        ] = None,
        max_steps: Annotated[
            int | None, typer.Option(metavar="N", help="Number of optimizer steps{}.")
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue the run in the output folder.")
        ] = False,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
        ] = False,
        dry_run: DryRun = False,
        push_to_hub: Annotated[
            str | None,
            typer.Option(
                metavar="REPO", help="Publish the result in this repository, as 'push' does."
            ),
        ] = None,
        as_json: AsJson = False,
        verbose: Verbose = False,
        *,
        launch: Any = None,
    ) -> None:
        from ..distributed.launch import planned_world
        from ..distributed.ranks import at_work, is_launched, is_main
        from ..training.request import requested

        settings = overrides or []
        if self_data is not None:
            settings = [*settings, f"data.self.prompts={json.dumps(self_data)}"]
        request = requested(
            name, model, recipe, output_dir, data=data, text_field=text_field,
            max_steps=max_steps, overrides=settings,
        )  # fmt: skip
        if request.lacks_data:  # before the model is looked for
            from ..data.sources import no_data

            raise no_data()
        if push_to_hub is not None and not is_launched():
            from ..hub.push import check_before

            check_before(push_to_hub, model, request.recipe)
        if not dry_run:
            start(launch, request.recipe.data.sources)
        quiet(verbose)
        with at_work(), planned_world(launch):
            run = getattr(import_module("ar2diff"), name)
            result = run(
                model,
                request.recipe,
                request.output_dir,
                resume=resume,
                overwrite=overwrite,
                dry_run=dry_run,
            )
        shown = {k: v for k, v in asdict(result).items() if v is not None or as_json}
        if dry_run:
            shown |= planned(launch, model, request.recipe)
        if not is_main():  # one process speaks for all
            return
        if not as_json and not dry_run:
            from ..training.closing import closing
            from ..training.plots import pictures_in

            print("\n".join(closing(asdict(result), pictures_in(request.output_dir))))
            shown = {}
        if push_to_hub is not None and not dry_run:
            shown |= {"published": _published(request.output_dir, push_to_hub)}
        if shown:
            report(shown, as_json)

    own = inspect.signature(verb, eval_str=True)
    told = {"model": model, "data": data, "max_steps": steps}
    for parameter, words in told.items():
        info = own.parameters[parameter].annotation.__metadata__[0]
        info.help = info.help.format(words)
    left_out = () if name in ("adapt", "draft") else ("self_data",)
    kept = [p for p in own.parameters.values() if p.name not in left_out]
    verb.__signature__ = own.replace(parameters=kept)
    verb.__name__, verb.__doc__ = name, f"{text}\n\n    Example: ar2diff {name} {example}\n    "
    return with_launch(verb)


def _published(output_dir: Path, repo: str) -> dict[str, Any]:
    from ..core.errors import Ar2DiffError

    try:
        done = publish(output_dir, repo)
    except Ar2DiffError as error:
        again = f"ar2diff push {output_dir} {repo}"
        raise Ar2DiffError(
            error.what, f"{error.fix}; the run itself is complete, so afterwards run: {again}"
        ) from None
    return {name: getattr(done, name) for name in ("url", "commit", "difference", "tokens")}
