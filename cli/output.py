"""What verbs print (lines or, if asked for, JSON on stdout, with logs on stderr), and options that
many of them share."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes that begin like this, for the shell."""
    from ..config.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys of a recipe that begin like this, for the shell."""
    from ..config.recipe import Recipe
    from ..config.schema import field_names

    return [f"{name}=" for name in field_names(Recipe) if name.startswith(incomplete)]


# Options that several verbs have.
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        help="Number type to compute in; auto is the stored one on a GPU, and float32 on a CPU."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, but write nothing.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model in the output folder.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-c",
        "--config",
        metavar="RECIPE",
        help="Name of a recipe ('ar2diff recipes ls'), or a YAML file.",
        autocompletion=complete_recipe,
    ),
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a recipe ('ar2diff recipes ls'), or a YAML file.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Fields of the recipe to set, for example train.learning_rate=1e-3; 'ar2diff config "
        "schema' lists them.",
        autocompletion=complete_key,
    ),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Also show what the libraries say.")]


def quiet(verbose: bool = False) -> None:
    """Keep the libraries' own bars and chatter out of the way, unless they are asked for; before
    they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Of what libraries call of each other; nothing that a user of ours could act on.
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)
    warnings.filterwarnings("ignore", category=UserWarning, module="_distutils_hack")
    # It says on stdout what it finds when it is imported, which others do where it is installed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # On a CPU with avx512_bf16 its import reports the lack of a kernel, which we would not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or `key: value` lines with nested keys indented."""
    if as_json:
        print(json.dumps(_finite(result), ensure_ascii=False))
    else:
        print("\n".join(_lines(result)))


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal and there is something to count; yields what moves it
    on by one."""
    if not total or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        name = key.replace("_", " ")
        if isinstance(item, dict):
            inner = _lines(item, indent + "  ")
            lines += [f"{indent}{name}:", *inner] if inner else []
        elif isinstance(item, (list, tuple)) and item:
            lines += [f"{indent}{name}:", *(f"{indent}  {as_yaml(part)}" for part in item)]
        elif item is not None and item != []:  # what does not apply is not shown
            shown = f"{item:.4g}" if isinstance(item, float) else as_yaml(item)
            lines.append(f"{indent}{name}: {shown}")
    return lines


def as_yaml(value: Any) -> str:
    """A value on one line, as a recipe would write it, not as Python does."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {as_yaml(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
